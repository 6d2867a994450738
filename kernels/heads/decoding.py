"""Triton kernels of attention for one new token per sequence, forward only.

What takes time is reading keys and values, so the KV heads of which no query head is on are not
read, and the keys are cut in parts for as many programs as the device runs at a time; a second
kernel puts the parts together.

B batch, L keys, N query heads, G KV heads, M = N / G (MP: in a tile), D head size (DP: power of 2),
J parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import device
from moe.kernels.heads.attention import _soften
from moe.kernels.routed_mlp.gemm import narrow

LOG2E = 1.4426950408889634
BLOCK = 64  # keys read at a time


@triton.jit
def _mine(on, N: tl.constexpr, G: tl.constexpr, MP: tl.constexpr, SPARSE: tl.constexpr):
    """A program's query heads in a tile, counted over all sequences, and which are on."""
    M: tl.constexpr = N // G
    group = tl.program_id(0)
    member = tl.arange(0, MP)
    head = (group // G) * N + (group % G) * M + member
    there = member < M
    if SPARSE:
        there = there & (tl.load(on + head, mask=there, other=0) != 0)
    return head, there


@triton.jit(do_not_specialize=["L", "span"])
def decode_parts(
    q, k, v, on, first, largest, total, parts,
    q_b, q_n, k_b, k_l, k_g, v_b, v_l, v_g, L, span, scale,
    N: tl.constexpr, G: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPARSE: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """parts [B · G, J, MP, DP]: not yet divided sums over `span` keys, largest and total theirs."""
    group, part = tl.program_id(0), tl.program_id(1)
    batch = (group // G).to(tl.int64)
    head, there = _mine(on, N, G, MP, SPARSE)
    if tl.max(there.to(tl.int32), 0) > 0:
        member, column = tl.arange(0, MP), tl.arange(0, DP)
        inside = there[:, None] & (column < D)[None, :]
        q_at = batch * q_b + (head - (group // G) * N) * q_n
        q_tile = tl.load(q + q_at[:, None] + column[None, :], mask=inside, other=0.0)
        begin = tl.load(first + batch)
        low = begin + member * 0
        high = tl.minimum((part + 1) * span, L) - 1 + member * 0
        begin = (tl.maximum(begin, part * span) // BN) * BN
        end = tl.minimum((part + 1) * span, L)
        most = tl.full((MP,), float("-inf"), ACC)
        most, sums, acc = _soften(
            q_tile, k + batch * k_b + (group % G) * k_g, v + batch * v_b + (group % G) * v_g,
            most, tl.zeros((MP,), ACC), tl.zeros((MP, DP), ACC), begin, end, low, high, there, L,
            k_l, v_l, scale, D, DP, BN, True, UPCAST, PRECISION, ACC,
        )  # fmt: skip
        at = (group * tl.num_programs(1) + part) * MP + member
        tl.store(largest + at, most)
        tl.store(total + at, sums)
        tl.store(parts + at.to(tl.int64)[:, None] * DP + column[None, :], acc)


@triton.jit(do_not_specialize=["J"])
def merge_parts(
    gate, on, largest, total, parts, out, J,
    N: tl.constexpr, G: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPARSE: tl.constexpr, GATED: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [B, N, D]: gate · attention, zeros for heads that are off."""
    M: tl.constexpr = N // G
    group = tl.program_id(0)
    head, there = _mine(on, N, G, MP, SPARSE)
    member, column = tl.arange(0, MP), tl.arange(0, DP)
    most = tl.full((MP,), float("-inf"), ACC)
    sums, acc = tl.zeros((MP,), ACC), tl.zeros((MP, DP), ACC)
    some = tl.max(there.to(tl.int32), 0)
    for j in range(J * some):
        at = (group * J + j) * MP + member
        new = tl.load(largest + at)
        both = tl.maximum(most, new)
        safe = tl.where(both == float("-inf"), 0, both)
        old_share, new_share = tl.exp2(most - safe), tl.exp2(new - safe)
        sums = sums * old_share + tl.load(total + at) * new_share
        part = tl.load(parts + at.to(tl.int64)[:, None] * DP + column[None, :])
        acc = acc * old_share[:, None] + part * new_share[:, None]
        most = both
    acc = acc / tl.where(sums > 0, sums, 1)[:, None]
    if GATED:
        acc *= tl.load(gate + head, mask=there, other=0.0).to(ACC)[:, None]
    written = (member < M)[:, None] & (column < D)[None, :]
    out_at = out + head.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out_at, narrow(acc, out.dtype.element_ty, UPCAST), mask=written)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    scale: float,
    gate: Tensor | None,
    on: Tensor | None,
) -> Tensor:
    """Gated outputs [B, 1, N, d] of queries [B, 1, N, d]; gate and `on` [B, 1, N], contiguous."""
    batch, _, heads, size = q.shape
    if not batch:
        return torch.empty_like(q)
    keys, groups = k.shape[1:3]
    rows = max(16, triton.next_power_of_2(heads // groups))
    wide = max(16, triton.next_power_of_2(size))
    busy = triton.cdiv(2 * device.num_processors(q.device), batch * groups)
    span = triton.cdiv(keys, BLOCK * max(1, min(busy, triton.cdiv(keys, 4 * BLOCK)))) * BLOCK
    parts = triton.cdiv(keys, span)
    acc = torch.promote_types(q.dtype, torch.float32)
    largest, total = torch.empty(2, batch * groups, parts, rows, dtype=acc, device=q.device)
    sums = torch.empty(batch * groups, parts, rows, wide, dtype=acc, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    alike = {
        "N": heads, "G": groups, "MP": rows, "D": size, "DP": wide, "SPARSE": on is not None,
        "UPCAST": device.upcast(q.dtype), "ACC": device.accumulator(q.dtype), "num_warps": 4,
    }  # fmt: skip
    decode_parts[(batch * groups, parts)](
        q, k, v, on, first, largest, total, sums, q.stride(0), q.stride(2), *k.stride()[:3],
        *v.stride()[:3], keys, span, scale * LOG2E, BN=BLOCK, PRECISION=device.precision(),
        num_stages=3, **alike,
    )  # fmt: skip
    merge_parts[(batch * groups,)](
        gate, on, largest, total, sums, out, parts, GATED=gate is not None, **alike
    )
    return out
