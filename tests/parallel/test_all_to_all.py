"""Tokens to experts on other ranks and back, on real gloo ranks, against one process."""

import pytest
import torch
from harness import run_ranks
from torch import Tensor, distributed

from moe.kernels import ops
from moe.parallel.exchange import AllToAll

EXPERTS, HIDDEN, INNER, K = 8, 16, 8, 3
CASES = ("balanced", "skewed", "one expert", "a rank without tokens", "no token at all")


def tokens_of(case: str, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, indices and weights of one rank: its own draw, whichever ranks there are."""
    draw = torch.Generator().manual_seed(rank)
    count = {"a rank without tokens": 0 if rank == 1 else 9, "no token at all": 0}.get(case, 11)
    scores = torch.rand(count, EXPERTS, generator=draw)
    if case == "skewed":
        scores += torch.linspace(0, 1.5, EXPERTS)
    indices = scores.topk(K).indices
    if case == "one expert":
        indices = torch.full((count, 1), 5)
    x = torch.randn(count, HIDDEN, generator=draw, dtype=torch.float64)
    return x, indices, torch.rand(indices.shape, generator=draw, dtype=torch.float64)


def weights_of() -> list[Tensor]:
    draw = torch.Generator().manual_seed(99)
    shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    return [torch.randn(*s, generator=draw, dtype=torch.float64) for s in shapes]


def direction(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, HIDDEN, dtype=y.dtype).expand_as(y)


def on_a_rank(case: str, broken: bool = False) -> tuple[list[Tensor], int]:
    """This rank's output and gradients, those of its experts, and the rows it sent away."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    x, indices, weights = tokens_of(case, rank, size)
    local = [w.chunk(size)[rank].clone().requires_grad_() for w in weights_of()]
    x, weights = x.requires_grad_(), weights.requires_grad_()
    dispatcher = AllToAll(distributed.group.WORLD, EXPERTS)
    if broken:
        dispatcher.experts = EXPERTS // 2  # negative control: another idea of who holds what
        indices = indices % dispatcher.experts
    y = dispatcher(lambda *g: ops.routed_mlp(g[0], *local, *g[1:]), x, indices, weights)
    found = torch.autograd.grad(y, [x, weights, *local], direction(y))
    return [y.detach(), *found], dispatcher.sent_rows


def at_once(case: str, size: int) -> list[list[Tensor]]:
    """The same by one process: outputs and gradients per rank, the experts' being parts of sums."""
    wide = [w.requires_grad_() for w in weights_of()]
    ranks, sums = [], [torch.zeros_like(w) for w in wide]
    for rank in range(size):
        x, indices, weights = tokens_of(case, rank, size)
        x, weights = x.requires_grad_(), weights.requires_grad_()
        y = ops.routed_mlp(x, *wide, indices, weights)
        dx, dweights, *rest = torch.autograd.grad(y, [x, weights, *wide], direction(y))
        ranks.append([y.detach(), dx, dweights])
        for total, part in zip(sums, rest, strict=True):
            total += part
    return [[*found, *(s.chunk(size)[r] for s in sums)] for r, found in enumerate(ranks)]


def on_every_case() -> dict[str, tuple[list[Tensor], int]]:
    return {case: on_a_rank(case) for case in CASES}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_are_those_of_one_process(size):
    """And what travels is a row per token and other rank that holds one of its experts."""
    ranks = run_ranks(on_every_case, size)
    for case in CASES:
        expected = at_once(case, size)
        for rank, results in enumerate(ranks):
            found, sent = results[case]
            for actual, wanted in zip(found, expected[rank], strict=True):
                assert (actual - wanted).norm() <= 1e-12 * wanted.norm().clamp(min=1e-6), case
            owners = tokens_of(case, rank, size)[1] // (EXPERTS // size)
            assert sent == sum(len(set(row.tolist()) - {rank}) for row in owners), case


def test_ranks_that_disagree_about_experts_are_found():
    expected = at_once("balanced", 2)
    found = run_ranks(on_a_rank, 2, "balanced", True)
    assert (found[0][0][0] - expected[0][0]).norm() > 0.1 * expected[0][0].norm()
