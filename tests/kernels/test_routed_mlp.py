"""The routed MLP's backends against its specification in float64, and what must never happen."""

import os

import pytest
import torch
from torch import Tensor

from moe.kernels import ops
from moe.kernels.routed_mlp import cpu, grouped_mm, naive

NAMES = ("y", "dx", "dw1", "dw2", "dweights")
SHAPES = {  # T, H, I, E, K
    "even": (48, 16, 8, 4, 2),
    "one token": (1, 16, 8, 4, 2),
    "no tokens": (0, 16, 8, 4, 2),
    "top-1": (33, 16, 24, 5, 1),
    "every expert": (17, 32, 8, 4, 4),
    "one expert": (9, 16, 8, 1, 1),
    "many experts": (40, 16, 8, 64, 8),
}


def case(shape, dtype=torch.float32, skew: int | None = None, seed=0) -> dict[str, Tensor]:
    """Inputs at a scale that makes y of O(1); `skew` sends every token to that expert first."""
    tokens, hidden, inner, experts, k = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    scores = torch.rand(tokens, experts, generator=generator)
    if skew is not None:
        scores[:, skew] += 1
    indices = ops.select_top_k(scores, k)
    weights = ops.weigh(scores.softmax(-1), indices, True)
    return {
        "x": draw(tokens, hidden),
        "w1": draw(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "w2": draw(experts, hidden, inner, scale=2 * inner**-0.5),
        "indices": indices,
        "weights": weights.to(torch.promote_types(dtype, torch.float32)),
        "dy": draw(tokens, hidden),
    }


def results(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient of sum(y · dy)."""
    leaves = [inputs[n].detach().clone().requires_grad_() for n in ("x", "w1", "w2", "weights")]
    x, w1, w2, weights = leaves
    y = function(x, w1, w2, inputs["indices"], weights)
    return dict(
        zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])), strict=True)
    )


def reference(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    return results(naive.routed_mlp, wide)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Relative Frobenius and maximum error of each named tensor."""
    for name in NAMES:
        a, e = actual[name].double(), expected[name]
        if e.numel() == 0:
            assert a.shape == e.shape, name
            continue
        frobenius = ((a - e).norm() / e.norm().clamp(min=1e-12)).item()
        largest = ((a - e).abs().max() / e.abs().max().clamp(min=1e-12)).item()
        assert max(frobenius, largest) <= bound, f"{name}: {frobenius:.1e} {largest:.1e} > {bound}"


def with_backend(name: str):
    def run(*inputs: Tensor) -> Tensor:
        os.environ["MOE_KERNELS"] = name
        try:
            return ops.routed_mlp(*inputs)
        finally:
            del os.environ["MOE_KERNELS"]

    return run


every = pytest.mark.parametrize("backend", ["cpu", "grouped_mm", "triton"])
both = pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])


@every
@pytest.mark.parametrize("skew", [None, 0, -1], ids=["mixed", "first", "last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_equals_the_specification(backend, shape, skew):
    inputs = case(shape, skew=skew)
    assert_close(results(with_backend(backend), inputs), reference(inputs), 1e-6)


@every
@pytest.mark.parametrize("shape", [SHAPES["even"], SHAPES["many experts"]], ids=str)
def test_bfloat16_is_as_close_as_plain_torch_in_bfloat16(backend, shape):
    inputs = case(shape, torch.bfloat16)
    expected = reference(inputs)
    plain = results(naive.routed_mlp, inputs)
    actual = results(with_backend(backend), inputs)
    for name in NAMES:
        scale = expected[name].norm()
        yardstick = (plain[name].double() - expected[name]).norm() / scale
        error = (actual[name].double() - expected[name]).norm() / scale
        assert error <= 1.5 * yardstick, f"{name}: {error:.1e} > 1.5 · {yardstick:.1e}"


@pytest.mark.parametrize("shape", [(7, 6, 3, 3, 2), (5, 4, 5, 2, 1)], ids=str)
def test_gradcheck_in_float64(shape):
    inputs = case(shape, torch.float64)
    names = ("x", "w1", "w2", "weights")
    x, w1, w2, weights = (inputs[n].requires_grad_() for n in names)
    assert ops.backend(x, w1, w2, shape[4]) == "cpu"  # grouped_mm takes neither dtype nor sizes

    def function(x, w1, w2, weights):
        return ops.routed_mlp(x, w1, w2, inputs["indices"], weights)

    assert torch.autograd.gradcheck(function, (x, w1, w2, weights))


MUTATIONS = {
    "zero output": lambda y, h: (torch.zeros_like(y), h),
    "dropped row": lambda y, h: (torch.cat([y[:-1], torch.zeros_like(y[-1:])]), h),
    "gate and up swapped": lambda y, h: (y, torch.cat(h.chunk(2, -1)[::-1], -1)),
    "stale h": lambda y, h: (y, h * 1.01),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(mutation, monkeypatch):
    """Negative controls: each must break the comparison above."""
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *inputs: MUTATIONS[mutation](*forward(*inputs)))
    inputs = case(SHAPES["even"])
    with pytest.raises(AssertionError):
        assert_close(results(with_backend("cpu"), inputs), reference(inputs), 1e-6)


def test_swapped_experts_are_found():
    inputs = case(SHAPES["even"])
    expected = reference(inputs)
    inputs["w2"] = inputs["w2"].flip(0)
    with pytest.raises(AssertionError):
        assert_close(results(with_backend("cpu"), inputs), expected, 1e-6)


@every
def test_experts_without_tokens_get_exactly_zero_gradient(backend):
    inputs = case((6, 16, 8, 8, 1), skew=3)
    gradients = results(with_backend(backend), inputs)
    others = [e for e in range(8) if e != 3]
    assert gradients["dw1"][others].abs().sum() == 0 and gradients["dw2"][others].abs().sum() == 0
    assert gradients["dw1"][3].abs().sum() > 0


@pytest.mark.parametrize("backend", ["naive", "cpu", "grouped_mm", "triton"])
def test_pairs_without_an_expert_add_nothing_and_get_nothing(backend):
    """An index of E, as ranks give the pairs of others; what lies in such a token does not leak."""
    inputs = case((40, 16, 8, 4, 3))
    inputs["indices"][:, 1] = torch.where(torch.arange(40) % 3 == 0, 4, inputs["indices"][:, 1])
    inputs["indices"][7] = 4
    expected = reference(inputs)
    if backend != "naive":
        inputs["x"][7] = torch.nan
    actual = results(with_backend(backend), inputs)
    assert_close(actual, expected, 1e-6)
    assert actual["y"][7].abs().sum() == 0 and actual["dx"][7].abs().sum() == 0
    assert actual["dweights"][inputs["indices"] == 4].abs().sum() == 0
    assert actual["dweights"][inputs["indices"] < 4].abs().min() > 0


@every
@pytest.mark.parametrize("index", [-1, 5])
def test_experts_that_do_not_exist_are_refused(backend, index):
    inputs = case(SHAPES["even"])
    inputs["indices"][3, 1] = index
    with pytest.raises(ValueError, match=r"there are 4 experts, 0 to 3, and 4 stands for none"):
        results(with_backend(backend), inputs)


@every
def test_expanded_gradients_and_strided_inputs_are_taken(backend):
    inputs = case(SHAPES["even"])
    wide = torch.randn(48, 32)
    wide[:, ::2] = inputs["x"]
    inputs["x"] = wide[:, ::2]
    inputs["dy"] = torch.ones(()).expand(48, 16)
    assert_close(results(with_backend(backend), inputs), reference(inputs), 1e-6)


@every
def test_backward_twice_over_one_graph(backend):
    inputs = case(SHAPES["even"])
    x = inputs["x"].requires_grad_()
    y = with_backend(backend)(x, inputs["w1"], inputs["w2"], inputs["indices"], inputs["weights"])
    first = torch.autograd.grad(y, x, inputs["dy"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, inputs["dy"])[0])


@every
def test_frozen_parts_get_no_gradient_and_the_rest_is_unchanged(backend):
    inputs = case(SHAPES["even"])
    full = results(with_backend(backend), inputs)
    for trained, name in ((0, "dx"), (1, "dw1"), (3, "dweights")):
        leaves = [inputs[n].detach().clone() for n in ("x", "w1", "w2", "weights")]
        leaves[trained].requires_grad_()
        x, w1, w2, weights = leaves
        y = with_backend(backend)(x, w1, w2, inputs["indices"], weights)
        y.backward(inputs["dy"])
        assert torch.equal(leaves[trained].grad, full[name]), name
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != trained)


@every
def test_results_are_bitwise_repeatable(backend):
    inputs = case((40, 16, 8, 8, 4))
    first = results(with_backend(backend), inputs)
    for _ in range(10):
        again = results(with_backend(backend), inputs)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_only_x_and_h_are_kept_for_backward():
    """Saved bytes per token: 2 inputs and 2I·K of h, not y nor the activation."""
    inputs = case((64, 16, 8, 4, 2))
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        x, w1, w2, weights = (inputs[n].requires_grad_() for n in ("x", "w1", "w2", "weights"))
        ops.routed_mlp(x, w1, w2, inputs["indices"], weights)
    known = {t.untyped_storage().data_ptr() for t in (x, w1, w2, weights, inputs["indices"])}
    assert len(kept - known) == 1  # h


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_experts_at_once_are_the_chosen_ones_where_the_others_weigh_nothing(shape):
    given = case(shape, torch.float64)
    x, w1, w2, indices, weights = (given[n] for n in ("x", "w1", "w2", "indices", "weights"))
    of_all = torch.zeros(len(x), len(w1), dtype=torch.float64).scatter(1, indices, weights)
    expected = naive.routed_mlp(x, w1, w2, indices, weights)
    torch.testing.assert_close(ops.masked_mlp(x, w1, w2, of_all), expected, rtol=1e-12, atol=1e-12)
    if len(x) and shape[3] > 1:
        wrong = ops.masked_mlp(x, w1, w2, of_all.roll(1, 1))
        assert (wrong - expected).norm() > 0.1 * expected.norm()


def test_an_expert_that_overflows_hurts_only_those_that_chose_it():
    given = case(SHAPES["even"])
    x, w1, w2, indices, weights = (given[n] for n in ("x", "w1", "w2", "indices", "weights"))
    of_all = torch.zeros(len(x), len(w1)).scatter(1, indices, weights)
    w1[0] *= 1e30
    y = ops.masked_mlp(x, w1, w2, of_all)
    chosen = of_all[:, 0] > 0
    assert not y[chosen].isfinite().all() and y[~chosen].isfinite().all()
    given = case(SHAPES["even"])
    sound = ops.masked_mlp(x, given["w1"], w2, of_all)
    torch.testing.assert_close(y[~chosen], sound[~chosen])


@torch.no_grad()
def test_when_all_experts_are_run_at_once(monkeypatch):
    many, one = torch.empty(64, 4), torch.empty(1, 4)
    assert ops.masks_pay(many, 0.5, 8) and not ops.masks_pay(many, 0.25, 192)
    assert ops.masks_pay(many, 0.7, 192) and not ops.masks_pay(one, 0.7, 192)
    assert not ops.masks_pay(many.to("meta"), 0.5, 8)
    with torch.enable_grad():
        assert not ops.masks_pay(many, 0.5, 8)
    monkeypatch.setenv("MOE_KERNELS", "naive")
    assert not ops.masks_pay(many, 0.5, 8)


@pytest.mark.parametrize("path", ["cpu", "grouped_mm"])
def test_opcheck(path):
    inputs = case(SHAPES["even"])
    leaves = [inputs[n].requires_grad_() for n in ("x", "w1", "w2")]
    given = (*leaves, inputs["indices"], inputs["weights"].requires_grad_(), path)
    torch.library.opcheck(torch.ops.moe.routed_mlp.default, given)
    torch.library.opcheck(torch.ops.moe.select_top_k.default, (torch.rand(5, 8), 3))


@pytest.mark.slow
def test_compiles_in_float32_and_bfloat16():
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        inputs = case(SHAPES["even"], dtype)
        compiled = torch.compile(ops.routed_mlp, fullgraph=True)
        assert_close(results(compiled, inputs), reference(inputs), bound)


def test_autocast_casts_as_a_matmul_does():
    inputs = case(SHAPES["even"])
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.routed_mlp(*(inputs[n] for n in ("x", "w1", "w2", "indices", "weights")))
    assert y.dtype == torch.bfloat16
    assert (y.double() - reference(inputs)["y"]).norm() / y.double().norm() < 2e-2


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert ops.select_top_k(scores, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(48, 12)}, r"x \[T, H\]"),
        ({"w2": torch.randn(4, 16, 6)}, r"w2 \[E, H, I\]"),
        ({"x": torch.randn(48, 16, dtype=torch.float64)}, "dtypes differ"),
        ({"weights": torch.rand(48, 3)}, r"indices and weights \[T, K\]"),
    ],
)
def test_wrong_inputs_are_refused_in_words(change, words):
    inputs = {**case(SHAPES["even"]), **change}
    with pytest.raises(ValueError, match=words):
        ops.routed_mlp(*(inputs[n] for n in ("x", "w1", "w2", "indices", "weights")))


def test_an_unknown_or_impossible_backend_is_refused():
    odd = case((8, 6, 3, 2, 1))
    for backend, inputs in (("fast", case(SHAPES["even"])), ("grouped_mm", odd)):
        with pytest.raises(ValueError, match="MOE_KERNELS"):
            results(with_backend(backend), inputs)
    assert not grouped_mm.fits(odd["w1"], odd["w2"])
