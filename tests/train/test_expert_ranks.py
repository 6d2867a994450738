"""Training with experts on several ranks: one process's run, and its checkpoints, on any mesh."""

from pathlib import Path

import pytest
import tiny
import torch
import toy_run
from harness import run_ranks
from test_ranks import CLOSE, disagreements, out_of, train_case

pytestmark = pytest.mark.slow
MLP = [
    {**tiny.MOE, "shared_intermediate_size": 16, "z_coef": 0.01},
    {"kind": "uoe", "num_experts": 4, "top_k": 2},
    {**tiny.MOE, "selection_bias": True, "balance_scope": "global"},
]


def spread(toys: toy_run.Toys, folder: Path, expert: int, size: int) -> None:
    train_case(toys, folder, size, "spread", f"parallel.expert={expert}")
    narrow = "train.dtype=bfloat16", "train.activation_checkpointing=full"
    train_case(toys, folder, size, "narrow", f"parallel.expert={expert}", *narrow)


def gathered(toys: toy_run.Toys, folder: Path) -> None:
    """From a checkpoint of experts on two ranks to experts on four."""
    resume = f"train.resume={out_of(folder, 2, 'spread')}/checkpoints/step-2"
    train_case(toys, folder, 4, "from two", "parallel.expert=4", resume)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    toys = toy_run.make(folder, toy_run.ATTENTION, MLP)
    train_case(toys, folder, 1, "plain")
    train_case(toys, folder, 1, "narrow", "train.dtype=bfloat16")
    run_ranks(spread, 2, toys, folder, 2, 2)
    run_ranks(spread, 4, toys, folder, 2, 4)
    run_ranks(gathered, 4, toys, folder)
    resume = f"train.resume={out_of(folder, 2, 'spread')}/checkpoints/step-2"
    train_case(toys, folder, 1, "from two", resume)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(runs, size):
    assert not disagreements(out_of(runs, size, "spread"), out_of(runs, 1, "plain"), CLOSE)


@pytest.mark.parametrize("size", [2, 4])
def test_bfloat16_stays_near(runs, size):
    lines = [toy_run.metrics(out_of(runs, n, "narrow")) for n in (size, 1)]
    for name, tolerance in (("loss", 5e-3), ("grad_norm", 5e-2)):
        many, one = (toy_run.column(side, name) for side in lines)
        assert torch.allclose(many, one, rtol=tolerance), name


@pytest.mark.parametrize("size", [1, 4])
def test_a_checkpoint_goes_on_elsewhere(runs, size):
    resumed, whole = out_of(runs, size, "from two"), out_of(runs, 1, "plain")
    assert not disagreements(resumed, whole, CLOSE, first=3)


def test_another_run_is_told_apart(runs):
    """Negative control."""
    assert disagreements(out_of(runs, 1, "narrow"), out_of(runs, 1, "plain"), CLOSE)
