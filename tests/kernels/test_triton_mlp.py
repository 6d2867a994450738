"""The routed MLP in Triton beyond what all backends share: layouts, sizes, mutations, offsets."""

import re
from pathlib import Path

import pytest
import torch
from test_routed_mlp import NAMES, SHAPES, assert_close, case, reference, results
from torch import Tensor

from moe.kernels import ops
from moe.kernels.route import naive as route_naive
from moe.kernels.routed_mlp import gemm, gradients, naive, triton

EDGES = {  # T, H, I, E, K: tiles of 64 columns, and of 16 rows or more
    "sizes off the tiles": (37, 72, 70, 3, 2),
    "less than a tile each way": (5, 8, 4, 3, 2),
    "several tiles each way": (150, 136, 130, 2, 1),
    "fewer pairs than experts": (3, 16, 8, 16, 2),
    "experts no power of 2": (60, 16, 8, 7, 3),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "triton")


@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("skew", [None, 1], ids=["mixed", "skewed"])
def test_sizes_off_the_tiles(shape, skew):
    inputs = case(shape, skew=skew)
    assert_close(results(ops.routed_mlp, inputs), reference(inputs), 1e-6)


@pytest.mark.parametrize("shape", [(7, 6, 3, 3, 2), (5, 4, 5, 2, 1)], ids=str)
def test_gradcheck_in_float64(shape):
    inputs = case(shape, torch.float64)
    leaves = [inputs[n].requires_grad_() for n in ("x", "w1", "w2", "weights")]

    def function(x, w1, w2, weights):
        return ops.routed_mlp(x, w1, w2, inputs["indices"], weights)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_are_as_close_as_plain_torch(dtype):
    inputs = case((60, 32, 24, 4, 2), dtype)
    expected, plain = reference(inputs), results(naive.routed_mlp, inputs)
    actual = results(ops.routed_mlp, inputs)
    for name in NAMES:
        errors = [(t[name].double() - expected[name]).norm() for t in (actual, plain)]
        assert errors[0] <= 1.5 * errors[1], name


@pytest.mark.parametrize("backend", ["triton", "naive", "cpu", "grouped_mm"])
def test_h_that_is_computed_again_is_the_same(backend, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", backend)
    inputs = case(SHAPES["even"])
    if backend == "grouped_mm":  # which takes no float64
        inputs = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}

    def frugal(*given: Tensor) -> Tensor:
        return ops.routed_mlp(*given, recompute_h=True)

    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        again = results(frugal, inputs)
    first = results(ops.routed_mlp, inputs)
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert 48 * 2 * 16 not in kept  # P · 2I: h


def test_weights_may_lie_either_way_round_and_gate_and_up_alternate():
    """As gpt-oss has them: [E, H, 2I], gate and up by turns."""
    inputs = case((40, 16, 8, 4, 2))
    x, w1, w2, weights, dy = (inputs[n] for n in ("x", "w1", "w2", "weights", "dy"))
    order = torch.stack([torch.arange(8), torch.arange(8) + 8], 1).flatten()
    other = w1[:, order].transpose(1, 2).contiguous().transpose(1, 2)
    plan = ops.sort_pairs(inputs["indices"], 4)
    layout = ops.Layout(interleaved=True)
    y, h = triton.forward(x, other, w2, weights, plan, layout)
    found = triton.backward(dy, x, other, w2, weights, plan, h, True, True, layout)[:4]
    assert found[1].stride() == other.stride()
    expected = reference(inputs)
    expected["dw1"] = expected["dw1"][:, order]
    assert_close(dict(zip(NAMES, (y, *found), strict=True)), expected, 1e-6)


def test_gradients_are_added_to_main_gradients():
    inputs = case(SHAPES["even"], torch.float16)
    x, w1, w2, weights, dy = (inputs[n] for n in ("x", "w1", "w2", "weights", "dy"))
    plan = ops.sort_pairs(inputs["indices"], 4)
    main = torch.ones(w1.shape), torch.ones(w2.shape)
    h = triton.forward(x, w1, w2, weights, plan)[1]
    found = triton.backward(dy, x, w1, w2, weights, plan, h, False, True, main_grads=main)
    assert found[1].numel() == found[2].numel() == 0
    expected = reference(inputs)
    for name, gradient in zip(("dw1", "dw2"), main, strict=True):
        error = (gradient.double() - 1 - expected[name]).norm() / expected[name].norm()
        assert error < 2e-3, name  # h and dh are in float16


def test_every_row_is_written(monkeypatch):
    """Memory that comes back uninitialised holds nan here, so what is left out is seen."""
    empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size, **options) -> Tensor:
        made = empty(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-(2**30))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t, **o: poisoned(t, t.shape, **o))
    inputs = case((41, 24, 20, 6, 2), skew=2)
    x, w1, w2, weights, dy = (inputs[n] for n in ("x", "w1", "w2", "weights", "dy"))
    plan = ops.sort_pairs(inputs["indices"], 6)
    y, h = triton.forward(x, w1, w2, weights, plan)
    found = triton.backward(dy, x, w1, w2, weights, plan, h, True, True)[:4]
    monkeypatch.undo()
    assert_close(dict(zip(NAMES, (y, *found), strict=True)), reference(inputs), 1e-6)


SWAPPED = "return up / (1 + tl.exp(-ALPHA * up)) * gate"
MUTATIONS = {  # name: file, what stands there, what is put in its place (within bounds of memory)
    "gate and up swapped": (gemm, "return gate / (1 + tl.exp(-ALPHA * gate)) * up", SWAPPED),
    "a dropped tile": (gemm, "if tile >= 0:", "if tile > 0:"),
    "the first part of K alone": (
        gemm,
        "for k in range(0, depth, BK):",
        "for k in range(0, BK, BK):",
    ),
    "unweighed": (gemm, "act *= tl.load", "act *= 1 + 0 * tl.load"),
    "another token": (gemm, "(pair // K).to", "(pair // (2 * K)).to"),
    "a row too few": (gemm, "for k in tl.static_range(K):", "for k in tl.static_range(K - 1):"),
    "a quarter of the parts": (gradients, "part += _through", "part = _through"),
    "silu's derivative": (gradients, "(sigmoid + ALPHA * silu * (1 - sigmoid))", "sigmoid"),
    "an expert's last rows": (gradients, "range(start, end, BK)", "range(start, end - BK, BK)"),
    "another token's gradient": (gradients, "other=0) // K", "other=0) // (2 * K)"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(mutation, monkeypatch, tmp_path):
    module, there, instead = MUTATIONS[mutation]
    text = Path(module.__file__).read_text()
    assert there in text
    text = text.replace(there, instead)
    if module is gemm:  # the backward kernels take their helpers from the broken file too
        path = tmp_path / "broken_gemm.py"
        path.write_text(text)
    else:
        path = tmp_path / "broken_gradients.py"
        path.write_text(text)
    broken: dict = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(text, path, "exec"), broken)
    for name, kernel in broken.items():
        if hasattr(kernel, "fn") and hasattr(module, name):
            monkeypatch.setattr(module, name, kernel)
    inputs = case((100, 80, 72, 3, 2))
    with pytest.raises((AssertionError, IndexError)):
        assert_close(results(ops.routed_mlp, inputs), reference(inputs), 1e-6)


def test_offsets_of_rows_are_in_64_bits():
    """P · D, E · D · H and T · H go past 2³¹ in models that are trained today: 128 experts of 14336
    by 4096 have 1.5e10 weights. Rows and experts must have been widened before such a product.
    """
    long = re.compile(r"\b(row|pair // K|token|expert|left_row|right_row)\b[^\n]*\.to\(tl\.int64\)")
    steps = ["x_step", "dy_step", "w_expert", "left_step", "right_step", "dw_expert"]
    for module in (gemm, gradients):
        for line in Path(module.__file__).read_text().splitlines():
            used = [s for s in steps if f"* {s}" in line]
            if used:
                widened = long.search(line) or "left_row" in line or "right_row" in line
                assert widened or "expert * w_expert" in line, line
    # rows_of widens the expert once, for all that is multiplied by it
    assert "return expert.to(tl.int64)" in Path(gemm.__file__).read_text()


@pytest.mark.parametrize("experts", [8, 128, 4096])
def test_a_tile_has_room_for_all_rows_in_one_expert(experts):
    """A tile is 31 bits: 12 for the expert, 19 for the block of its rows."""
    pairs = 2**25  # of 4 million tokens, top-8
    rows = route_naive.block_rows(pairs, experts)
    assert rows == 128
    last = (experts - 1) | (pairs // rows - 1) << route_naive.EXPERT_BITS
    assert last < 2**31 and last & 0xFFF == experts - 1
    assert route_naive.tile_bound(pairs, experts, rows) < 2**31


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clamped_activations_and_biases_as_gpt_oss_has_them(dtype):
    """Half of what goes in is past the limit, so that both branches of the gradient are used."""
    inputs = case((40, 16, 8, 4, 2), dtype)
    inputs["w1"] *= 2
    layout, bias = (
        ops.Layout(interleaved=True, limit=1.5, alpha=1.702),
        torch.randn(4, 16).to(dtype),
    )
    found = []
    for function, wide in ((ops.routed_mlp, dtype), (naive.routed_mlp, torch.float64)):
        leaves = [
            t.to(wide).requires_grad_()
            for t in (*(inputs[n].detach() for n in ("x", "w1", "w2", "weights")), bias.detach())
        ]
        x, w1, w2, weights, b = leaves
        y = function(x, w1, w2, inputs["indices"], weights, layout=layout, **{
            "bias" if function is ops.routed_mlp else "bias_ED": b})  # fmt: skip
        found.append([y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"].to(wide))])
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for name, actual, expected in zip((*NAMES, "dbias"), *found, strict=True):
        assert ((actual - expected).norm() / expected.norm()) < bound, name
    gate = naive.routed_mlp  # negative control: without the clamp it is another function
    other = gate(x, w1, w2, inputs["indices"], weights, ops.Layout(True, 0.0, 1.702), b)
    assert ((other - found[1][0]).norm() / found[1][0].norm()) > 0.1


def test_bad_input_is_refused_before_a_launch():
    inputs = case(SHAPES["even"])
    x, w1, w2, indices, weights = (inputs[n] for n in ("x", "w1", "w2", "indices", "weights"))
    good = x, w1, w2, indices, weights
    wrong = torch.zeros(len(w1), w1.shape[1] + 2, dtype=x.dtype)
    plan = ops.sort_pairs(indices[:-1], len(w1))
    for message, call in {
        r"expected \[E, 2I\]": lambda: ops.routed_mlp(*good, bias=wrong),
        "a plan of": lambda: ops.routed_mlp(*good, plan),
        "not int64": lambda: ops.routed_mlp(*good[:3], indices.float(), weights),
        "shapes disagree": lambda: ops.routed_mlp(x, w1[:, 1:], w2, indices, weights),
        "tensors are on cpu and meta": lambda: ops.routed_mlp(*good[:4], weights.to("meta")),
        "score 'tanh'": lambda: ops.route(torch.zeros(3, 4), 1, "tanh", True),
        "float32 or float64": lambda: ops.route(torch.zeros(3, 4).half(), 1, "softmax", True),
        "indices are torch.float32": lambda: ops.sort_pairs(torch.zeros(3, 1), 4),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_bias_may_lie_anyhow():
    inputs = case(SHAPES["even"])
    good = [inputs[n] for n in ("x", "w1", "w2", "indices", "weights")]
    bias = torch.randn(good[1].shape[1], len(good[1]), dtype=good[0].dtype).t()
    expected = naive.routed_mlp(*good, ops.Layout(), bias)
    assert (ops.routed_mlp(*good, bias=bias) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["routed_mlp", "attend_heads", "gate_heads", "pack"])
def test_one_graph_under_compile(name):
    """No break where Triton is looked for, and every launch within an operator."""
    x, w1, w2 = torch.randn(9, 16), torch.randn(4, 16, 16), torch.randn(4, 16, 8)
    q, k, first = torch.randn(2, 12, 4, 16), torch.randn(2, 12, 2, 16), torch.zeros(2, 12).int()
    gate, indices, weights = torch.rand(2, 12, 4), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    calls = {
        "routed_mlp": lambda x: ops.routed_mlp(x, w1, w2, indices, weights),
        "attend_heads": lambda x: ops.attend_heads(x, k, k, first, 0.25, gate, gate > 0.5, 96),
        "gate_heads": lambda x: ops.gate_heads(x, gate),
        "pack": lambda x: ops.pack(x, indices, weights, 4, 2).rows_NH,
    }
    given = q if name in ("attend_heads", "gate_heads") else x
    found = []
    for run in (calls[name], torch.compile(calls[name], fullgraph=True, backend="aot_eager")):
        leaf = given.clone().requires_grad_()
        y = run(leaf)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
