"""Training with a capacity: one process and several ranks drop the same, and say how much."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy_run
from harness import run_ranks
from test_ranks import CLOSE, disagreements, out_of, train_case
from torch import Tensor

from moe.model import experts
from moe.model.router import ExpertChoice

pytestmark = pytest.mark.slow
# groups of one rank's experts, a shared expert beside them, and a union
MLP = [
    {**tiny.MOE, "shared_intermediate_size": 16, "num_groups": 2, "top_groups": 1},
    {"kind": "dense"},
    {"kind": "uoe", "num_experts": 4, "top_k": 2, "weights": "soft"},
]
TIGHT = "parallel.capacity=1.0"


def counted(toys: toy_run.Toys, folder: Path, size: int, *more: str) -> list[tuple[int, int]]:
    """One run; the choices and the drops of each pass of a layer in training, counted here."""
    seen: list[tuple[int, int]] = []
    limit = experts.limit

    def spied(choice: ExpertChoice, num_experts: int, *rest: Any) -> ExpertChoice:
        found = limit(choice, num_experts, *rest)
        lost: Tensor = found.indices_TK == num_experts
        seen.append((lost.numel(), int(lost.sum())))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "limit", spied)
        train_case(toys, folder, size, "tight", TIGHT, *more)
    return seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[int, list[Any]]]:
    folder = tmp_path_factory.mktemp("capacity")
    toys = toy_run.make(folder, toy_run.ATTENTION, MLP)
    train_case(toys, folder, 1, "plain")
    train_case(toys, folder, 1, "recomputed", TIGHT, "train.activation_checkpointing=full")
    seen = {1: [counted(toys, folder, 1)]}
    seen[2] = run_ranks(counted, 2, toys, folder, 2, "parallel.expert=2")
    return folder, seen


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_dropped_is_counted_to_the_last_choice(runs, size):
    folder, seen = runs
    lines = toy_run.metrics(out_of(folder, size, "tight"))
    steps = len(lines)
    for number, line in enumerate(lines):
        pairs = dropped = 0
        for rank in seen[size]:
            each = len(rank) // steps  # two layers of every micro-batch
            mine = rank[number * each : (number + 1) * each]
            pairs, dropped = (
                total + sum(column)
                for total, column in zip((pairs, dropped), zip(*mine, strict=True), strict=True)
            )
        assert pairs == 2 * 8 * toy_run.SEQUENCE * 2 and 0 < dropped < pairs
        assert line["experts/dropped_share"] == pytest.approx(dropped / pairs, rel=1e-6)


@pytest.mark.parametrize("other", [(2, "tight"), (1, "recomputed")])
def test_the_same_is_dropped_on_two_ranks_and_when_layers_are_recomputed(runs, other):
    folder, _ = runs
    both = [out_of(folder, *case) for case in ((1, "tight"), other)]
    assert not disagreements(both[1], both[0], CLOSE)
    one, two = (toy_run.column(toy_run.metrics(run), "experts/dropped_share") for run in both)
    assert torch.equal(one, two)


def test_without_a_capacity_nothing_is_dropped_or_said(runs):
    """Negative control: the two are different runs."""
    folder, _ = runs
    plain, tight = (out_of(folder, 1, case) for case in ("plain", "tight"))
    assert all("experts/dropped_share" not in line for line in toy_run.metrics(plain))
    assert disagreements(tight, plain, CLOSE)
