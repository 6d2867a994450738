"""Attention over the heads that are on, on a CPU, against its specification in float64."""

import pytest
import torch
from test_heads import NAMES, SHAPES, SLOW, assert_close, case, results

from moe.kernels import ops
from moe.kernels.heads import cpu, naive


@pytest.fixture
def on_cpu(monkeypatch):
    """torch's own attention, small runs of rows, three KV heads at a time."""
    monkeypatch.setenv("MOE_KERNELS", "cpu")
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.parametrize("mask", ["causal", "window", *SLOW])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_cpu_leaves_heads_out_too(shape, keep, mask, on_cpu):
    assert_close(case(shape, mask, keep), 1e-12)
    assert_close(case(shape, mask, keep, torch.float32), 1e-6, gated=False)


def test_a_cpu_with_uneven_heads(on_cpu):
    given = case(SHAPES["grouped"])
    given["on"] = torch.rand(2, 70, 4) < torch.tensor([1.0, 0.9, 0.1, 0.0])
    given["on"][1, :, 2:] = False
    assert_close(given, 1e-12)
    found = results(ops.attend_heads, given)
    for name in ("out", "dq", "dgate"):
        assert found[name][~given["on"]].abs().sum() == 0, name


def test_a_broken_run_on_a_cpu_is_found(on_cpu, monkeypatch):
    runs = cpu.runs

    def one_less(*given):
        return list(runs(*given))[1:]

    def a_key_more(*given):
        return [r._replace(mask=r.mask.roll(1, -1)) for r in runs(*given)]

    for broken in (one_less, a_key_more):
        monkeypatch.setattr(cpu, "runs", broken)
        with pytest.raises(AssertionError):
            assert_close(case(SHAPES["grouped"], keep=2), 1e-12)


def test_opcheck_on_a_cpu(on_cpu):
    given = case(SHAPES["grouped"], keep=2, dtype=torch.float32)
    leaves = [given[n].requires_grad_() for n in ("q", "k", "v", "gate")]
    arguments = *leaves, given["on"], given["first"], 0.25
    torch.library.opcheck(torch.ops.moe.attend_some_heads.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cpu_in_short_dtypes(dtype, on_cpu):
    given = case(SHAPES["grouped"], keep=2, dtype=dtype)
    exact = results(naive.attend_heads, given, torch.float64)
    plain, ours = results(naive.attend_heads, given), results(ops.attend_heads, given)
    for name in NAMES:
        errors = [(r[name].double() - exact[name]).norm() for r in (ours, plain)]
        assert errors[0] <= 1.5 * errors[1], name
