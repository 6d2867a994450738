"""Projections of the heads that are on, on a CPU, against their specification."""

import pytest
import torch

from moe.kernels import ops
from moe.kernels.heads import naive, projecting

TOKENS, HIDDEN, HEADS, SIZE = 40, 12, 5, 4


def case(dtype=torch.float64, bias: bool = True, tokens: int = TOKENS):
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, HIDDEN), torch.randn(HEADS * SIZE, HIDDEN)
    b = torch.randn(HEADS * SIZE).to(dtype) if bias else None
    on = torch.rand(tokens, HEADS) < torch.tensor([1.1, 0.7, 0.3, 0.05, -1.0])  # all … none
    return x.to(dtype), weight.to(dtype), b, on


def results(project, x, weight, bias, on) -> list[torch.Tensor]:
    """Output and gradients of a weighted sum."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    b = leaves[2] if bias is not None else None
    out = project(leaves[0], leaves[1], b, on)
    wanted = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * wanted).sum(), leaves)]


def assert_same(given, tolerance: float) -> None:
    found, expected = results(ops.project_heads, *given), results(naive.project_heads, *given)
    for name, actual, due in zip(("out", "dx", "dweight", "dbias"), found, expected, strict=False):
        assert actual.dtype == due.dtype and actual.shape == due.shape, name
        off = (actual - due).double().norm() / due.double().norm()
        assert off < tolerance, (name, off)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_projections_and_gradients(tokens, bias):
    assert_same(case(bias=bias, tokens=tokens), 1e-12)
    assert_same(case(torch.float32, bias, tokens), 1e-5)
    assert_same(case(torch.bfloat16, bias, tokens), 2e-2)


def test_what_is_off_is_exactly_zero_and_gives_no_gradient():
    x, weight, bias, on = case()
    out, dx, dweight, dbias = results(ops.project_heads, x, weight, bias, on)
    assert not out[~on].any() and out[on].all()
    assert not dweight.view(HEADS, -1)[4].any() and not dbias.view(HEADS, -1)[4].any()
    nothing = results(ops.project_heads, x, weight, bias, torch.zeros_like(on))
    assert not any(t.any() for t in nothing)
    x[on.sum(1) == on.sum(1).min()] = torch.nan  # what no head wants is not read
    on[x.isnan().any(1)] = False
    assert ops.project_heads(x, weight, bias, on).isfinite().all()
    assert dx.isfinite().all()


def test_a_broken_run_is_found(monkeypatch):
    """Negative controls."""
    runs = projecting.runs
    for broken in (
        lambda on: list(runs(on))[1:],
        lambda on: [(h, slice(None)) for h, _ in runs(on)],
    ):
        monkeypatch.setattr(projecting, "runs", broken)
        with pytest.raises(AssertionError):
            assert_same(case(), 1e-12)


def test_autocast_takes_a_matmuls_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.project_heads(*case(torch.float32))
    assert out.dtype == torch.bfloat16
    x, weight, bias, on = (t if t.dtype == torch.bool else t.bfloat16() for t in case())
    torch.testing.assert_close(out, naive.project_heads(x, weight, bias, on), rtol=2e-2, atol=2e-2)


def test_opcheck():
    x, weight, bias, on = case(torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.moe.project_heads.default, (*leaves, on))


def test_shapes_and_dtypes_that_disagree():
    x, weight, bias, on = case()
    for given, said in (
        ((x[:, 1:], weight, bias, on), "shapes disagree"),
        ((x, weight, bias, on[1:]), "shapes disagree"),
        ((x, weight[1:], None, on), "shapes disagree"),
        ((x, weight, bias[1:], on), r"expected \(20,\)"),
        ((x, weight, bias, on.long()), "not bool"),
        ((x.float(), weight, bias, on), "dtypes differ"),
    ):
        with pytest.raises(ValueError, match=said):
            ops.project_heads(*given)


def test_when_it_pays(monkeypatch):
    """From a number of rows on, or for one token that reads large weights; never on a GPU."""
    cpu, large = torch.device("cpu"), ops.HEAD_WEIGHTS
    assert ops.projection_share(cpu, ops.PROJECTION_ROWS, 1) == ops.PROJECTION_SHARE
    assert ops.projection_share(cpu, ops.PROJECTION_ROWS - 1, large) == 0
    assert ops.projection_share(cpu, 1, large) == ops.SINGLE_SHARE
    assert ops.projection_share(cpu, 1, large - 1) == 0
    assert ops.projection_share(torch.device("cuda"), 10**6, large) == 0
    monkeypatch.setenv("MOE_KERNELS", "naive")
    assert ops.projection_share(cpu, 10**6, large) == 0
