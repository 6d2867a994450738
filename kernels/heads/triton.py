"""Attention with a gate per head in Triton, over all rows or over those that are on.

B batch, S queries, L keys, N query heads, G KV heads, M = N / G, d head size, R rows that are on.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import device
from moe.kernels.heads import attention, listing
from moe.kernels.tiling import tiling

LOG2E = 1.4426950408889634


class Rows(NamedTuple):
    """The (position, head) pairs that are on, in segments per (batch, KV head). All int32."""

    row_R: Tensor  # position · M + head within the group, ascending in a segment
    segment: Tensor  # [B · G + 1], where each begins
    start: Tensor  # [B · G, S], the first row of a segment at or after a position


def rows_of(on_BSN: Tensor, groups: int, most: int) -> Rows:
    """The rows of a mask in two launches; `most` is how many there can be, so that nothing asks
    the device. A mask with more (a gate of nan is on everywhere) loses those after `most`.
    """
    batch, length, heads = on_BSN.shape
    on = on_BSN.contiguous()
    segments, size = batch * groups, length * (heads // groups)
    # few enough parts that each can add up all that come before it
    part = max(1024, triton.next_power_of_2(triton.cdiv(segments * size, 4096)))
    parts = triton.cdiv(size, part)
    new = functools.partial(torch.empty, dtype=torch.int32, device=on.device)
    counts, rows = new(segments, parts), Rows(new(most), new(segments + 1), new(segments, length))
    sizes = {"N": heads, "G": groups, "PART": part, "BLOCK": 1024}
    listing.count_on[(parts, segments)](on, counts, length, **sizes)
    listing.place_on[(parts, segments)](
        on, counts, *rows, length, most, segments, **sizes, BC=min(4096, _power(segments * parts)),
    )  # fmt: skip
    return rows


def _power(number: int) -> int:
    return max(16, triton.next_power_of_2(number))


class Launch:
    """The three kernels of attention over given tensors."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        scale: float,
        gate: Tensor | None,
        rows: Rows | None,
    ) -> None:
        self.q, self.k, self.v, self.first, self.gate, self.rows = q, k, v, first, gate, rows
        self.batch, self.length, self.heads, self.size = q.shape
        self.keys, self.groups = k.shape[1:3]
        self.scales = scale * LOG2E, scale
        strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        self.shape = *strides, self.length, self.keys
        self.listed = (None, None) if rows is None else (rows.row_R, rows.segment)
        # rows with sums of their own
        self.kept = self.batch * self.heads * self.length if rows is None else len(rows.row_R)

    def new(self, like: Tensor) -> Tensor:
        """Memory for what rows are written to: with heads that are off, zeros."""
        make = torch.empty if self.rows is None else torch.zeros
        return make(like.shape, dtype=like.dtype, device=like.device)

    def arguments(self, kernel: str) -> dict[str, Any]:
        wide = _power(self.size)
        found = tiling(kernel, self.q.device, self.q.dtype, wide, (self.size, self.size))
        return {
            "N": self.heads, "G": self.groups, "D": self.size, "DP": wide,
            "SPARSE": self.rows is not None,
            "BM": found.block_m, "BN": found.block_n,
            "UPCAST": device.upcast(self.q.dtype), "PRECISION": device.precision(),
            "ACC": device.accumulator(self.q.dtype),
        } | found.options()  # fmt: skip

    def grid(self, block: int) -> tuple[int, int]:
        """Tiles of rows, as if all were on, by (batch, KV head)."""
        tiles = triton.cdiv(self.length * self.heads // self.groups, block)
        return tiles, self.batch * self.groups

    def attend(self, out: Tensor, raw: Tensor, sums: Tensor) -> None:
        arguments = self.arguments("attend") | {"GATED": self.gate is not None}
        attention.attend[self.grid(arguments["BM"])](
            self.q, self.k, self.v, self.gate, self.first, *self.listed, out, raw, sums,
            *self.shape, self.scales[0], **arguments,
        )  # fmt: skip

    def attend_dq(
        self,
        dout: Tensor,
        raw: Tensor,
        sums: Tensor,
        dq: Tensor,
        dgate: Tensor,
        draw: Tensor,
        deltas: Tensor,
    ) -> None:
        arguments = self.arguments("attend_dq") | {"GATED": self.gate is not None}
        attention.attend_dq[self.grid(arguments["BM"])](
            dout, self.q, self.k, self.v, self.gate, self.first, *self.listed, raw, sums, dq,
            dgate, draw, deltas, *self.shape, *self.scales, **arguments,
        )  # fmt: skip

    def attend_dkv(
        self, draw: Tensor, sums: Tensor, deltas: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        q, arguments = self.q, self.arguments("attend_dkv")
        span = max(step * size for step, size in zip(q.stride()[1:3], q.shape[1:3], strict=True))
        arguments["INDEX"] = tl.int64 if max(span, q[0].numel()) >= 2**31 else tl.int32
        starts = None if self.rows is None else self.rows.start
        width = arguments["BN"]
        blocks = triton.cdiv(self.keys, width)
        # positions up to the last that sees a key of the block: none after it begins before it ends
        soonest_BS = self.first.flip(1).cummin(1).values.flip(1)
        ends_J = torch.arange(1, blocks + 1, dtype=torch.int32, device=q.device) * width - 1
        ends_BJ = ends_J.repeat(self.batch, 1)
        until_BJ = torch.searchsorted(soonest_BS, ends_BJ, right=True, out_int32=True)
        attention.attend_dkv[(blocks, self.batch * self.groups)](
            draw, q, self.k, self.v, self.first, self.first.amax(1), until_BJ, *self.listed,
            starts, sums, deltas, dk, dv, *self.shape, *self.scales, **arguments,
        )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    scale: float,
    gate: Tensor | None,
    rows: Rows | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated outputs [B, S, N, d], the same ungated (empty without a gate), and the rows' sums."""
    launch = Launch(q, k, v, first, scale, gate, rows)
    out = launch.new(q)
    raw = out.new_empty(0) if gate is None else launch.new(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = torch.empty(launch.kept, dtype=wide, device=q.device)
    if out.numel():
        launch.attend(out, raw, sums)
    return out, raw, sums


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    scale: float,
    gate: Tensor | None,
    rows: Rows | None,
    raw: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate (empty without one); `raw` is the ungated output."""
    launch = Launch(q, k, v, first, scale, gate, rows)
    dq = launch.new(q)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dgate = sums.new_empty(0) if gate is None else launch.new(gate)
    if not dout.numel():
        return dq, dk.zero_(), dv.zero_(), dgate
    deltas = torch.empty_like(sums)
    draw = dout if gate is None else torch.empty_like(dout)
    launch.attend_dq(dout, raw, sums, dq, dgate, draw, deltas)
    launch.attend_dkv(draw, sums, deltas, dk, dv)
    return dq, dk, dv, dgate
