"""Attention with a gate per head in Triton, over all rows or over those that are on.

B batch, S queries, L keys, N query heads, G KV heads, M = N / G, d head size, R rows that are on.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moe.kernels import device
from moe.kernels.heads import attention
from moe.kernels.tiling import tiling

LOG2E = 1.4426950408889634


class Rows(NamedTuple):
    """The (position, head) pairs that are on, in segments per (batch, KV head). All int32."""

    row_R: Tensor  # position · M + head within the group, ascending in a segment
    segment: Tensor  # [B · G + 1], where each begins
    start: Tensor  # [B · G, S], the first row of a segment at or after a position


def rows_of(on_BSN: Tensor, groups: int, most: int) -> Rows:
    """The rows of a mask; `most` is how many there can be, so that nothing asks the device.

    A mask with more (a gate of nan is on everywhere) loses those after `most`.
    """
    batch, length, heads = on_BSN.shape
    on = on_BSN.view(batch, length, groups, heads // groups).permute(0, 2, 1, 3)
    flat = on.reshape(batch * groups, -1).int()
    place = flat.cumsum(1)
    count = place[:, -1]
    segment = torch.zeros(batch * groups + 1, dtype=torch.int32, device=on_BSN.device)
    segment[1:] = count.cumsum(0)
    slot = torch.where(flat > 0, segment[:-1, None] + place - 1, most).clamp(max=most)
    row = torch.arange(flat.shape[1], dtype=torch.int32, device=on_BSN.device)
    rows = torch.empty(most + 1, dtype=torch.int32, device=on_BSN.device)
    rows[slot.flatten().long()] = row.repeat(batch * groups)  # what is off goes past the end
    before = (place - flat).view(batch * groups, length, -1)[:, :, 0]
    start = (segment[:-1, None] + before).clamp(max=most)
    return Rows(rows[:-1], segment.clamp(max=most), start.int().contiguous())


class _Launch:
    """What the three kernels are given alike."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, rows: Rows | None
    ) -> None:
        self.q, self.k, self.v, self.first, self.rows = q, k, v, first, rows
        self.batch, self.length, self.heads, self.size = q.shape
        self.keys, self.groups = k.shape[1:3]
        self.scale = scale
        self.strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        self.listed = (None, None) if rows is None else (rows.row_R, rows.segment)
        self.kept = (
            self.batch * self.heads * self.length if rows is None else len(rows.row_R)
        )  # rows with sums of their own

    def arguments(self, kernel: str, gated: bool) -> dict[str, Any]:
        wide = max(16, triton.next_power_of_2(self.size))
        found = tiling(kernel, self.q.device, self.q.dtype, wide, (self.size, self.size))
        return {
            "N": self.heads, "G": self.groups, "D": self.size, "DP": wide,
            "SPARSE": self.rows is not None, "GATED": gated,
            "BM": found.block_m, "BN": found.block_n,
            "UPCAST": device.upcast(self.q.dtype), "PRECISION": device.precision(),
            "ACC": device.accumulator(self.q.dtype), "num_warps": found.warps,
            "num_stages": found.stages,
        }  # fmt: skip

    def grid(self, block: int) -> tuple[int, int]:
        """Tiles of rows, as if all were on, by (batch, KV head)."""
        tiles = triton.cdiv(self.length * self.heads // self.groups, block)
        return tiles, self.batch * self.groups


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
    launch = _Launch(q, k, v, first, scale, rows)
    make = torch.zeros if rows is not None else torch.empty
    shape = launch.batch, launch.length, launch.heads, launch.size
    out = make(shape, dtype=q.dtype, device=q.device)
    raw = make(shape, dtype=q.dtype, device=q.device) if gate is not None else out.new_empty(0)
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = torch.empty(launch.kept, dtype=wide, device=q.device)
    arguments = launch.arguments("attend", gate is not None)
    if out.numel():
        attention.attend[launch.grid(arguments["BM"])](
            q, k, v, gate, first, *launch.listed, out, raw, sums, *launch.strides,
            launch.length, launch.keys, scale * LOG2E, **arguments,
        )  # fmt: skip
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
    launch = _Launch(q, k, v, first, scale, rows)
    make = torch.zeros if rows is not None else torch.empty
    dq = make(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dgate = sums.new_empty(0)
    if gate is not None:
        dgate = make(gate.shape, dtype=gate.dtype, device=q.device)
    if not dout.numel():
        return dq, dk.zero_(), dv.zero_(), dgate
    deltas = torch.empty_like(sums)
    arguments = launch.arguments("attend_dq", gate is not None)
    steps = launch.length, launch.keys, scale * LOG2E, scale
    attention.attend_dq[launch.grid(arguments["BM"])](
        dout, q, k, v, gate, first, *launch.listed, raw, sums, dq, dgate, deltas,
        *launch.strides, *steps, **arguments,
    )  # fmt: skip
    arguments = launch.arguments("attend_dkv", gate is not None)
    starts = None if rows is None else rows.start
    blocks = math.ceil(launch.keys / arguments["BN"])
    attention.attend_dkv[(blocks, launch.batch * launch.groups)](
        dout, q, k, v, gate, first, *launch.listed, starts, sums, deltas, dk, dv,
        *launch.strides, *steps, **arguments,
    )  # fmt: skip
    return dq, dk, dv, dgate
