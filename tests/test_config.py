"""A configuration file is right, or one error names everything that is wrong in it."""

from pathlib import Path

import pytest
import yaml

from moe.config import RunConfig, load, parse
from moe.errors import UserError

VALUES = {
    "model": "m",
    "out": "runs/a",
    "data": {"train": [{"path": "corpus"}]},
    "train": {"global_batch_size": 24, "micro_batch_size": 2},
}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def refuse(file: Path, *overrides: str) -> str:
    """The message with which this configuration is refused, nothing having been created."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        load(file, overrides)
    assert sorted(file.parent.rglob("*")) == before
    assert error.value.exit_code == 2
    return str(error.value)


def test_defaults_are_spelled_out_and_read_back_the_same(file) -> None:
    config = load(file)
    assert config.train.dtype == "bfloat16"
    assert config.optimizer.betas == (0.9, 0.95)
    (file.parent / "resolved.yaml").write_text(config.to_yaml())
    assert load(file.parent / "resolved.yaml") == config
    written = yaml.safe_load(config.to_yaml())
    assert set(written) == set(RunConfig.model_fields)
    assert written["schedule"]["warmup_steps"] == 50
    assert load(file, ["seed=1"]) != config, "equality must see a changed key"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=3E-5", 3e-5),
        ("optimizer.lr=0.001", 1e-3),
        ("train.steps=1e3", 1000),
        ("train.clip=null", None),
        ("train.compile=true", True),
        ("train.resume=runs/a/checkpoints/step-10", "runs/a/checkpoints/step-10"),
        ("train.trainable=['*.router.*','*.experts.*']", ["*.router.*", "*.experts.*"]),
        ("optimizer.betas=[8e-1, 0.99]", (0.8, 0.99)),
        ("out=runs/b=c", Path("runs/b=c")),
        ("schedule={kind: linear, warmup_steps: 1e1}", None),
    ],
)
def test_override_sets_one_key_in_the_type_it_has(file, override, found) -> None:
    config = load(file, [override])
    key = override.partition("=")[0]
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    if key == "schedule":
        assert (value.kind, value.warmup_steps) == ("linear", 10)
    else:
        assert value == found
        assert type(value) is type(found)
    section = key.split(".")[0]
    same = {"exclude": {section}}
    assert config.model_dump(**same) == load(file).model_dump(**same)


def test_later_override_wins_and_a_source_can_be_given_whole(file) -> None:
    config = load(file, ["seed=1", "data.train=[{path: a, weight: 2e-1}, {path: b}]", "seed=2"])
    assert config.seed == 2
    assert [(str(s.path), s.weight) for s in config.data.train] == [("a", 0.2), ("b", 1.0)]


@pytest.mark.parametrize(
    ("override", "place", "close"),
    [
        ("train.stepz=3", "train.stepz", "steps"),
        ("optimizer.learning=3", "optimizer.learning", None),
        ("trian.steps=3", "trian", "train"),
        ("data.train=[{path: a, wieght: 2}]", "data.train.0.wieght", "weight"),
        ("data.sequence_lenght=3", "data.sequence_lenght", "sequence_length"),
        ("parallel.pipeline=2", "parallel.pipeline", None),
    ],
)
def test_misspelt_key_names_the_closest_or_all_it_could_be(file, override, place, close) -> None:
    message = refuse(file, override)
    assert f"{place} is not a key." in message
    if close:
        assert f"Did you mean `{close}`?" in message
    else:
        assert "Known: " in message
        assert ("lr, betas" if "optimizer" in place else "replicate, shard") in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps=0: input should be greater than 0."),
        ("train.steps=2.5", "train.steps=2.5: input should be a valid integer"),
        ("train.micro_batch_size=-1", "train.micro_batch_size=-1: "),
        ("train.clip=0", "train.clip=0: "),
        ("train.dtype=float16", "train.dtype='float16': input should be 'float32' or 'bfloat16'."),
        ("train.trainable=[]", r"train.trainable=[]: "),
        ("optimizer.lr=-1e-4", "optimizer.lr=-0.0001: "),
        ("optimizer.lr=.nan", "optimizer.lr=nan: "),
        ("optimizer.lr=.inf", "optimizer.lr=inf: input should be a finite number."),
        ("optimizer.lr=fast", "optimizer.lr='fast': input should be a valid number"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1=1.0: input should be less than 1."),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing."),
        ("schedule.kind=step", "schedule.kind='step': input should be 'constant', 'cosine'"),
        ("schedule.final_ratio=1.5", "schedule.final_ratio=1.5: "),
        ("data.train=[]", "data.train=[]: list should have at least 1 item"),
        ("data.train=[{path: a, weight: 0}]", "data.train.0.weight=0: "),
        ("data.train=[{weight: 1}]", "data.train.0.path is missing."),
        ("data.document_boundaries=yes", "data.document_boundaries=True: "),
        ("engine=fsdp", "engine='fsdp': input should be 'native' or 'deepspeed'."),
        ("deepspeed.stage=4", "deepspeed.stage=4: input should be 0, 1, 2 or 3."),
        ("parallel.timeout=0", "parallel.timeout=0: "),
        ("seed=-1", "seed=-1: "),
        ("seed=4294967296", "seed=4294967296: "),
        ("model=null", "model=None: "),
        ("train=3", "train=3: "),
        ("checkpoint.keep=0", "checkpoint.keep=0: "),
        ("train.micro_batch_size=5", "micro_batch_size=5 does not divide train.global_batch_size"),
        ("train.steps=10", "schedule.warmup_steps=50 exceeds train.steps=10"),
        ("schedule.decay_steps=5", "schedule.decay_steps is for kind wsd, not cosine."),
    ],
)
def test_impossible_value_is_named_with_its_rule(file, override, message) -> None:
    assert message in refuse(file, override)
    assert "1 problem(s)" in refuse(file, override)


def test_all_problems_come_at_once(file) -> None:
    message = refuse(
        file, "train.stepz=3", "optimizer.lr=0", "data.train=[]", "checkpoint.every=x", "model=null"
    )
    assert "5 problem(s)" in message
    assert message.count("\n") == 5
    for place in ("train.stepz", "optimizer.lr", "data.train", "checkpoint.every", "model"):
        assert f"\n  {place}" in message
    together = refuse(file, "train.micro_batch_size=7", "train.steps=10", "schedule.decay_steps=1")
    assert "3 problem(s)" in together
    for place in ("train.micro_batch_size=7", "schedule.warmup_steps=50", "schedule.decay_steps"):
        assert f"\n  {place}" in together
    mixed = refuse(
        file,
        "train.micro_batch_size=7",
        "train.steps=10",
        "optimizer.lr=0",
        "train.foo=1",
        "seed=x",
    )
    assert "5 problem(s)" in mixed
    assert "train.micro_batch_size=7 does not divide" in mixed
    (file.parent / "bare.yaml").write_text("train: {micro_batch_size: 7, global_batch_size: 24}")
    with pytest.raises(UserError, match=r"(?s)model is missing.*7 does not divide"):
        load(file.parent / "bare.yaml")
    overrides = refuse(file, "nonsense", "seed.a=1", "data.train.7.weight=2", "optimizer.lr=-1")
    for part in ("'nonsense'", "seed={'a': 1}", "7 is no item of a list", "optimizer.lr=-1"):
        assert part in overrides
    # a key that is wrong itself says nothing about the others
    alone = refuse(file, "train.steps=x", "train.micro_batch_size=7")
    assert "2 problem(s)" in alone
    assert "warmup" not in alone


def test_a_message_says_which_file_it_is_about(file) -> None:
    assert refuse(file, "seed=x").startswith(str(file))
    with pytest.raises(UserError, match=r"^here: 3 problem"):
        parse({}, "here")


@pytest.mark.parametrize("override", ["train.steps", "=3", "3"])
def test_what_is_not_an_override_is_refused(file, override) -> None:
    assert "is not an override. Write key.path=value." in refuse(file, override)


def test_override_below_a_value_or_not_in_yaml_is_refused(file) -> None:
    assert "model holds a value, not keys" in refuse(file, "model.name=x")
    assert "the value is not YAML" in refuse(file, "train.trainable=[a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"model: \xff\xfe", "is not YAML"),
        (b"\ttrain: 1", "is not YAML"),
        (b"- 1\n- 2", "holds list, not keys with values"),
        (b"text", "holds str, not keys with values"),
        (b"", "model is missing"),
        (b"data:\n", "data=None: "),
        (b"!!python/object/apply:os.system ['touch ran']", "is not YAML"),
    ],
)
def test_file_that_is_no_configuration_is_refused(file, content, message) -> None:
    file.write_bytes(content)
    assert message in refuse(file)


def test_file_that_cannot_be_read_is_refused(file) -> None:
    assert "No such file" in refuse(file.with_name("none.yaml"))
    assert "cannot be read: Is a directory" in refuse(file.parent)


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 5, "24 is not a multiple of train.micro_batch_size=2 × 5 ranks. Use a multiple of 5."),
        (["train.micro_batch_size=8"], 2, "× 2 ranks. Legal micro batch sizes: 1, 2, 3, 4, 6, 12."),
        (["parallel.replicate=3"], 4, "parallel.replicate=3 × shard=-1 is not the 4 ranks"),
        (["parallel.replicate=2", "parallel.shard=4"], 4, "replicate=2 × shard=4 is not the 4"),
        (["parallel.shard=0"], 1, "shard=0 is not the 1 ranks"),
        (["parallel.replicate=8"], 4, "replicate=8 × shard=-1 is not the 4 ranks"),
    ],
)
def test_world_that_does_not_fit_is_refused(file, overrides, ranks, message) -> None:
    config = load(file, overrides)
    with pytest.raises(UserError) as error:
        config.check_world(ranks)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_world_problems_come_together_and_legal_worlds_pass(file) -> None:
    with pytest.raises(UserError) as error:
        load(file, ["parallel.replicate=2"]).check_world(5)
    assert str(error.value).count("\n") == 1
    for ranks in (1, 2, 3, 4, 6, 12):
        load(file).check_world(ranks)
    load(file, ["parallel.replicate=2", "parallel.shard=2"]).check_world(4)


def test_a_configuration_does_not_change(file) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(file).train.steps = 3


def test_the_check_of_refusals_fails_for_a_right_configuration(file) -> None:
    """Negative control."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refuse(file)
