"""Model folders and files that want to do harm, given to the commands themselves."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import targets
import tiny
import torch
import toy_run
import yaml
from safetensors.torch import load_file

from moe.data import tokenise
from moe.errors import UserError
from moe.hf import gates, loading
from moe.upcycle import verify
from moe.upcycle.source import Source, read_config
from moe.upcycle.writer import copy_side_files

pytestmark = pytest.mark.slow
LIMIT = 6 * 2**30  # of address space: torch and transformers take some three
EVIL = """import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


RUNNER = """import json, sys
from moe import cli
from moe.errors import MoeError
found = []
for command in json.loads(sys.argv[1]):
    try:
        code, said = cli.app(command, standalone_mode=False), ""
    except MoeError as error:
        code, said = error.exit_code, str(error)
    found.append([code or 0, said])
with open("found.json", "w") as file:
    json.dump(found, file)
"""


def moe(*commands: list, cwd: Path) -> list[tuple[int, str]]:
    """Exit codes and errors of commands, one after the other in a process of bounded memory."""
    arguments = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, arguments],
        env={**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "PYTHONWARNINGS": "ignore"},
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [(code, said) for code, said in json.loads((cwd / "found.json").read_text())]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def dense(tmp_path) -> Path:
    folder = tmp_path / "dense"
    tiny.dense_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(tmp_path) -> Path:
    folder = tmp_path / "mixture"
    tiny.routed_model(tiny.dense_model("llama"), None, tiny.MOE).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def uses(model: Path, place: Path) -> list[list]:
    """The commands that load a model to use it."""
    sizes = [[layer, "mlp", 4, 2] for layer in range(3)]
    tuning = {**targets.TUNING, "shape": sizes}
    (place / "tuning.json").write_text(json.dumps(tuning))
    lines = [json.dumps({"prompt": p * 9, "label": p}) for p in "abcdefgh"]
    (place / "prompts.jsonl").write_text("\n".join(lines))
    tuned = ["--tuning", "tuning.json", "--other-model"]
    prompts = ["--prompts", "prompts.jsonl"]
    return [
        ["generate", model, "--prompt", "a", "--max-new-tokens", 2],
        ["eval", model, "--tasks", "local_perplexity", "--data", ".", "--out", "evaluated"],
        ["tune", "record", model, *prompts, "--out", "trace.npz"],
        [
            "tune",
            "control",
            model,
            *tuned,
            *prompts,
            "--out",
            "controlled",
            "--measure",
            "loss",
            "--labels",
            "field:label",
            "--target",
            "a",
            "--seeds",
            2,
        ],
        ["tune", "export", model, *tuned, "--out", "tuned", "--no-verify"],
        ["tune", "chat", model, *tuned],
    ]


def plant(folder: Path, mark: Path) -> None:
    """Code beside the weights, and a config and a tokenizer config that name it."""
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    maps = {"config.json": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"},
            "tokenizer_config.json": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}  # fmt: skip
    for name, entries in maps.items():
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**fields, "auto_map": entries}))


@pytest.mark.parametrize("own_type", [False, True], ids=["known type", "own type"])
def test_a_models_own_code_never_runs(dense, mixture, toys, tmp_path, own_type):
    mark = tmp_path / "it ran"
    for folder in (dense, mixture):
        plant(folder, mark)
        if own_type:
            fields = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**fields, "model_type": "evil"}))
    (tmp_path / "text.txt").write_text("some text to be read\n" * 40)
    run = {**toys.values(tmp_path / "run"), "model": str(dense)}
    run["train"]["steps"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    commands = [
        ["import", dense, "--out", "imported"],
        ["upcycle", "copy", "--source", dense, "--num-experts", 2, "--top-k", 1, "--out", "copy"],
        ["inspect", dense],
        ["verify", dense],
        ["export", dense, "--to", "hf", "--out", "exported"],
        ["train", "run.yaml"],
        ["plan", "run.yaml"],
        ["doctor", "run.yaml"],
        ["data", "prepare", "text.txt", "--tokenizer", dense, "--out", "data"],
        *uses(mixture, tmp_path),
    ]
    found = moe(*commands, cwd=tmp_path)
    assert not mark.exists(), "it ran"
    codes = {command[0]: code for command, (code, _) in zip(commands, found, strict=True)}
    if own_type:
        assert codes["import"] == codes["upcycle"] == codes["train"] == 2, codes
    else:
        assert codes["import"] == codes["inspect"] == codes["train"] == 0, codes
        assert not (tmp_path / "imported/evil.py").exists()


def test_a_tokenizer_that_is_code_is_said_to_be(dense, tmp_path):
    plant(dense, tmp_path / "it ran")
    path = dense / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    (tmp_path / "text.txt").write_text("some text to be read\n" * 40)
    readers = [
        lambda: loading.load_tokenizer(dense),
        lambda: tokenise.load_tokenizer(str(dense)),
        lambda: verify.windows(dense, None, 97),
        lambda: gates.calibration_tokens(dense, tmp_path / "text.txt", 97),
    ]
    path.write_text(json.dumps({**fields, "tokenizer_class": "EvilTokenizer"}))
    for read in readers:
        with pytest.raises(
            UserError, match=f"the tokenizer of {dense} is code of its own"
        ) as error:
            read()
        assert "\n" not in str(error.value) and "hf.co" not in str(error.value)
        assert "trust_remote_code" not in str(error.value)
    path.write_text("[")
    for read in readers:  # negative control
        with pytest.raises(UserError, match="has no tokenizer"):
            read()
    assert not (tmp_path / "it ran").exists()


def test_that_code_would_run_where_it_is_trusted(dense, tmp_path):
    """Negative control."""
    plant(dense, tmp_path / "it ran")
    fields = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**fields, "model_type": "evil"}))
    code = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"  # noqa: E501
    subprocess.run([sys.executable, "-c", code, dense], check=True, capture_output=True,
                   env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")})  # fmt: skip
    assert (tmp_path / "it ran").exists()


class Bomb:
    """What a pickle does when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_by_another_name_are_never_loaded(mixture, tmp_path):
    """Of an index, of a config's key, of an adapter: transformers would load each of them."""
    mark, sound = tmp_path / "it ran", mixture / "model.safetensors"
    said = {"index": "w.bin", "key": "adapter_model.bin", "adapter": "adapter_config.json"}
    wrong = {name: tmp_path / name for name in said}
    for name, folder in wrong.items():
        shutil.copytree(mixture, folder)
        if name != "adapter":
            (folder / "model.safetensors").unlink()
        torch.save({"a": Bomb(mark)}, folder / ("w.bin" if name == "index" else said["key"]))
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(sound), "w.bin")}
    (wrong["index"] / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = json.loads((mixture / "config.json").read_text())
    fields["transformers_weights"] = said["key"]
    (wrong["key"] / "config.json").write_text(json.dumps(fields))
    (wrong["adapter"] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some text to be read\n" * 40)

    def commands(folder: Path) -> list[list]:
        return [
            *uses(folder, tmp_path),
            ["verify", folder],
            ["import", folder, "--out", "imported"],
            ["export", folder, "--to", "hf", "--out", "exported"],
        ]

    every = [(name, c) for name, folder in wrong.items() for c in commands(folder)]
    found = moe(*(c for _, c in every), *commands(mixture), cwd=tmp_path)
    assert not mark.exists(), "it ran"
    for (name, command), (code, text) in zip(every, found, strict=False):
        assert code in (2, 3) and said[name] in text, (command, text)
    refused = [text for code, text in found[len(every) :] if code]
    assert not refused  # negative control


IMPLEMENTATIONS = {
    "attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel:f",
    "_attn_implementation_internal": "nonsense", "experts_implementation": "somebody/kernel",
}  # fmt: skip


@pytest.mark.parametrize("key", IMPLEMENTATIONS)
def test_a_config_names_no_code_to_be_fetched(dense, key):
    fields = json.loads((dense / "config.json").read_text())
    for value in (IMPLEMENTATIONS[key], {"": IMPLEMENTATIONS[key]}):
        for wrong in ({key: value}, {"text_config": {key: value}}):
            (dense / "config.json").write_text(json.dumps({**fields, **wrong}))
            with pytest.raises(UserError, match=f"{key}=.* is none of eager, ") as error:
                read_config(dense)
            assert "\n" not in str(error.value)
    (dense / "config.json").write_text(json.dumps({**fields, key: "eager"}))
    read_config(dense)  # negative control


def test_pickles_are_never_loaded(dense, tmp_path):
    mark = tmp_path / "it ran"
    (dense / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        torch.save({"a": Bomb(mark)}, dense / name)
    commands = [
        ["import", dense, "--out", "i"],
        ["import", dense / "pytorch_model.bin", "--out", "j"],
        ["verify", dense],
        ["export", dense, "--to", "hf", "--out", "e"],
        ["eval", dense, "--tasks", "local_perplexity", "--data", ".", "--out", "k"],
        ["generate", dense, "--prompt", "a"],
    ]
    for code, said in moe(*commands, cwd=tmp_path):
        assert code == 2 and "ickled" in said, said
    assert not mark.exists()
    torch.load(dense / "model.pt", weights_only=False)  # negative control
    assert mark.exists()


SECRET = "the key to everything"


def test_links_out_of_a_model_folder_are_refused(dense, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    for link, target in (("notes.txt", secret), ("more", tmp_path), ("gone", "/nowhere/at/all"),
                         ("up.txt", "../secret")):  # fmt: skip
        (dense / link).symlink_to(target)
        with pytest.raises(UserError, match=rf"1 links lead out of it, first {link} to /"):
            read_config(dense)
        (dense / link).unlink()
    copy_side_files(dense, tmp_path)  # negative control: it follows links
    (dense / "notes.txt").symlink_to(secret)
    copy_side_files(dense, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == SECRET


def test_links_within_and_the_hub_caches_links_work(dense, tmp_path):
    (dense / "readme.txt").write_text("x")
    (dense / "again.txt").symlink_to("readme.txt")
    assert Source.open(dense).tensors
    alias = tmp_path / "alias"
    alias.symlink_to(dense)
    assert Source.open(alias).tensors, "the folder's own name may be a link"
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for index, file in enumerate(p for p in dense.iterdir() if not p.is_symlink()):
        shutil.copy(file, cache / "blobs" / str(index))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(index))
    assert Source.open(snapshot).tensors.keys() == Source.open(dense).tensors.keys()
    assert moe(["import", snapshot, "--out", "imported"], cwd=tmp_path) == [(0, "")]
    copied = load_file(tmp_path / "imported/model.safetensors")
    assert torch.equal(
        copied["model.norm.weight"], load_file(dense / "model.safetensors")["model.norm.weight"]
    )
    (snapshot / "notes.txt").symlink_to("../../refs")
    with pytest.raises(UserError, match="lead out"):
        Source.open(snapshot)


ABSURD = [
    ("num_hidden_layers", 10**9),
    ("vocab_size", 10**12),
    ("hidden_size", 2**40),
    ("num_attention_heads", 2**62),
    ("head_dim", 2**30),
]


@pytest.mark.parametrize(("field", "value"), ABSURD)
def test_absurd_sizes_are_refused_where_they_are_read(dense, field, value):
    fields = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(UserError, match=f"{field}={value} exceeds .*no model is that large"):
        read_config(dense)


def test_sizes_that_the_weights_do_not_have_are_not_allocated(dense, tmp_path):
    fields = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**fields, "vocab_size": 2**24}))
    (tmp_path / "a.txt").write_text("words")
    commands = [
        ["upcycle", "copy", "--source", dense, "--num-experts", 2, "--top-k", 1, "--out", "o"],
        ["eval", dense, "--tasks", "local_perplexity", "--data", ".", "--out", "e"],
    ]
    for code, said in moe(*commands, cwd=tmp_path):
        assert code in (2, 3) and "Memory" not in said, said


def test_bombs_of_yaml_and_json_end_in_a_line(dense, tmp_path):
    layers = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    laughs = "\n".join([*layers, "model: *a11", "out: {x: *a11}"])
    bombs = {
        "laughs": laughs,
        "deep": "[" * 100_000,
        "itself": "model: &a [*a]",
        "object": "model: !!python/object/apply:os.system ['touch ran']",
    }
    for name, text in bombs.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    trains = [["train", f"{name}.yaml"] for name in bombs]
    (dense / "receipt.json").write_text('{"steps": ' + "[" * 100_000)
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    (other / "config.json").write_text("[" * 100_000)
    *trained, verified, inspected = moe(*trains, ["verify", dense], ["inspect", other],
                                        cwd=tmp_path)  # fmt: skip
    for code, said in trained:
        assert code == 2 and "is not YAML" in said and len(said) < 2000, said[:2000]
    assert not (tmp_path / "ran").exists()
    assert verified[0] == 3 and "not a receipt" in verified[1]
    assert inspected[0] == 2 and "config.json cannot be read" in inspected[1], inspected


@pytest.mark.parametrize(
    "name", ["../dense/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x\0y", 7, None]
)
def test_an_index_names_files_of_its_folder_alone(dense, name):
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    from moe.errors import Corrupt

    with pytest.raises(Corrupt, match="outside the folder"):
        Source.open(dense)
