"""Triton kernels of the routed MLP's forward pass: gathered up-projection, grouped GEMM, combine.

Rows are pairs sorted by expert, in tiles that never straddle two experts (route/naive.py, Plan).
Each program takes every n-th tile of a grid whose size does not depend on the routing; tiles that
share weights lie together, so that these are read from the cache. `depth`, the length of a dot
product, is given once more as a number that is not known in advance: the compiler unrolls short
loops that it knows the length of, and these are slower.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen, P pairs, U tiles; an expert's weights may
lie either way round, and gate and up rows one after the other or alternating: `gate_step` and
`up_offset` say where.
"""

import triton
import triton.language as tl


@triton.jit
def tile_at(t, U, blocks_n, GROUP: tl.constexpr):
    """Tile and column block of work item t: GROUP tiles go through the columns side by side."""
    width = GROUP * blocks_n
    first = (t // width) * GROUP
    rows = tl.minimum(U - first, GROUP)
    return first + (t % width) % rows, (t % width) // rows


@triton.jit
def rows_of(tile, offsets, BM: tl.constexpr):
    """A tile's expert, its first row of the sorted list and which of its rows there are.

    What is 64 bits wide is a scalar: offsets inside a tile take half the registers.
    """
    expert = tile & 0xFFF
    first = tl.load(offsets + expert) + (tile >> 12) * BM
    there = first + tl.arange(0, BM) < tl.load(offsets + expert + 1)
    return expert.to(tl.int64), first.to(tl.int64), there


@triton.jit
def multiply(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """x as it is stored. The interpreter cuts bits off for bfloat16, a GPU rounds to even."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """silu(gate) ⊙ up; with a LIMIT gpt-oss's: both clamped, gate · σ(α gate) ⊙ (up + 1)."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1
    return gate / (1 + tl.exp(-ALPHA * gate)) * up


@triton.jit(do_not_specialize=["U", "depth"])
def up_swiglu(
    x, w1, bias, weights, pairs, offsets, tiles, h, a,
    x_step, w_expert, gate_step, up_offset, w_step, h_gate, h_up, U, depth,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, SAVE_H: tl.constexpr, WEIGH: tl.constexpr,
    BIASED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h [P, D] = x[token] W1ᵀ and a [P, I] = weight · silu(gate) ⊙ up, in one pass over both."""
    blocks_n: tl.constexpr = (I + BN - 1) // BN
    inner, local = tl.arange(0, BK), tl.arange(0, BM)
    for t in tl.range(tl.program_id(0), U * blocks_n, tl.num_programs(0)):
        tile_u, block = tile_at(t, U, blocks_n, GROUP)
        tile = tl.load(tiles + tile_u)
        if tile >= 0:
            expert, first, there = rows_of(tile, offsets, BM)
            pair = tl.load(pairs + first + local, mask=there, other=0)
            column = block * BN + tl.arange(0, BN)
            x_at = x + (pair // K).to(tl.int64)[:, None] * x_step + inner[None, :]
            w_at = column[None, :] * gate_step + inner[:, None] * w_step
            gate_w = w1 + expert * w_expert
            up_w = gate_w + up_offset
            gate = tl.zeros((BM, BN), ACC)
            up = tl.zeros((BM, BN), ACC)
            for k in range(0, depth, BK):
                if H % BK == 0 and I % BN == 0:
                    x_tile = tl.load(x_at, mask=there[:, None], other=0.0)
                    gate_tile, up_tile = tl.load(gate_w + w_at), tl.load(up_w + w_at)
                else:
                    left = inner < H - k
                    w_there = left[:, None] & (column < I)[None, :]
                    x_tile = tl.load(x_at, mask=there[:, None] & left[None, :], other=0.0)
                    gate_tile = tl.load(gate_w + w_at, mask=w_there, other=0.0)
                    up_tile = tl.load(up_w + w_at, mask=w_there, other=0.0)
                gate = multiply(x_tile, gate_tile, gate, UPCAST, PRECISION)
                up = multiply(x_tile, up_tile, up, UPCAST, PRECISION)
                x_at += BK
                gate_w += BK * w_step
                up_w += BK * w_step
            if BIASED:
                bias_at = bias + expert * (2 * I) + column * h_gate
                gate += tl.load(bias_at, mask=column < I, other=0.0).to(ACC)[None, :]
                up += tl.load(bias_at + h_up, mask=column < I, other=0.0).to(ACC)[None, :]
            inside = there[:, None] & (column < I)[None, :]
            if SAVE_H:
                h_at = h + first * (2 * I) + (local[:, None] * (2 * I) + column[None, :] * h_gate)
                tl.store(h_at, narrow(gate, h.dtype.element_ty, UPCAST), mask=inside)
                tl.store(h_at + h_up, narrow(up, h.dtype.element_ty, UPCAST), mask=inside)
            if WEIGH:
                act = swiglu(gate, up, LIMIT, ALPHA)
                act *= tl.load(weights + pair, mask=there, other=0.0).to(ACC)[:, None]
                a_at = a + first * I + (local[:, None] * I + column[None, :])
                tl.store(a_at, narrow(act, a.dtype.element_ty, UPCAST), mask=inside)


@triton.jit(do_not_specialize=["U", "depth"])
def grouped_gemm(
    a, w, offsets, tiles, y, w_expert, k_step, n_step, U, depth,
    K: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y [P, N] = a [P, K] times each row's expert's w [K, N], which may lie either way round."""
    blocks_n: tl.constexpr = (N + BN - 1) // BN
    inner, local = tl.arange(0, BK), tl.arange(0, BM)
    for t in tl.range(tl.program_id(0), U * blocks_n, tl.num_programs(0)):
        tile_u, block = tile_at(t, U, blocks_n, GROUP)
        tile = tl.load(tiles + tile_u)
        if tile >= 0:
            expert, first, there = rows_of(tile, offsets, BM)
            column = block * BN + tl.arange(0, BN)
            a_at = local[:, None] * K + inner[None, :]
            w_at = column[None, :] * n_step + inner[:, None] * k_step
            a_k, w_k = a + first * K, w + expert * w_expert
            acc = tl.zeros((BM, BN), ACC)
            for k in range(0, depth, BK):
                if K % BK == 0 and N % BN == 0:
                    a_tile = tl.load(a_k + a_at, mask=there[:, None], other=0.0)
                    w_tile = tl.load(w_k + w_at)
                else:
                    left = inner < K - k
                    w_there = left[:, None] & (column < N)[None, :]
                    a_tile = tl.load(a_k + a_at, mask=there[:, None] & left[None, :], other=0.0)
                    w_tile = tl.load(w_k + w_at, mask=w_there, other=0.0)
                acc = multiply(a_tile, w_tile, acc, UPCAST, PRECISION)
                a_k += BK
                w_k += BK * k_step
            y_at = y + first * N + (local[:, None] * N + column[None, :])
            inside = there[:, None] & (column < N)[None, :]
            tl.store(y_at, narrow(acc, y.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def combine(
    y, places, out, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out [T, N]: a token's K rows of y [P, N] added up, in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, N, BN):
        column = start + tl.arange(0, BN)
        acc = tl.zeros((BN,), ACC)
        for k in tl.static_range(K):
            row = tl.load(places + token * K + k).to(tl.int64)
            there = column < tl.where(row >= 0, N, 0)
            acc += tl.load(y + row * N + column, mask=there, other=0.0).to(ACC)
        narrowed = narrow(acc, out.dtype.element_ty, UPCAST)
        tl.store(out + token * N + column, narrowed, mask=column < N)
