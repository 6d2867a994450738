"""What is saved while training goes on is what would have been saved while it waits."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import toy_run
from harness import run_ranks
from injection import Call, inject

from moe.checkpoint import pieces, store
from moe.config import load

pytestmark = pytest.mark.slow
OPTIONS = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep=9", "parallel.timeout=60")
ENGINES = {
    "native": (),
    "native in bfloat16": ("train.dtype=bfloat16",),
    "native, experts": ("parallel.expert=2",),
    "native, tensor": ("parallel.tensor=2",),
    "deepspeed 0": ("engine=deepspeed", "deepspeed.stage=0"),
    "deepspeed 1 in bfloat16": ("engine=deepspeed", "deepspeed.stage=1", "train.dtype=bfloat16"),
    "deepspeed 2, experts": ("engine=deepspeed", "deepspeed.stage=2", "parallel.expert=2"),
    "deepspeed 3": ("engine=deepspeed", "deepspeed.stage=3"),
    "deepspeed, offloaded": ("engine=deepspeed", "deepspeed.offload=optimizer"),
}
UNCOPIED = "native, not copied"


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    """Sizes that every mesh divides."""
    attention = [{"kind": "dense"}]
    mlp = [{"kind": "moe", "num_experts": 4, "top_k": 2}]
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 98}  # fmt: skip
    return toy_run.make(tmp_path_factory.mktemp("engines"), attention, mlp, **sizes)


def slow(call: Call) -> None:
    """Writes that take longer than a step."""
    if call.function == "write":
        time.sleep(0.02)


def train_all(toys: toy_run.Toys, folder: Path) -> None:
    def train(name: str, asynchronous: bool, *options: str) -> None:
        out = folder / name / ("later" if asynchronous else "at once")
        saving = f"checkpoint.asynchronous={asynchronous}"
        place = (f"model={toys.model}", f"out={out}", f"data.train.0.path={toys.data}")
        config = load(folder / "run.yaml", [*place, *OPTIONS, *options, saving])
        with inject(folder, slow if asynchronous else lambda call: None):
            toy_run.run(config)

    for name, options in ENGINES.items():
        train(name, False, *options)
        train(name, True, *options)
    train(UNCOPIED, False)
    with mock.patch.object(pieces, "_copy", lambda key, local, buffers: local):
        train(UNCOPIED, True)


@pytest.fixture(scope="module")
def saved(toys, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    toys.write(folder / "run")
    run_ranks(train_all, 2, toys, folder, timeout=400)
    return folder


def contents(out: Path, step: int) -> dict[str, Any]:
    """The bytes of every file of a checkpoint but the manifest, and what that says of them."""
    folder = out / "checkpoints" / f"step-{step}"
    assert not store.check(folder)
    with store.Reader(folder) as reader:
        found: dict[str, Any] = {"manifest": reader.manifest.tensors}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_later_is_the_same_as_at_once(saved, name) -> None:
    for step in range(1, 4):
        later, once = (contents(saved / name / how, step) for how in ("later", "at once"))
        assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= later.keys()
        assert later == once, step


def test_a_state_that_is_not_copied_differs(saved) -> None:
    """Negative control."""
    file = "checkpoints/step-1/rank-00000.safetensors"
    later, once = ((saved / UNCOPIED / how / file).read_bytes() for how in ("later", "at once"))
    assert len(later) == len(once) and later != once
