"""Triton kernels of the routed MLP's backward pass: through SwiGLU, and of the weights.

The gradient of a pair's weight is <dA, a>, so that y is never kept; it comes in parts, one per
block of columns, added up in a fixed order. No kernel adds to memory that another writes.

Letters as in gemm.py.
"""

import triton
import triton.language as tl

from moe.kernels.routed_mlp.gemm import multiply, narrow, rows_of, tile_at


@triton.jit
def _through_swiglu(
    da, h_at, h_up, dh_at, a_at, weight, inside, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Some columns of dh and a from dA; returns their part of <dA, a>."""
    gate = tl.load(h_at, mask=inside, other=0.0).to(ACC)
    up = tl.load(h_at + h_up, mask=inside, other=0.0).to(ACC)
    if LIMIT > 0:
        free_gate = gate <= LIMIT
        free_up = (up >= -LIMIT) & (up <= LIMIT)
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1
    sigmoid = 1 / (1 + tl.exp(-ALPHA * gate))
    silu = gate * sigmoid
    act = silu * up
    part = tl.sum(da * act, 1)
    tl.store(a_at, narrow(act * weight[:, None], a_at.dtype.element_ty, UPCAST), mask=inside)
    da = da * weight[:, None]
    dgate = da * up * (sigmoid + ALPHA * silu * (1 - sigmoid))
    dup = da * silu
    if LIMIT > 0:
        dgate = tl.where(free_gate, dgate, 0)
        dup = tl.where(free_up, dup, 0)
    tl.store(dh_at, narrow(dgate, dh_at.dtype.element_ty, UPCAST), mask=inside)
    tl.store(dh_at + h_up, narrow(dup, dh_at.dtype.element_ty, UPCAST), mask=inside)
    return part


@triton.jit
def _halve(x, BM: tl.constexpr, N: tl.constexpr):
    """Left and right half of [BM, N], which stay where they are in registers."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _part(x, q: tl.constexpr, BM: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """The q-th of PARTS parts of x's columns [BM, N / PARTS]."""
    if PARTS > 1:
        left, right = _halve(x, BM, N)
        x = left if q < PARTS // 2 else right
        x = _part(x, q % (PARTS // 2), BM, N // 2, PARTS // 2)
    return x


@triton.jit(do_not_specialize=["U"])
def down_dgrad(
    dy, w2, h, weights, pairs, offsets, tiles, dh, a, parts,
    dy_step, w_expert, w_step, i_step, h_gate, h_up, U,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dA = dy[token] W2; from it dh [P, D], the weighed a [P, I] and parts [P, I / BN] of <dA, a>.

    The epilogue goes through a part of the columns at a time: all at once, its operands would not
    fit in registers.
    """
    blocks_n: tl.constexpr = (I + BN - 1) // BN
    inner = tl.arange(0, BK)
    slice, local = tl.arange(0, BN // PARTS), tl.arange(0, BM)
    for t in tl.range(tl.program_id(0), U * blocks_n, tl.num_programs(0)):
        tile_u, block = tile_at(t, U, blocks_n, GROUP)
        tile = tl.load(tiles + tile_u)
        if tile >= 0:
            expert, first, there = rows_of(tile, offsets, BM)
            pair = tl.load(pairs + first + local, mask=there, other=0)
            column = block * BN + tl.arange(0, BN)
            dy_at = dy + (pair // K).to(tl.int64)[:, None] * dy_step + inner[None, :]
            w_at = inner[:, None] * w_step + column[None, :] * i_step
            w_e = w2 + expert * w_expert
            da = tl.zeros((BM, BN), ACC)
            for k in range(0, H, BK):
                if H % BK == 0 and I % BN == 0:
                    dy_tile = tl.load(dy_at, mask=there[:, None], other=0.0)
                    w_tile = tl.load(w_e + w_at)
                else:
                    left = inner < H - k
                    w_there = left[:, None] & (column < I)[None, :]
                    dy_tile = tl.load(dy_at, mask=there[:, None] & left[None, :], other=0.0)
                    w_tile = tl.load(w_e + w_at, mask=w_there, other=0.0)
                da = multiply(dy_tile, w_tile, da, UPCAST, PRECISION)
                dy_at += BK
                w_e += BK * w_step
            weight = tl.load(weights + pair, mask=there, other=0.0).to(ACC)
            part = tl.zeros((BM,), ACC)
            for q in tl.static_range(PARTS):
                some = _part(da, q, BM, BN, PARTS)
                place = block * BN + q * (BN // PARTS) + slice
                inside = there[:, None]
                if I % BN:
                    inside = inside & (place < I)[None, :]
                h_at = local[:, None] * (2 * I) + place[None, :] * h_gate
                a_at = local[:, None] * I + place[None, :]
                part += _through_swiglu(
                    some, h + first * (2 * I) + h_at, h_up, dh + first * (2 * I) + h_at,
                    a + first * I + a_at, weight, inside, LIMIT, ALPHA, UPCAST, ACC,
                )  # fmt: skip
            tl.store(parts + (first * blocks_n + block) + local * blocks_n, part, mask=there)


@triton.jit(do_not_specialize=["P"])
def gather_sum(
    parts, places, dweights, P, N: tl.constexpr, NP: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """dweights [P]: each pair's N parts added up, 0 for a pair that went nowhere."""
    pair = tl.program_id(0) * B + tl.arange(0, B)
    place = tl.load(places + pair, mask=pair < P, other=-1)
    part = tl.arange(0, NP)
    at = parts + place.to(tl.int64)[:, None] * N + part[None, :]
    found = tl.load(at, mask=(place >= 0)[:, None] & (part < N)[None, :], other=0.0)
    tl.store(dweights + pair, tl.sum(found, 1).to(dweights.dtype.element_ty), mask=pair < P)


@triton.jit(do_not_specialize=["E"])
def weight_gradient(
    left, right, pairs, offsets, order, dw, left_step, right_step, dw_expert, m_step, n_step, E,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GATHER_LEFT: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dW [E, M, N] = Σ over e's rows of left ⊗ right, one of which lies by token: right, or left.

    Experts with the most rows come first, so that none of them is begun last; an expert without
    rows gets zeros. ADD adds to what is there.
    """
    blocks_m: tl.constexpr = (M + BM - 1) // BM
    blocks_n: tl.constexpr = (N + BN - 1) // BN
    blocks: tl.constexpr = blocks_m * blocks_n
    inner = tl.arange(0, BK)
    for t in tl.range(tl.program_id(0), E * blocks, tl.num_programs(0)):
        expert = tl.load(order + t // blocks)
        m = ((t % blocks) // blocks_n) * BM + tl.arange(0, BM)
        n = ((t % blocks) % blocks_n) * BN + tl.arange(0, BN)
        start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        acc = tl.zeros((BM, BN), ACC)
        # loaded an iteration ahead: a load that waits for another leaves one fewer in flight
        token = tl.load(pairs + start + inner, mask=start + inner < end, other=0) // K
        for k in range(start, end, BK):
            row = k + inner
            there = row < end
            left_row = (token if GATHER_LEFT else row).to(tl.int64)
            right_row = (row if GATHER_LEFT else token).to(tl.int64)
            left_at = left + left_row[None, :] * left_step + m[:, None]
            right_at = right + right_row[:, None] * right_step + n[None, :]
            left_there, right_there = there[None, :], there[:, None]
            if M % BM:
                left_there = left_there & (m < M)[:, None]
            if N % BN:
                right_there = right_there & (n < N)[None, :]
            left_tile = tl.load(left_at, mask=left_there, other=0.0)
            right_tile = tl.load(right_at, mask=right_there, other=0.0)
            token = tl.load(pairs + row + BK, mask=row + BK < end, other=0) // K
            acc = multiply(left_tile, right_tile, acc, UPCAST, PRECISION)
        dw_at = dw + expert.to(tl.int64) * dw_expert + m[:, None] * m_step + n[None, :] * n_step
        inside = (m < M)[:, None] & (n < N)[None, :]
        if ADD:
            acc += tl.load(dw_at, mask=inside, other=0.0).to(ACC)
        tl.store(dw_at, narrow(acc, dw.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def bias_gradient(
    dh, offsets, dbias, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dbias [E, N]: each expert's rows of dh [P, N] added up."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros((BN,), ACC)
    for k in range(start, end, BM):
        row = k + tl.arange(0, BM)
        inside = (row < end)[:, None] & (column < N)[None, :]
        found = tl.load(dh + row.to(tl.int64)[:, None] * N + column[None, :], mask=inside, other=0)
        acc += tl.sum(found.to(ACC), 0)
    out = narrow(acc, dbias.dtype.element_ty, UPCAST)
    tl.store(dbias + expert.to(tl.int64) * N + column, out, mask=column < N)
