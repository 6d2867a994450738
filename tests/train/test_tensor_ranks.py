"""Training over a tensor axis: one process's run, and its checkpoints, on any mesh."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy_run
from harness import run_ranks
from invoke import moe
from safetensors.torch import load_file
from test_ranks import CLOSE, configure, disagreements, out_of, train_case
from torch import distributed

from moe.checkpoint import manifest, store
from moe.parallel.world import Ranks

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
ATTENTION = [
    {**tiny.MOH, "shared_heads": [0, 5]},
    {"kind": "bam", "num_experts": 2},
    {"kind": "uoe", "num_experts": 2, "top_k": 1},
]
MLP = [
    {**tiny.MOE, "shared_intermediate_size": 16, "z_coef": 0.01},
    {"kind": "uoe", "num_experts": 4, "top_k": 2},
    {**tiny.MOE, "selection_bias": True, "balance_scope": "global"},
]
STEP = "checkpoints/step-2"


def taken_up(toys: toy_run.Toys, folder: Path, ranks: int, case: str, *more: str) -> None:
    """From where the run on two ranks stood."""
    resume = f"train.resume={out_of(folder, 2, 'split')}/{STEP}"
    train_case(toys, folder, ranks, case, resume, *more)


def same_bits(toys: toy_run.Toys, folder: Path, of: Path, *overrides: str) -> list[str]:
    """What a run that takes up a checkpoint holds of it otherwise than it was written."""
    out = out_of(
        folder, distributed.get_world_size() if distributed.is_initialized() else 1, "held"
    )
    with toy_run.opened(configure(toys, out, f"train.resume={of / STEP}", *overrides)) as (run, _):
        held = {f"{e.kind}/{e.name}": toy_run.whole(e.tensor) for e in run.engine.state()}
    return toy_run.differing(held, toy_run.checkpoint(of, 2))


def count_every_rank(patch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: ranks that share a batch add it up once each."""
    patch.setattr(Ranks, "sum", lambda self, t, every=0: distributed.all_reduce(t) or t)


def two_ranks(toys: toy_run.Toys, folder: Path) -> None:
    tensor = "parallel.tensor=2"
    train_case(toys, folder, 2, "split", tensor)
    train_case(toys, folder, 2, "narrow", tensor, "train.activation_checkpointing=full")
    resume = f"train.resume={out_of(folder, 1, 'plain')}/{STEP}"
    train_case(toys, folder, 2, "from one", tensor, resume)
    taken_up(toys, folder, 2, "from split", tensor)
    with pytest.MonkeyPatch.context() as patch:
        count_every_rank(patch)
        train_case(toys, folder, 2, "counted twice", tensor)
    assert not same_bits(toys, folder, out_of(folder, 1, "plain"), tensor)


def four_ranks(toys: toy_run.Toys, folder: Path) -> None:
    train_case(toys, folder, 4, "split", "parallel.tensor=2", "parallel.expert=2")
    train_case(
        toys, folder, 4, "narrow", "parallel.tensor=2", "train.activation_checkpointing=full"
    )
    taken_up(toys, folder, 4, "from split", "parallel.tensor=2", "parallel.replicate=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("tensor")
    toys = toy_run.make(folder, ATTENTION, MLP, **SIZES)
    for case in ("plain", "narrow"):
        train_case(toys, folder, 1, case)
    run_ranks(two_ranks, 2, toys, folder)
    run_ranks(four_ranks, 4, toys, folder)
    taken_up(toys, folder, 1, "from split")
    for size in (2, 4):
        assert not same_bits(toys, folder, out_of(folder, size, "split"))
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(runs, size):
    assert not disagreements(out_of(runs, size, "split"), out_of(runs, 1, "plain"), CLOSE)


@pytest.mark.parametrize("size", [2, 4])
def test_bfloat16_stays_near(runs, size):
    lines = [toy_run.metrics(out_of(runs, n, "narrow")) for n in (size, 1)]
    for name, tolerance in (("loss", 5e-3), ("grad_norm", 5e-2)):
        many, one = (toy_run.column(side, name) for side in lines)
        assert torch.allclose(many, one, rtol=tolerance), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_split_checkpoint_goes_on_elsewhere(runs, size):
    resumed, whole = out_of(runs, size, "from split"), out_of(runs, 2, "split")
    assert not disagreements(resumed, whole, 0.0 if size == 2 else CLOSE, first=3)


def test_a_checkpoint_of_one_process_is_taken_up_split(runs):
    resumed, whole = out_of(runs, 2, "from one"), out_of(runs, 1, "plain")
    assert not disagreements(resumed, whole, CLOSE, first=3)


def test_each_tensor_is_written_once_and_whole(runs):
    for size in (1, 2, 4):
        case = "plain" if size == 1 else "split"
        with store.Reader(out_of(runs, size, case) / STEP) as reader:
            for key, record in reader.manifest.tensors.items():
                written = sum(torch.Size(piece.shape).numel() for piece in record.pieces)
                assert written == torch.Size(record.shape).numel(), (size, key)


def test_ranks_that_count_a_batch_twice_are_found(runs):
    """Negative control."""
    found = disagreements(out_of(runs, 2, "counted twice"), out_of(runs, 1, "plain"), CLOSE)
    assert any("grad_norm" in line for line in found)


@pytest.mark.parametrize("size", [2, 4])
def test_export_puts_columns_and_rows_together(runs, tmp_path, size):
    step = out_of(runs, size, "split") / "checkpoints/step-4"
    pieces = manifest.Manifest.read(step).tensors[
        "parameter/model.layers.0.self_attn.o_proj.weight"
    ]
    assert len({p.offset[1] for p in pieces.pieces}) == 2, "its columns lie apart"
    result = moe("export", step, "--to", "hf", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    written = load_file(tmp_path / "out/model.safetensors")
    expected = dict(store.weights(step))
    expected.pop("lm_head.weight", None)
    assert written.keys() == expected.keys()
    assert not toy_run.differing(written, expected)
