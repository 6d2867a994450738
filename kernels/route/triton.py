"""Routing in two launches: choose and count, then place. No sort, no atomics, nothing on the host.

The first gives every program a run of tokens: it scores them, picks the k best of each, and ranks
each pick among the run's picks of the same expert, with a running count per expert. The second adds
up the counts of the runs before its own, so that every pick knows its place in the list sorted by
expert; that list is what a stable sort would make. Tokens stay in order within an expert.

T tokens, E experts (EP: the next power of 2), K chosen, P = T·K pairs, R runs, U tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.device import num_processors
from moe.kernels.route.naive import Plan, block_rows, check_experts, tile_bound

PER_PROCESSOR, WARPS = 4, 4  # programs, and of how many warps
TILE = 512  # scores that a program looks at together


@triton.jit
def _score(logits, token, there, expert, E: tl.constexpr, SIGMOID: tl.constexpr):
    """Scores [BT, EP], their sum where they are no probabilities, the logsumexp, the logits."""
    at = (expert < E)[None, :] & there[:, None]
    row = token.to(tl.int64)[:, None] * E
    x = tl.load(logits + row + expert[None, :], mask=at, other=0)
    low = tl.where((expert < E)[None, :], x, float("-inf"))
    largest = tl.max(low, 1)
    powers = tl.exp(low - largest[:, None])
    total = tl.sum(powers, 1)
    if SIGMOID:
        scores = tl.where(at, 1 / (1 + tl.exp(-x)), 0)
        norm = tl.sum(scores, 1) + 1e-20
    else:
        scores = powers / total[:, None]
        norm = tl.full(total.shape, 1, x.dtype)
    return scores, norm, largest + tl.log(total), x


@triton.jit
def _pick(merit, expert, E: tl.constexpr, K: tl.constexpr):
    """Which choice each expert is [BT, EP], -1 for none: the k best, ties to the lowest index.

    Compares integers that lie as the floats do, so that one below -inf is left for the chosen.
    """
    merit = tl.where(merit != merit, float("inf"), merit)  # nan is most, as torch's sort has it
    merit = tl.where(merit == 0, 0.0, merit)  # -0 is 0
    if merit.dtype == tl.float64:
        bits, lowest, most = merit.to(tl.int64, bitcast=True), -(2**63), 2**63 - 1
        key = bits ^ ((bits >> 63) & most)
    else:
        bits, lowest, most = merit.to(tl.int32, bitcast=True), -(2**31), 2**31 - 1
        key = bits ^ ((bits >> 31) & most)
    key = tl.where((expert < E)[None, :], key, lowest)
    slot = tl.full(merit.shape, -1, tl.int32)
    for k in tl.static_range(K):
        hit = expert[None, :] == tl.argmax(key, 1)[:, None]
        slot = tl.where(hit, k, slot)
        key = tl.where(hit, lowest, key)
    return slot


@triton.jit(do_not_specialize=["T", "span"])
def choose(
    logits, bias, valid, weights, indices, ranks, counts, sums, T, span, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, BIASED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One run of tokens: weights, indices and ranks [T, K]; counts [R, EP] and sums [R, 3, EP].

    `sums` holds, over tokens that are no padding: choices, probabilities, and in its last row
    entropy, squared logsumexp and the number of these tokens. Added up over tokens at the end: a
    sum over rows is a wait for all warps.
    """
    run = tl.program_id(0)
    expert = tl.arange(0, EP)
    seen = tl.zeros((EP,), tl.int32)
    chosen = tl.zeros((EP,), tl.int32)
    probability = tl.zeros((BT, EP), logits.dtype.element_ty)
    entropy = probability
    square = tl.zeros((BT,), logits.dtype.element_ty)
    tokens = tl.zeros((BT,), tl.int32)
    local = tl.arange(0, BT)
    before = (run * span).to(tl.int64) * K
    weights, indices, ranks = weights + before, indices + before, ranks + before
    for start in range(run * span, tl.minimum(T, (run + 1) * span), BT):
        token = start + tl.arange(0, BT)
        there = token < T
        scores, norm, logsumexp, merit = _score(logits, token, there, expert, E, SIGMOID)
        if BIASED:
            merit = scores + tl.load(bias + expert, mask=expert < E, other=0)[None, :]
        slot = _pick(merit, expert, E, K)
        picked = (slot >= 0) & there[:, None]
        taken = picked.to(tl.int32)
        rank = tl.cumsum(taken, 0) - taken + seen[None, :]
        seen += tl.sum(taken, 0)
        weight = scores * scale
        if RENORMALISE:
            weight = weight / (tl.sum(tl.where(slot >= 0, scores, 0), 1) + 1e-20)[:, None]
        entry = local[:, None] * K + slot
        tl.store(weights + entry, weight, mask=picked)
        tl.store(indices + entry, tl.broadcast_to(expert[None, :], slot.shape).to(tl.int64), picked)
        tl.store(ranks + entry, rank, mask=picked)
        weights, indices, ranks = weights + BT * K, indices + BT * K, ranks + BT * K
        counted = there
        if PADDED:
            counted = tl.load(valid + token, mask=there, other=0) != 0
            chosen += tl.sum(tl.where(counted[:, None], taken, 0), 0)
        share = tl.where(counted[:, None], scores / norm[:, None], 0)
        entropy += tl.where(share > 0, -share * tl.log(tl.where(share > 0, share, 1)), 0)
        probability += share
        square += tl.where(counted, logsumexp * logsumexp, 0)
        tokens += counted.to(tl.int32)
    tl.store(counts + run * EP + expert, seen)
    scalars = tl.where(expert == 0, tl.sum(tl.sum(entropy, 1), 0), 0)
    scalars += tl.where(expert == 1, tl.sum(square, 0), 0)
    scalars += tl.where(expert == 2, tl.sum(tokens, 0), 0)
    out = sums + run * 3 * EP + expert
    tl.store(out, (chosen if PADDED else seen).to(scalars.dtype))
    tl.store(out + EP, tl.sum(probability, 0))
    tl.store(out + 2 * EP, scalars)


@triton.jit(do_not_specialize=["T", "span"])
def differentiate(
    logits, valid, indices, dweights, dsums, dlogits, T, span, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits [T, E] from those of the weights and of the sums [3, EP], at once."""
    run = tl.program_id(0)
    expert = tl.arange(0, EP)
    dprobability = tl.load(dsums + EP + expert)
    dsquare = tl.load(dsums + 2 * EP + 1)
    for start in range(run * span, tl.minimum(T, (run + 1) * span), BT):
        token = start + tl.arange(0, BT)
        there = token < T
        scores, norm, logsumexp, x = _score(logits, token, there, expert, E, SIGMOID)
        taken = tl.zeros((BT, EP), tl.int1)
        dscore = tl.zeros((BT, EP), x.dtype)
        for k in tl.static_range(K):
            entry = token.to(tl.int64) * K + k
            hit = expert[None, :] == tl.load(indices + entry, mask=there, other=E)[:, None]
            dweight = tl.load(dweights + entry, mask=there, other=0)
            dscore = tl.where(hit, scale * dweight[:, None], dscore)
            taken = taken | hit
        if RENORMALISE:
            total = tl.sum(tl.where(taken, scores, 0), 1) + 1e-20
            mean = tl.sum(dscore * scores, 1) / total
            dscore = tl.where(taken, (dscore - mean[:, None]) / total[:, None], 0)
        counted = there
        if PADDED:
            counted = tl.load(valid + token, mask=there, other=0) != 0
        dshare = tl.where(counted[:, None], dprobability[None, :], 0)
        softmax = tl.where((expert < E)[None, :], tl.exp(x - logsumexp[:, None]), 0)
        if SIGMOID:
            mean = tl.sum(dshare * scores, 1) / norm
            dscore += (dshare - mean[:, None]) / norm[:, None]
            dlogit = dscore * scores * (1 - scores)
        else:
            dscore += dshare
            dlogit = scores * (dscore - tl.sum(dscore * scores, 1)[:, None])
        dlogit += softmax * tl.where(counted, 2 * dsquare * logsumexp, 0)[:, None]
        out = dlogits + token.to(tl.int64)[:, None] * E + expert[None, :]
        tl.store(out, dlogit, mask=there[:, None] & (expert < E)[None, :])


@triton.jit(do_not_specialize=["T", "span"])
def count(
    indices, ranks, counts, T, span,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """As `choose`, for indices [T, K] that were chosen elsewhere; E itself means nowhere.

    A token may name an expert twice: the earlier entry comes first.
    """
    run = tl.program_id(0)
    expert = tl.arange(0, EP)
    seen = tl.zeros((EP,), tl.int32)
    for start in range(run * span, tl.minimum(T, (run + 1) * span), BT):
        token = start + tl.arange(0, BT)
        there = token < T
        taken = tl.zeros((BT, EP), tl.int32)
        for k in tl.static_range(K):
            index = tl.load(indices + token.to(tl.int64) * K + k, mask=there, other=E)
            tl.device_assert((index >= 0) & (index <= E), "an expert index outside 0..E")
            index = index.to(tl.int32)
            hit = (expert[None, :] == index[:, None]) & (expert < E)[None, :]
            taken += hit.to(tl.int32)
        place = tl.cumsum(taken, 0) - taken + seen[None, :]
        for k in tl.static_range(K):
            index = tl.load(indices + token.to(tl.int64) * K + k, mask=there, other=E).to(tl.int32)
            hit = (expert[None, :] == index[:, None]) & (expert < E)[None, :]
            rank = tl.sum(tl.where(hit, place, 0), 1)
            tl.store(ranks + token.to(tl.int64) * K + k, rank, mask=there)
            place += hit.to(tl.int32)
        seen += tl.sum(taken, 0)
    tl.store(counts + run * EP + expert, seen)


@triton.jit
def _spread(total, tiles, order, U, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
            BU: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """The tile map (expert | block << 12, -1 where there is none) and experts by falling count."""
    expert = tl.arange(0, EP)
    blocks = (total + BM - 1) // BM
    ends = tl.cumsum(blocks, 0)
    for start in range(tl.program_id(0) * BU, U, tl.num_programs(0) * BU):
        tile = start + tl.arange(0, BU)
        owner = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        first = tl.gather(ends - blocks, tl.minimum(owner, EP - 1), 0)
        packed = tl.where(owner < E, owner | ((tile - first) << 12), -1)
        tl.store(tiles + tile, packed, mask=tile < U)
    for start in range(tl.program_id(0) * BO, E, tl.num_programs(0) * BO):
        mine = start + tl.arange(0, BO)
        own = tl.gather(total, tl.minimum(mine, EP - 1), 0)
        more = total[None, :] > own[:, None]
        same = (total[None, :] == own[:, None]) & (expert[None, :] < mine[:, None])
        before = tl.sum(((more | same) & (expert < E)[None, :]).to(tl.int32), 1)
        tl.store(order + before, mine, mask=mine < E)


@triton.jit
def _add_up(sums, loads, part: tl.constexpr, R, EP: tl.constexpr, BR: tl.constexpr):
    """loads [3, EP]: one row of every run's sums [R, 3, EP] added up."""
    expert = tl.arange(0, EP)
    acc = tl.zeros((BR, EP), sums.dtype.element_ty)
    for start in range(0, R, BR):
        row = start + tl.arange(0, BR)
        at = sums + (row[:, None] * 3 + part) * EP + expert[None, :]
        acc += tl.load(at, mask=(row < R)[:, None], other=0)
    tl.store(loads + part * EP + expert, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["P", "run_pairs", "R", "share", "U"])
def place(
    indices, ranks, counts, sums, places, pairs, offsets, tiles, order, loads, P, run_pairs, R,
    share, U, E: tl.constexpr, EP: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    BM: tl.constexpr, BU: tl.constexpr, BO: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Every pair's place in the sorted list, the list, its offsets [E + 1] and its tiles.

    A program places the pairs of `share` runs.
    """
    first = tl.program_id(0) * share
    expert = tl.arange(0, EP)
    earlier, later = tl.zeros((BR, EP), tl.int32), tl.zeros((BR, EP), tl.int32)
    for start in range(0, R, BR):
        row = start + tl.arange(0, BR)
        at = counts + row[:, None] * EP + expert[None, :]
        tile = tl.load(at, mask=(row < R)[:, None], other=0)
        earlier += tl.where((row < first)[:, None], tile, 0)
        later += tl.where((row < first)[:, None], 0, tile)
    before = tl.sum(earlier, 0)
    total = before + tl.sum(later, 0)
    ends = tl.cumsum(total, 0)
    base = ends - total + before
    for run in range(first, tl.minimum(first + share, R)):
        end = tl.minimum(P, (run + 1) * run_pairs)
        for start in range(run * run_pairs, end, BP):
            pair = start + tl.arange(0, BP)
            there = pair < end
            index = tl.load(indices + pair, mask=there, other=E).to(tl.int32)
            rank = tl.load(ranks + pair, mask=there, other=0)
            goes = there & (index < E)
            spot = tl.gather(base, tl.minimum(index, EP - 1), 0) + rank
            tl.store(places + pair, tl.where(goes, spot, -1), mask=there)
            tl.store(pairs + spot, pair, mask=goes)
        base += tl.load(counts + run * EP + expert)
    _spread(total, tiles, order, U, E, EP, BM, BU, BO)
    if tl.program_id(0) == 0:
        tl.store(offsets + expert, expert * 0, mask=expert == 0)
        tl.store(offsets + 1 + expert, ends, mask=expert < E)
    if SUMS:
        for part in tl.static_range(3):
            if tl.program_id(0) == part % tl.num_programs(0):
                _add_up(sums, loads, part, R, EP, BR)


class _Runs:
    """How T tokens are divided among programs: several to a multiprocessor, for what takes long is
    waiting for one reduction after another.
    """

    def __init__(self, tokens: int, experts: int, device: torch.device) -> None:
        check_experts(experts)
        self.experts_2 = max(16, triton.next_power_of_2(experts))
        self.tile = max(1, min(32, TILE // self.experts_2))  # tokens looked at together
        tiles = max(1, triton.cdiv(tokens, self.tile))
        processors = num_processors(device)
        self.span = triton.cdiv(tiles, min(tiles, PER_PROCESSOR * processors)) * self.tile
        self.runs = max(1, triton.cdiv(tokens, self.span))
        self.share = triton.cdiv(self.runs, processors)


def route(
    logits: Tensor,
    k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """Weights [T, K], indices [T, K] int64, sums [3, E'] and the plan of logits [T, E].

    `sums`: choices and probabilities per expert, then entropy, squared logsumexp and tokens, each
    summed over `valid` tokens [T]; E' is E or more. float32 or float64.
    """
    tokens, experts = logits.shape
    runs = _Runs(tokens, experts, logits.device)
    weights = logits.new_empty(tokens, k)
    indices = logits.new_empty(tokens, k, dtype=torch.int64)
    ranks = logits.new_empty(tokens, k, dtype=torch.int32)
    counts = ranks.new_empty(runs.runs, runs.experts_2)
    sums = logits.new_empty(runs.runs, 3, runs.experts_2)
    choose[(runs.runs,)](
        logits, bias, valid, weights, indices, ranks, counts, sums, tokens, runs.span, scale,
        E=experts, EP=runs.experts_2, K=k, BT=runs.tile,
        SIGMOID=sigmoid, RENORMALISE=renormalise, BIASED=bias is not None,
        PADDED=valid is not None, num_warps=WARPS,
    )  # fmt: skip
    loads = logits.new_empty(3, runs.experts_2)
    return weights, indices, loads, _place(indices, ranks, counts, runs, experts, sums, loads)


def route_backward(
    dweights: Tensor,
    dloads: Tensor,
    logits: Tensor,
    indices: Tensor,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    valid: Tensor | None,
) -> Tensor:
    """Gradient of the logits [T, E]."""
    tokens, experts = logits.shape
    runs = _Runs(tokens, experts, logits.device)
    dlogits = torch.empty_like(logits)
    differentiate[(runs.runs,)](
        logits, valid, indices, dweights, dloads, dlogits, tokens, runs.span, scale,
        E=experts, EP=runs.experts_2, K=indices.shape[1], BT=runs.tile, SIGMOID=sigmoid,
        RENORMALISE=renormalise, PADDED=valid is not None, num_warps=WARPS,
    )  # fmt: skip
    return dlogits


def plan(indices: Tensor, num_experts: int) -> Plan:
    """The plan of indices [T, K] that were chosen elsewhere, in the same two launches."""
    tokens, k = indices.shape
    indices = indices.contiguous()
    runs = _Runs(tokens, num_experts, indices.device)
    ranks = torch.empty_like(indices, dtype=torch.int32)
    counts = ranks.new_empty(runs.runs, runs.experts_2)
    count[(runs.runs,)](
        indices, ranks, counts, tokens, runs.span, E=num_experts, EP=runs.experts_2, K=k,
        BT=runs.tile, num_warps=8, debug=True,
    )  # fmt: skip
    return _place(indices, ranks, counts, runs, num_experts, None, None)


def _place(
    indices: Tensor,
    ranks: Tensor,
    counts: Tensor,
    runs: _Runs,
    experts: int,
    sums: Tensor | None,
    loads: Tensor | None,
) -> Plan:
    pairs, k = indices.numel(), indices.shape[1]
    rows = block_rows(pairs, experts)
    tiles = tile_bound(pairs, experts, rows)
    new = ranks.new_empty
    result = Plan(torch.empty_like(ranks), new(pairs), new(experts + 1), new(tiles), new(experts))
    place[(triton.cdiv(runs.runs, runs.share),)](
        indices, ranks, counts, sums, *result, loads, pairs, runs.span * k, runs.runs, runs.share,
        tiles, E=experts, EP=runs.experts_2, BR=max(1, 4096 // runs.experts_2), BP=1024, BM=rows,
        BU=max(1, 4096 // runs.experts_2), BO=max(1, 4096 // runs.experts_2),
        SUMS=sums is not None, num_warps=8,
    )  # fmt: skip
    return result
