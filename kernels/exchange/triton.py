"""Packing and unpacking in Triton: a copy in one pass, and its gradients.

T tokens, H hidden, E experts, K chosen (KP: the next power of 2), W ranks, N rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import device
from moe.kernels.exchange.naive import Packed
from moe.kernels.route import triton as route
from moe.kernels.routed_mlp.gemm import combine


@triton.jit(do_not_specialize=["T"])
def destine(
    indices, ranks_of, T, E: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """The rank of each choice [T, K]; W where an earlier choice goes there too, or nowhere."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    at = token.to(tl.int64) * K
    for k in tl.static_range(K):
        index = tl.load(indices + at + k, mask=token < T, other=E)
        rank = tl.where(index < E, index // (E // W), W)
        for j in tl.static_range(k):
            other = tl.load(indices + at + j, mask=token < T, other=E)
            rank = tl.where((other < E) & (other // (E // W) == rank), W, rank)
        tl.store(ranks_of + at + k, rank, mask=token < T)


@triton.jit
def pack_rows(
    x, indices, weights, pairs, offsets, rows, row_indices, row_weights, row_of, x_step,
    E: tl.constexpr, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """One row: the token's x, its choices on the row's rank, and where these choices find it."""
    SIZE: tl.constexpr = E // W
    row = tl.program_id(0)
    slot, column = tl.arange(0, KP), tl.arange(0, BH)
    there = row < tl.load(offsets + W)
    pair = tl.where(there, tl.load(pairs + tl.where(there, row, 0)), 0)
    token = (pair // K).to(tl.int64)
    chosen = slot < tl.where(there, K, 0)
    mine = tl.load(indices + token * K + pair % K) // SIZE
    wanted = tl.load(indices + token * K + slot, mask=chosen, other=E)
    here = chosen & (wanted < E) & (wanted // SIZE == mine)
    own = row.to(tl.int64) * K + slot
    tl.store(row_indices + own, tl.where(here, wanted - mine * SIZE, SIZE), mask=slot < K)
    weight = tl.load(weights + token * K + slot, mask=here, other=0.0)
    tl.store(row_weights + own, weight, mask=slot < K)
    tl.store(row_of + token * K + slot, row, mask=here)
    for start in range(0, H, BH):
        inside = start + column < H
        found = tl.load(
            x + token * x_step + start + column,
            mask=start + column < tl.where(there, H, 0), other=0.0,
        )  # fmt: skip
        tl.store(rows + row.to(tl.int64) * H + start + column, found, mask=inside)


@triton.jit(do_not_specialize=["P"])
def pull(values, row_of, out, P, K: tl.constexpr, B: tl.constexpr):
    """out [T, K]: each choice's entry of its row of values [N, K], 0 for no expert."""
    pair = tl.program_id(0) * B + tl.arange(0, B)
    row = tl.load(row_of + pair, mask=pair < P, other=-1).to(tl.int64)
    found = tl.load(values + row * K + pair % K, mask=row >= 0, other=0)
    tl.store(out + pair, found, mask=pair < P)


@triton.jit
def spread_rows(
    dy, pairs, offsets, drows, dy_step, W: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """drows [N, H]: the gradient of its token's sum, zeros after the last row."""
    row = tl.program_id(0)
    column = tl.arange(0, BH)
    there = row < tl.load(offsets + W)
    pair = tl.where(there, tl.load(pairs + tl.where(there, row, 0)), 0)
    token = (pair // K).to(tl.int64)
    for start in range(0, H, BH):
        found = tl.load(
            dy + token * dy_step + start + column,
            mask=start + column < tl.where(there, H, 0), other=0.0,
        )  # fmt: skip
        at = drows + row.to(tl.int64) * H + start + column
        tl.store(at, found, mask=start + column < H)


def pack(x: Tensor, indices: Tensor, weights: Tensor, experts: int, ranks: int) -> Packed:
    """What naive.pack gives, of at least one token."""
    tokens, k = indices.shape
    hidden, bound = x.shape[1], tokens * min(k, ranks)
    towards = torch.empty_like(indices)
    destine[(triton.cdiv(tokens, 128),)](
        indices, towards, tokens, E=experts, W=ranks, K=k, BT=128, num_warps=4
    )
    plan = route.plan(towards, ranks)
    packed = Packed(
        x.new_empty(bound, hidden), indices.new_empty(bound, k), weights.new_empty(bound, k),
        plan.offset_E1, plan.place_TK, torch.full_like(plan.place_TK, -1),
        plan.pair_P,
    )  # fmt: skip
    pack_rows[(bound,)](
        x, indices, weights, plan.pair_P, plan.offset_E1, *packed[:3],
        packed.row_TK, x.stride(0), E=experts, W=ranks, K=k, KP=triton.next_power_of_2(k),
        H=hidden, BH=_columns(hidden), num_warps=4,
    )  # fmt: skip
    return packed


def pack_backward(
    drows: Tensor, dweights_NK: Tensor, place_TK: Tensor, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights."""
    dweights = dweights_NK.new_empty(row_TK.shape)
    count = row_TK.numel()
    pull[(triton.cdiv(count, 256),)](dweights_NK, row_TK, dweights, count, K=row_TK.shape[1], B=256)
    return unpack(drows, place_TK), dweights


def unpack(rows: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's rows added up [T, H]."""
    tokens, k = place_TK.shape
    out = rows.new_empty(tokens, rows.shape[1])
    combine[(tokens,)](
        rows, place_TK, out, N=rows.shape[1], K=k, BN=_columns(rows.shape[1]),
        UPCAST=device.upcast(rows.dtype), ACC=device.accumulator(rows.dtype), num_warps=4,
    )  # fmt: skip
    return out


def unpack_backward(dy: Tensor, pair_P: Tensor, offset_W1: Tensor, rows: int, k: int) -> Tensor:
    """The gradient of every row."""
    drows = dy.new_empty(rows, dy.shape[1])
    spread_rows[(rows,)](
        dy, pair_P, offset_W1, drows, dy.stride(0), W=len(offset_W1) - 1, K=k, H=dy.shape[1],
        BH=_columns(dy.shape[1]), num_warps=4,
    )  # fmt: skip
    return drows


def _columns(hidden: int) -> int:
    return min(1024, triton.next_power_of_2(hidden))
