"""Triton kernels of attention over rows that are (position, head) pairs, with a gate per row.

The query heads of a KV head go together: a row is position · M + head within the group, so that
rows in order are in order of position, and a tile of rows reads each key once for all its heads.
Without a list of rows all of them are there; with one, only those, in segments per (batch, KV
head). A query sees the keys from `first` to its own place, so no row before a key's own sees it.

B batch, S queries, L keys, N query heads, G KV heads, M = N / G, D head size (DP: power of 2).
"""

import triton
import triton.language as tl

from moe.kernels.routed_mlp.gemm import multiply, narrow


@triton.jit
def _rows(rows, segments, tile, group, S, M: tl.constexpr, BM: tl.constexpr, SPARSE: tl.constexpr):
    """A tile's rows: where their sums are kept, which (position, head) they are, which exist."""
    if SPARSE:
        at = tl.load(segments + group) + tile * BM + tl.arange(0, BM)
        there = at < tl.load(segments + group + 1)
        packed = tl.load(rows + at, mask=there, other=0)
    else:
        packed = tile * BM + tl.arange(0, BM)
        there = packed < S * M
        packed = tl.where(there, packed, 0)
        at = group * S * M + packed
    return at.to(tl.int64), packed // M, packed % M, there


@triton.jit
def _span(low, high, there, BN: tl.constexpr):
    """What a tile sees of the keys: its begin, where all rows see all, where that ends, its end."""
    begin = (tl.min(tl.where(there, low, 2147483647), 0) // BN) * BN
    end = tl.max(tl.where(there, high, -1), 0) + 1
    full = ((tl.max(tl.where(there, low, 0), 0) + BN - 1) // BN) * BN
    stop = ((tl.min(tl.where(there, high, 2147483646), 0) + 1) // BN) * BN
    some = full < stop
    return begin, tl.where(some, full, end), tl.where(some, stop, end), end


@triton.jit
def _block(
    of, n, L, step, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr
):
    """Keys or values n to n + BN of one KV head [BN, DP]; without MASKED all of them exist."""
    key = n + tl.arange(0, BN)
    column = tl.arange(0, DP)
    at = of + key.to(tl.int64)[:, None] * step + column[None, :]
    if MASKED:
        tile = tl.load(at, mask=(key < L)[:, None] & (column < D)[None, :], other=0.0)
    elif D < DP:
        tile = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _scores(
    q, k_tile, n, low, high, there, BN: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Products of a tile's queries and one block of keys, not scaled yet; -inf where unseen."""
    acc = tl.zeros((q.shape[0], BN), ACC)
    scores = multiply(q, tl.trans(k_tile), acc, UPCAST, PRECISION)
    if MASKED:
        key = n + tl.arange(0, BN)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] <= high[:, None]) & there[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _soften(
    q, k, v, largest, total, acc, begin, end, low, high, there, L, k_step, v_step, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Softmax over some blocks of keys, on top of what was seen before."""
    for n in range(begin, end, BN):
        k_tile = _block(k, n, L, k_step, D, DP, BN, MASKED)
        scores = _scores(q, k_tile, n, low, high, there, BN, MASKED, UPCAST, PRECISION, ACC)
        new = tl.maximum(largest, tl.max(scores, 1) * scale)
        safe = tl.where(new == float("-inf"), 0, new) if MASKED else new
        p = tl.exp2(scores * scale - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _block(v, n, L, v_step, D, DP, BN, MASKED)
        weights = narrow(p, v_tile.dtype, UPCAST)
        acc = multiply(weights, v_tile, acc * shrink[:, None], UPCAST, PRECISION)
        largest = new
    return largest, total, acc


@triton.jit
def attend(
    q, k, v, gate, first, rows, segments, out, raw, sums,
    q_b, q_s, q_n, k_b, k_l, k_g, v_b, v_l, v_g, S, L, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPARSE: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [B, S, N, D] = gate · attention, raw the same ungated, sums the softmax's log2 a row."""
    M: tl.constexpr = N // G
    group = tl.program_id(1)
    batch, head_g = (group // G).to(tl.int64), group % G
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the rows that see most begin first
    at, position, head, there = _rows(rows, segments, tile, group, S, M, BM, SPARSE)
    if tl.max(there.to(tl.int32), 0) > 0:
        column = tl.arange(0, DP)
        inside = there[:, None] & (column < D)[None, :]
        head = head_g * M + head
        q_at = batch * q_b + position.to(tl.int64) * q_s + head * q_n
        q_tile = tl.load(q + q_at[:, None] + column[None, :], mask=inside, other=0.0)
        low = tl.load(first + batch * S + position, mask=there, other=0)
        high = position + L - S
        begin, full, stop, end = _span(low, high, there, BN)
        largest = tl.full((BM,), float("-inf"), ACC)
        total = tl.zeros((BM,), ACC)
        acc = tl.zeros((BM, DP), ACC)
        k_base, v_base = k + batch * k_b + head_g * k_g, v + batch * v_b + head_g * v_g
        largest, total, acc = _soften(
            q_tile, k_base, v_base, largest, total, acc, begin, full, low, high, there, L, k_l,
            v_l, scale, D, DP, BN, True, UPCAST, PRECISION, ACC,
        )  # fmt: skip
        largest, total, acc = _soften(
            q_tile, k_base, v_base, largest, total, acc, full, stop, low, high, there, L, k_l,
            v_l, scale, D, DP, BN, False, UPCAST, PRECISION, ACC,
        )  # fmt: skip
        largest, total, acc = _soften(
            q_tile, k_base, v_base, largest, total, acc, stop, end, low, high, there, L, k_l,
            v_l, scale, D, DP, BN, True, UPCAST, PRECISION, ACC,
        )  # fmt: skip
        some = total > 0
        total = tl.where(some, total, 1)
        acc = acc / total[:, None]
        tl.store(sums + at, tl.where(some, largest + tl.log2(total), 0), mask=there)
        row = (batch * S + position) * N + head
        out_at = row[:, None] * D + column[None, :]
        if GATED:
            tl.store(raw + out_at, narrow(acc, raw.dtype.element_ty, UPCAST), mask=inside)
            acc = acc * tl.load(gate + row, mask=there, other=0.0).to(ACC)[:, None]
        tl.store(out + out_at, narrow(acc, out.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def _descend(
    q, do, k, v, dq, sums, delta, begin, end, low, high, there, L, k_step, v_step, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq over some blocks of keys."""
    for n in range(begin, end, BN):
        k_tile = _block(k, n, L, k_step, D, DP, BN, MASKED)
        v_tile = _block(v, n, L, v_step, D, DP, BN, MASKED)
        scores = _scores(q, k_tile, n, low, high, there, BN, MASKED, UPCAST, PRECISION, ACC)
        dp = multiply(do, tl.trans(v_tile), tl.zeros(scores.shape, ACC), UPCAST, PRECISION)
        p = tl.exp2(scores * scale - sums[:, None])
        ds = narrow(p * (dp - delta[:, None]), k_tile.dtype, UPCAST)
        dq = multiply(ds, k_tile, dq, UPCAST, PRECISION)
    return dq


@triton.jit
def attend_dq(
    dout, q, k, v, gate, first, rows, segments, raw, sums, dq, dgate, draw, deltas,
    q_b, q_s, q_n, k_b, k_l, k_g, v_b, v_l, v_g, S, L, scale, scale_e,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPARSE: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq [B, S, N, D], and on the way each row's <dout, raw>: dgate, and times the gate deltas.

    With a gate also dout times it, `draw`, which dk and dv are made from.
    """
    M: tl.constexpr = N // G
    group = tl.program_id(1)
    batch, head_g = (group // G).to(tl.int64), group % G
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    at, position, head, there = _rows(rows, segments, tile, group, S, M, BM, SPARSE)
    if tl.max(there.to(tl.int32), 0) > 0:
        column = tl.arange(0, DP)
        inside = there[:, None] & (column < D)[None, :]
        head = head_g * M + head
        q_at = batch * q_b + position.to(tl.int64) * q_s + head * q_n
        q_tile = tl.load(q + q_at[:, None] + column[None, :], mask=inside, other=0.0)
        row = (batch * S + position) * N + head
        out_at = row[:, None] * D + column[None, :]
        do = tl.load(dout + out_at, mask=inside, other=0.0)
        product = do.to(ACC) * tl.load(raw + out_at, mask=inside, other=0.0).to(ACC)
        delta = tl.sum(product, 1)
        if GATED:
            tl.store(dgate + row, delta.to(dgate.dtype.element_ty), mask=there)
            weight = tl.load(gate + row, mask=there, other=0.0).to(ACC)
            delta = delta * weight
            do = narrow(do.to(ACC) * weight[:, None], do.dtype, UPCAST)
            tl.store(draw + out_at, do, mask=inside)
        tl.store(deltas + at, delta, mask=there)
        low = tl.load(first + batch * S + position, mask=there, other=0)
        high = position + L - S
        begin, full, stop, end = _span(low, high, there, BN)
        log = tl.load(sums + at, mask=there, other=0.0)
        acc = tl.zeros((BM, DP), ACC)
        k_base, v_base = k + batch * k_b + head_g * k_g, v + batch * v_b + head_g * v_g
        acc = _descend(q_tile, do, k_base, v_base, acc, log, delta, begin, full, low, high, there,
                       L, k_l, v_l, scale, D, DP, BN, True, UPCAST, PRECISION, ACC)  # fmt: skip
        acc = _descend(q_tile, do, k_base, v_base, acc, log, delta, full, stop, low, high, there,
                       L, k_l, v_l, scale, D, DP, BN, False, UPCAST, PRECISION, ACC)  # fmt: skip
        acc = _descend(q_tile, do, k_base, v_base, acc, log, delta, stop, end, low, high, there,
                       L, k_l, v_l, scale, D, DP, BN, True, UPCAST, PRECISION, ACC)  # fmt: skip
        tl.store(dq + out_at, narrow(acc * scale_e, dq.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def _ascend(
    k_tile, v_tile, dk, dv, begin, stop, end, n, q, draw, first, rows, sums, deltas,
    q_s, q_n, sum_base, first_base, head0, shift, scale,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPARSE: tl.constexpr,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys over the rows from begin to stop; rows end at `end`.

    Without MASKED every row sees every key. A row past the end is all zeros and adds nothing.
    """
    inner = tl.arange(0, BM)
    column = tl.arange(0, DP)
    key = n + tl.arange(0, BN)
    # the list is read an iteration ahead: a load that waits for another leaves one fewer in flight
    packed = begin + inner
    if SPARSE:
        packed = tl.load(rows + begin + inner, mask=begin + inner < end, other=0)
    for r in tl.range(begin, stop, BM, num_stages=1 if MASKED else None):
        at = r + inner
        there = at < end
        position, head = (packed // M).to(INDEX), head0 + packed % M
        inside = there[:, None] & (column < D)[None, :] if D < DP else there[:, None]
        q_at = position * q_s + head * q_n
        q_tile = tl.load(q + q_at[:, None] + column[None, :], mask=inside, other=0.0)
        row = position * N + head
        do = tl.load(draw + row[:, None] * D + column[None, :], mask=inside, other=0.0)
        log = tl.load(sums + sum_base + at, mask=there, other=0.0)
        delta = tl.load(deltas + sum_base + at, mask=there, other=0.0)
        if MASKED:
            low = tl.load(first + first_base + position, mask=there, other=0)
            high = position + shift
        packed = at + BM
        if SPARSE:
            packed = tl.load(rows + packed, mask=packed < end, other=0)
        zero = tl.zeros((BN, BM), ACC)
        scores = multiply(k_tile, tl.trans(q_tile), zero, UPCAST, PRECISION)
        p = tl.exp2(scores * scale - log[None, :])
        if MASKED:
            seen = (key[:, None] >= low[None, :]) & (key[:, None] <= high[None, :])
            p = tl.where(seen & there[None, :], p, 0)
        dv = multiply(narrow(p, do.dtype, UPCAST), do, dv, UPCAST, PRECISION)
        dp = multiply(v_tile, tl.trans(do), zero, UPCAST, PRECISION)
        ds = narrow(p * (dp - delta[None, :]), q_tile.dtype, UPCAST)
        dk = multiply(ds, q_tile, dk, UPCAST, PRECISION)
    return dk, dv


@triton.jit
def attend_dkv(
    draw, q, k, v, first, latest, until, rows, segments, starts, sums, deltas, dk, dv,
    q_b, q_s, q_n, k_b, k_l, k_g, v_b, v_l, v_g, S, L, scale, scale_e,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPARSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, L, G, D]: a block of keys against all rows from its own on, a program each.

    Rows after the block see all of it, unless `latest`, the last begin of what a query of the
    batch's sees, lies past the block's own: then every row is asked. `until` [B, blocks] is the
    position from which on none sees the block any more: after a window, or a document.
    """
    M: tl.constexpr = N // G
    group = tl.program_id(1)
    batch, head_g = (group // G).to(tl.int64), group % G
    n = tl.program_id(0) * BN
    key = n + tl.arange(0, BN)
    column = tl.arange(0, DP)
    shift = L - S
    k_tile = _block(k + batch * k_b + head_g * k_g, n, L, k_l, D, DP, BN, True)
    v_tile = _block(v + batch * v_b + head_g * v_g, n, L, v_l, D, DP, BN, True)
    dk_acc, dv_acc = tl.zeros((BN, DP), ACC), tl.zeros((BN, DP), ACC)
    own = tl.minimum(tl.maximum(n - shift, 0), S - 1)  # position of the first key's own query
    after = tl.maximum(n + BN - 1 - shift, 0)  # from here on rows see the last key too
    last = tl.load(until + batch * tl.num_programs(0) + tl.program_id(0))
    if SPARSE:
        end = tl.load(segments + group + 1)
        end = tl.minimum(end, tl.load(starts + group * S + last, mask=last < S, other=2147483647))
        begin = tl.load(starts + group * S + own)
        free = tl.load(starts + group * S + tl.minimum(after, S - 1))
    else:
        end, begin, free = last * M, own * M, tl.minimum(after, S - 1) * M
    free = tl.where((after < S) & (n >= tl.load(latest + batch)), free, end)
    begin = tl.minimum(begin, end)
    # masks take registers: fewer rows at a time where there are some
    HALF: tl.constexpr = max(16, BM // 2)
    free = tl.minimum(begin + ((free - begin + HALF - 1) // HALF) * HALF, end)
    q += batch * q_b
    draw += batch * S * N * D
    sum_base = 0 if SPARSE else group.to(tl.int64) * S * M
    dk_acc, dv_acc = _ascend(
        k_tile, v_tile, dk_acc, dv_acc, begin, free, end, n, q, draw, first, rows, sums,
        deltas, q_s, q_n, sum_base, batch * S, head_g * M, shift, scale,
        N, M, D, DP, SPARSE, True, HALF, BN, INDEX, UPCAST, PRECISION, ACC,
    )  # fmt: skip
    dk_acc, dv_acc = _ascend(
        k_tile, v_tile, dk_acc, dv_acc, free, end, end, n, q, draw, first, rows, sums,
        deltas, q_s, q_n, sum_base, batch * S, head_g * M, shift, scale,
        N, M, D, DP, SPARSE, False, BM, BN, INDEX, UPCAST, PRECISION, ACC,
    )  # fmt: skip
    at = ((batch * L + key) * G + head_g)[:, None] * D + column[None, :]
    inside = (key < L)[:, None] & (column < D)[None, :]
    tl.store(dk + at, narrow(dk_acc * scale_e, dk.dtype.element_ty, UPCAST), mask=inside)
    tl.store(dv + at, narrow(dv_acc, dv.dtype.element_ty, UPCAST), mask=inside)
