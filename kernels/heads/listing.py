"""Triton kernels that list the heads that are on: the rows attention.py goes through.

Two launches, no sort: every part of a segment counts its heads that are on; then each adds up what
comes before it and writes its own. A segment is a (batch, KV head) with the positions in order and
its M query heads within each; `rows` and the rest are heads/triton.py's Rows.

S positions, N query heads, G KV heads, M = N / G.
"""

import triton
import triton.language as tl


@triton.jit
def _on(on, segment, entry, S, N: tl.constexpr, G: tl.constexpr):
    """1 for entries of a segment that are on, 0 for those that are off or past its end."""
    M: tl.constexpr = N // G
    position, head = entry // M, (segment % G) * M + entry % M
    at = ((segment // G).to(tl.int64) * S + position) * N + head
    return (tl.load(on + at, mask=position < S, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def count_on(
    on, counts, S, N: tl.constexpr, G: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """counts [segments, parts]: how many of each part's entries are on."""
    part, segment = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, PART, BLOCK):
        total += _on(on, segment, part * PART + start + tl.arange(0, BLOCK), S, N, G)
    tl.store(counts + segment * tl.num_programs(0) + part, tl.sum(total, 0))


@triton.jit(do_not_specialize=["S", "most", "segments"])
def place_on(
    on, counts, rows, ends, starts, S, most, segments,
    N: tl.constexpr, G: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """rows [most], where segments begin (`ends` [segments + 1]), and `starts` [segments, S]."""
    M: tl.constexpr = N // G
    part, segment = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    mine = segment * parts + part
    before = tl.zeros((BC,), tl.int32)
    for start in range(0, mine, BC):
        at = start + tl.arange(0, BC)
        before += tl.load(counts + at, mask=at < mine, other=0)
    seen = tl.sum(before, 0)
    if part == 0:
        tl.store(ends + segment, tl.minimum(seen, most))
    for start in range(0, PART, BLOCK):
        entry = part * PART + start + tl.arange(0, BLOCK)
        there = _on(on, segment, entry, S, N, G)
        slot = seen + tl.cumsum(there, 0) - there
        tl.store(rows + slot, entry, mask=(there > 0) & (slot < most))
        first = (entry % M == 0) & (entry // M < S)
        begin = starts + segment * S + entry // M
        tl.store(begin, tl.minimum(slot, most), mask=first)
        seen += tl.sum(there, 0)
    if mine == segments * parts - 1:
        tl.store(ends + segments, tl.minimum(seen, most))
