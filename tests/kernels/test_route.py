"""Routing by Triton against its specification, and what hangs on it: ties, gradients, plans."""

import pytest
import torch
from torch import Tensor

from moe.kernels import ops
from moe.kernels.route import naive
from moe.kernels.route import op as route_op
from moe.kernels.route import triton as kernels
from moe.model.losses import measure, summed

SHAPES = {  # T, E, K
    "even": (64, 8, 2),
    "odd": (37, 5, 3),
    "one token": (1, 4, 2),
    "no tokens": (0, 4, 2),
    "every expert": (19, 4, 4),
    "one expert": (9, 1, 1),
    "many experts": (50, 96, 8),
    "fewer pairs than experts": (3, 16, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
scores = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "triton")


def draw(shape, dtype=torch.float32, skew=2.0) -> Tensor:
    tokens, experts, _ = shape
    return torch.randn(tokens, experts, dtype=dtype) + torch.linspace(skew, -skew, experts).to(
        dtype
    )


def specification(logits, k, score, renormalise, scale, bias, valid):
    """What the model does without Triton: weights, indices, load."""
    found = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    indices = naive.select_top_k(logits if bias is None else found + bias, k)
    weights = scale * naive.weigh(found, indices, renormalise)
    probability = found if score == "softmax" else found / (found.sum(-1, keepdim=True) + 1e-20)
    return weights, indices, measure(probability, indices, valid, "unit", None, logits)


@shapes
@scores
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias and padding"])
def test_choice_weights_load_and_gradient_are_the_specifications(shape, score, renormalise, extras):
    tokens, experts, k = shape
    logits = draw(shape, torch.float64).requires_grad_()
    bias = torch.randn(experts, dtype=torch.float64) if extras else None
    valid = torch.rand(tokens) < 0.7 if extras else None
    given = logits, k, score, renormalise, 1.5, bias, valid
    routed = ops.route(*given)
    weights, indices, load = specification(*given)
    assert torch.equal(routed.indices_TK, indices)
    found = summed(routed, k, None)
    for name, actual, expected in (
        ("weights", routed.weights_TK, weights),
        *((n, getattr(found, n), getattr(load, n)) for n in load._fields),
    ):
        torch.testing.assert_close(
            actual, expected, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
    direction = torch.randn_like(weights)
    gradients = [
        torch.autograd.grad((w * direction).sum() + 0.7 * l.balance + 0.3 * l.z, logits)[0]
        for w, l in ((routed.weights_TK, found), (weights, load))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
    assert tokens == 0 or k == experts == 1 or gradients[0].norm() > 0


@shapes
def test_float32_is_as_good(shape):
    logits = draw(shape)
    routed = ops.route(logits, shape[2], "softmax", True)
    weights, indices, _ = specification(logits.double(), shape[2], "softmax", True, 1.0, None, None)
    assert torch.equal(routed.indices_TK, indices)
    torch.testing.assert_close(routed.weights_TK.double(), weights, rtol=1e-6, atol=1e-7)


@shapes
@pytest.mark.parametrize("skew", [0.0, 2.0, 50.0])
def test_the_plan_is_a_stable_sort(shape, skew):
    _, experts, k = shape
    routed = ops.route(draw(shape, skew=skew), k, "softmax", True)
    expected = naive.plan(routed.indices_TK, experts)
    for plan in (routed.plan, ops.sort_pairs(routed.indices_TK, experts)):
        for name, actual, wanted in zip(plan._fields, plan, expected, strict=True):
            assert torch.equal(actual, wanted), name


def test_pairs_may_name_an_expert_twice_or_none():
    indices = torch.tensor([[1, 1, 3], [3, 0, 1], [2, 3, 3], [1, 2, 0]])
    plan, expected = ops.sort_pairs(indices, 3), naive.plan(indices, 3)
    total = int((indices < 3).sum())
    assert plan.offset_E1[-1] == total and (plan.place_TK[indices == 3] == -1).all()
    for name, actual, wanted in zip(plan._fields, plan, expected, strict=True):
        length = total if name == "pair_P" else None
        assert torch.equal(actual[:length], wanted[:length]), name


@pytest.mark.parametrize("shape", [(4096, 8, 2), (300, 7, 3), (5, 8, 1)], ids=str)
def test_tiles_cover_every_row_once(shape):
    tokens, experts, k = shape
    plan = naive.plan(naive.select_top_k(draw(shape, skew=6.0), k), experts)
    rows, covered = naive.block_rows(tokens * k, experts), []
    for tile in plan.tile_U[plan.tile_U >= 0].tolist():
        start, end = plan.offset_E1[(tile & 0xFFF) : (tile & 0xFFF) + 2].tolist()
        begin = start + (tile >> 12) * rows
        assert begin < end
        covered += range(begin, min(begin + rows, end))
    assert covered == list(range(tokens * k))


@pytest.mark.parametrize("experts", [1, 3, 8, 64])
def test_the_bound_on_tiles_is_never_too_low(experts):
    """And is reached: one row in every expert but one, all the rest in that."""
    for pairs in (0, 1, 7, 64, 1000):
        rows = naive.block_rows(pairs, experts)
        counts = [1] * min(pairs, experts)
        if pairs > experts:
            counts[0] += pairs - experts
        needed = sum(-(-count // rows) for count in counts)
        assert needed == naive.tile_bound(pairs, experts, rows)


@scores
def test_ties_and_what_is_no_number(score):
    logits = torch.zeros(3, 6)
    logits[1, 2:4] = torch.nan
    logits[2] = -torch.inf
    logits[2, 5] = 1.0
    chosen = ops.route(logits, 3, score, True).indices_TK.tolist()
    assert chosen == [[0, 1, 2], [2, 3, 0], [5, 0, 1]]
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, torch.inf, -torch.nan, torch.nan]])
    if score == "softmax":  # a score beside an infinite one is none
        chosen = ops.route(logits, 2, score, True).indices_TK.tolist()
        assert chosen == [[0, 1], [1, 2]]


def test_one_run_and_many_agree(monkeypatch):
    """However tokens are divided among programs, sums apart, which are added in another order."""
    logits, shape = draw((300, 8, 2)), (300, 8, 2)
    few = ops.route(logits, shape[2], "softmax", True)
    monkeypatch.setattr(kernels, "num_processors", lambda device: 9)
    many = ops.route(logits, shape[2], "softmax", True)
    for name in ("weights_TK", "indices_TK", "chosen_E"):
        assert torch.equal(getattr(few, name), getattr(many, name)), name
    assert all(torch.equal(a, b) for a, b in zip(few.plan, many.plan, strict=True))


MUTATIONS = {
    "weights of the next choice": lambda w, i, s, p: (w.roll(1, 1), i, s, p),
    "an expert off by one": lambda w, i, s, p: (w, (i + 1) % 8, s, p),
    "padding counted": lambda w, i, s, p: (w, i, s * 1.01, p),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(mutation, monkeypatch):
    route = kernels.route
    monkeypatch.setattr(kernels, "route", lambda *given: MUTATIONS[mutation](*route(*given)))
    with pytest.raises(AssertionError):
        test_choice_weights_load_and_gradient_are_the_specifications(
            SHAPES["even"], "softmax", True, True
        )


def test_a_gradient_that_forgets_the_losses_is_found(monkeypatch):
    backward = kernels.route_backward
    monkeypatch.setattr(
        kernels, "route_backward", lambda dw, ds, *rest: backward(dw, torch.zeros_like(ds), *rest)
    )
    with pytest.raises(AssertionError):
        test_choice_weights_load_and_gradient_are_the_specifications(
            SHAPES["even"], "softmax", True, False
        )


@scores
def test_opcheck(score):
    logits = draw(SHAPES["odd"]).requires_grad_()
    given = logits, None, None, 3, score == "sigmoid", True, 1.0
    torch.library.opcheck(torch.ops.moe.route.default, given)
    torch.library.opcheck(torch.ops.moe.plan.default, (torch.randint(0, 5, (7, 2)), 5))


def test_wrong_inputs_are_refused_in_words():
    logits = torch.randn(4, 6)
    with pytest.raises(ValueError, match="top-k 7 of 6 experts: use 1 to 6"):
        ops.route(logits, 7, "softmax", True)
    with pytest.raises(ValueError, match=r"route's bias is \(5,\), expected \(6,\)"):
        ops.route(logits, 2, "softmax", True, bias_E=torch.zeros(5))
    with pytest.raises(ValueError, match=r"route's valid is \(3,\), expected \(4,\)"):
        ops.route(logits, 2, "softmax", True, valid_T=torch.ones(3))
    with pytest.raises(ValueError, match="5000 experts: the kernels take at most 4096"):
        ops.route(torch.randn(2, 5000), 2, "softmax", True)
    with pytest.raises(ValueError, match="indices go from 0 to 9"):
        route_op.plan(torch.tensor([[0, 9]]), 6)
