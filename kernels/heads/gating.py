"""Triton kernels of a gate per (token, head) on head outputs that are there already.

R rows, one per (token, head); D head size (DP: the next power of 2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import device
from moe.kernels.routed_mlp.gemm import narrow


@triton.jit(do_not_specialize=["R"])
def gate_rows(
    heads, gate, out, R, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [R, D] = gate [R] · heads."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, DP)
    inside = (row < R)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    weight = tl.load(gate + row, mask=row < R, other=0).to(ACC)
    product = tl.load(heads + at, mask=inside, other=0).to(ACC) * weight[:, None]
    tl.store(out + at, narrow(product, out.dtype.element_ty, UPCAST), mask=inside)


@triton.jit(do_not_specialize=["R"])
def ungate_rows(
    dout, heads, gate, dheads, dgate, R, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dheads [R, D] = gate · dout and dgate [R] = <dout, heads>, in one pass."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, DP)
    inside = (row < R)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    gradient = tl.load(dout + at, mask=inside, other=0).to(ACC)
    product = tl.sum(gradient * tl.load(heads + at, mask=inside, other=0).to(ACC), 1)
    tl.store(dgate + row, product.to(dgate.dtype.element_ty), mask=row < R)
    gradient *= tl.load(gate + row, mask=row < R, other=0).to(ACC)[:, None]
    tl.store(dheads + at, narrow(gradient, dheads.dtype.element_ty, UPCAST), mask=inside)


def forward(heads: Tensor, gate: Tensor) -> Tensor:
    """Of contiguous heads [..., D] and gate [...]."""
    out = torch.empty_like(heads)
    if out.numel():
        grid, arguments = _launch(heads)
        gate_rows[grid](heads, gate, out, gate.numel(), **arguments)
    return out


def backward(dout: Tensor, heads: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of heads and gate."""
    dheads, dgate = torch.empty_like(heads), torch.empty_like(gate)
    if dheads.numel():
        grid, arguments = _launch(heads)
        ungate_rows[grid](dout, heads, gate, dheads, dgate, gate.numel(), **arguments)
    return dheads, dgate


def _launch(heads: Tensor) -> tuple[tuple[int], dict]:
    size = heads.shape[-1]
    wide = triton.next_power_of_2(size)
    rows = max(1, 4096 // wide)
    grid = (triton.cdiv(heads.numel() // size, rows),)
    upcast, acc = device.upcast(heads.dtype), device.accumulator(heads.dtype)
    return grid, {"D": size, "DP": wide, "BR": rows, "UPCAST": upcast, "ACC": acc, "num_warps": 4}
