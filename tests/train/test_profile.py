"""`profile.steps`: a Chrome trace with what each step did by name, and the run as without it."""

import gzip
import json
from pathlib import Path

import pytest
import toy_run
from harness import run_ranks

from moe.config import load
from moe.errors import UserError

STEP = ("data", "forward", "backward", "grad_norm", "optimizer")
INSIDE = {"attention": 3, "mlp": 3, "route": 4, "experts": 2}  # of the toy's three layers


def ranges(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Begin and end of everything named in a trace, by name."""
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    found: dict[str, list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def within(found: dict, name: str, outer: tuple[float, float]) -> list[tuple[float, float]]:
    return [r for r in found.get(name, []) if outer[0] <= r[0] and r[1] <= outer[1]]


def check(found: dict, steps: range, micro_batches: int) -> None:
    """Every step has its parts inside it, and each forward pass the model's."""
    named = {name for name in found if name.startswith("step ")}
    assert named == {f"step {step}" for step in steps}
    for step in steps:
        (outer,) = found[f"step {step}"]
        for name in STEP:
            count = micro_batches if name in ("forward", "backward") else 1
            assert len(within(found, name, outer)) == count, (step, name)
        for forward in within(found, "forward", outer):
            counts = {name: len(within(found, name, forward)) for name in INSIDE}
            assert counts == INSIDE, step


@pytest.fixture(scope="module")
def runs(toys, tmp_path_factory) -> Path:
    """`plain` and `traced`: the same run without and with a trace of its steps 2 and 3."""
    folder = tmp_path_factory.mktemp("profile")
    options = ("checkpoint.every=3", "checkpoint.keep=9")
    toy_run.run(toys.config(folder / "plain", *options))
    toy_run.run(toys.config(folder / "traced", *options, "profile.steps=2-3"))
    return folder


def test_a_trace_has_the_steps_parts_by_name(runs):
    found = ranges(runs / "traced/profile/step-2-3.rank-0.json.gz")
    check(found, range(2, 4), 4)
    (third,) = found["step 3"]
    assert len(within(found, "save", third)) == 1, "due after step 3"
    assert not within(found, "save", found["step 2"][0])
    assert [p.name for p in (runs / "traced/profile").iterdir()] == ["step-2-3.rank-0.json.gz"]
    lacking = {name: spans for name, spans in found.items() if name != "optimizer"}
    with pytest.raises(AssertionError, match="optimizer"):
        check(lacking, range(2, 4), 4)


def test_a_trace_changes_no_bit_and_leaves_nothing_behind(runs):
    plain, traced = (toy_run.checkpoint(runs / name, 4) for name in ("plain", "traced"))
    assert toy_run.differing(plain, traced) == []
    losses = [
        toy_run.column(toy_run.metrics(runs / n), "loss").tolist() for n in ("plain", "traced")
    ]
    assert losses[0] == losses[1]
    assert not (runs / "plain/profile").exists()


def test_hooks_are_there_while_it_is_taken_alone(toys, tmp_path):
    def hooks(model) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with toy_run.opened(toys.config(tmp_path / "run", "profile.steps=2")) as (run, take):
        before = hooks(run.engine.model)
        seen = []
        for step in (1, 2, 3):
            run.tracer.at(step)
            seen.append(hooks(run.engine.model) > before)
            take()
        run.tracer.close()
    assert seen == [False, True, False]
    assert hooks(run.engine.model) == before


def test_a_run_that_ends_early_leaves_the_trace_it_has(toys, tmp_path):
    """Under the name of its steps; one that goes on leaves another, also of the same steps."""
    config = toys.config(tmp_path / "run", "train.steps=9", "profile.steps=2-5")
    for begin in (1, 3, 3):
        with toy_run.opened(config) as (run, take):
            for step in range(begin, begin + 3):
                run.tracer.at(step)
                take()
            run.tracer.close()
    names = {"step-2-3.rank-0": (2, 4), "step-3-5.rank-0": (3, 6), "step-3-5.rank-0.2": (3, 6)}
    files = {path.name for path in (tmp_path / "run/profile").iterdir()}
    assert files == {f"{name}.json.gz" for name in names}
    for name, steps in names.items():
        check(ranges(tmp_path / f"run/profile/{name}.json.gz"), range(*steps), 4)


def test_a_trace_that_cannot_be_written_ends_no_run(toys, tmp_path):
    config = toys.config(tmp_path / "run", "train.steps=2", "profile.steps=1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile").write_text("in the way")
    printed = toy_run.run(config)
    assert "the trace step-1-1.rank-0 in " in printed and "is lost: File exists" in printed
    assert len(toy_run.metrics(tmp_path / "run")) == 2


@pytest.mark.full
def test_a_compiled_model_is_traced_from_outside(toys, tmp_path):
    options = ("train.compile=true", "train.steps=3", "profile.steps=2-3")
    toy_run.run(toys.config(tmp_path / "run", *options))
    found = ranges(tmp_path / "run/profile/step-2-3.rank-0.json.gz")
    assert {"step 2", "step 3", *STEP} <= set(found) and not set(INSIDE) & set(found)


def train(toys: toy_run.Toys, out: Path) -> None:
    toy_run.run(toys.config(out, "train.steps=2", "parallel.expert=2", "profile.steps=2"))


@pytest.mark.slow
def test_each_rank_has_a_file_and_the_way_of_tokens_a_name(tmp_path):
    toys = toy_run.make(tmp_path, mlp=[toy_run.MLP[2]] * 3)
    run_ranks(train, 2, toys, tmp_path / "run", timeout=200.0)
    for rank in range(2):
        found = ranges(tmp_path / f"run/profile/step-2-2.rank-{rank}.json.gz")
        (step,) = found["step 2"]
        ways = within(found, "dispatch", step)
        assert len(ways) == 3 * 2, "of three layers in two micro-batches"
        assert all(len(within(found, "experts", way)) == 1 for way in ways)


@pytest.mark.parametrize(
    ("value", "steps"), [("10-12", (10, 12)), ("[10, 12]", (10, 12)), ("7", (7, 7)), ("null", None)]
)
def test_steps_are_written_as_one_likes(toys, tmp_path, value, steps):
    config = load(toys.write(tmp_path / "run"), ["train.steps=20", f"profile.steps={value}"])
    assert config.profile.steps == steps
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("12-10", "at least one step and at most 100"),
        ("1-101", "traces grow by megabytes"),
        ("0-3", "greater than 0"),
        ("two", "profile.steps="),
        ("[1, 2, 3]", "profile.steps="),
        ("19-21", "profile.steps=19-21 exceeds train.steps=20"),
    ],
)
def test_impossible_steps_are_refused(toys, tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        load(toys.write(tmp_path / "run"), ["train.steps=20", f"profile.steps={value}"])
