"""Attention over the heads that are on, on a CPU: torch's own, some rows at a time.

A row is a (position, head) pair. Those of one KV head are taken in order of position, so that a run
of them sees the keys up to its last position and no others are multiplied. KV heads with about as
many rows go together, as many as there are threads, for torch's kernel gives a thread whole heads.

B batch, S queries, L keys, N query heads, G KV heads, M = N / G, d head size, W KV heads that go
together, R rows of each, P of them real.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
ROWS = 128  # of a run: fewer waste less above the diagonal, and more time on calls


class Run(NamedTuple):
    """Rows of some KV heads, and what they see of their keys."""

    query: tuple[Tensor, Tensor, Tensor]  # sequences [W, 1], positions, heads [W, R]: of [B, S, N]
    key: tuple[Tensor, slice, Tensor]  # sequences [W], keys, KV heads [W]: of [B, L, G]
    there_WR: Tensor | None  # False for rows that fill up, if some do
    mask: Tensor  # [1, W, R, keys], added to the scores

    def rows(self, of: Tensor) -> Tensor:
        return of[self.query][None]

    def keys(self, of: Tensor) -> Tensor:
        return of[self.key][None]

    def put(self, into: Tensor, rows: Tensor) -> None:
        """Write rows [1, W, R, …] where they belong, without those that fill up."""
        at, values = self.query, rows[0]
        if self.there_WR is not None:
            at = tuple(index.expand_as(self.there_WR)[self.there_WR] for index in at)  # type: ignore
            values = values[self.there_WR]
        into[at] = values


def runs(
    on_BSN: Tensor, first_BS: Tensor, keys: int, groups: int, dtype: torch.dtype
) -> Iterator[Run]:
    """The rows that are on and see something."""
    batch, length, heads = on_BSN.shape
    members, shift = heads // groups, keys - length
    sees_BS = first_BS <= torch.arange(length) + shift
    on_BGSM = (on_BSN & sees_BS[..., None]).view(batch, length, groups, members).transpose(1, 2)
    on_CX = on_BGSM.reshape(batch * groups, length * members)
    count_C = on_CX.sum(1)
    if not len(count_C):
        return
    listed_C, row = on_CX.nonzero(as_tuple=True)
    place = torch.arange(len(row)) - (count_C.cumsum(0) - count_C)[listed_C]
    row_CX = row.new_zeros(batch * groups, int(count_C.max()))
    row_CX[listed_C, place] = row
    for some_W in torch.argsort(count_C, descending=True, stable=True).split(
        torch.get_num_threads()
    ):
        counts = count_C[some_W].tolist()
        where = some_W // groups, some_W % groups
        for start in range(0, counts[0], ROWS):
            row_WR = row_CX[some_W, start : min(start + ROWS, counts[0])]
            there_WR = None
            if counts[-1] < start + row_WR.shape[1]:
                there_WR = torch.arange(start, start + row_WR.shape[1]) < count_C[some_W, None]
            place_WR = row_WR // members
            low_WR, high_WR = first_BS[where[0][:, None], place_WR], place_WR + shift
            begin, end = int(low_WR.min()), int(high_WR.max()) + 1
            mask = torch.zeros(*row_WR.shape, end - begin, dtype=dtype)
            some_see = max(int(high_WR.min()) + 1, begin)  # keys before it are behind every row
            unseen = torch.arange(some_see, end) > high_WR[..., None]
            mask[..., some_see - begin :].masked_fill_(unseen, -torch.inf)
            if int(low_WR.max()) > begin:
                mask.masked_fill_(torch.arange(begin, end) < low_WR[..., None], -torch.inf)
            if there_WR is not None:
                mask[~there_WR] = 0  # what fills up sees all, or it would be nan
            head_WR = where[1][:, None] * members + row_WR % members
            query = where[0][:, None], place_WR, head_WR
            yield Run(query, (where[0], slice(begin, end), where[1]), there_WR, mask[None])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    scale: float,
    gate: Tensor | None,
    on: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated outputs [B, S, N, d], the same ungated (empty without a gate), logsumexps [B, S, N]."""
    raw = torch.zeros(q.shape, dtype=q.dtype)
    sums = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for run in runs(on, first, k.shape[1], k.shape[2], q.dtype):
        out, log = aten._scaled_dot_product_flash_attention_for_cpu(
            run.rows(q), run.keys(k), run.keys(v), 0.0, False, attn_mask=run.mask, scale=scale
        )
        run.put(raw, out)
        run.put(sums, log)
    if gate is None:
        return raw, raw.new_empty(0), sums
    gate = torch.where(on, gate, 0)  # what is off is 0, though its gate be nan
    return raw * gate[..., None].to(raw.dtype), raw, sums


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    scale: float,
    gate: Tensor | None,
    on: Tensor,
    raw: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate (empty without one); `raw` is the ungated output."""
    dgate = sums.new_empty(0)
    if gate is not None:
        dgate = (dout.to(sums.dtype) * raw.to(sums.dtype)).sum(-1).to(gate.dtype)
        dgate.masked_fill_(~on, 0)
        dout = dout * gate[..., None].to(dout.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype)
    dk, dv = (torch.zeros(t.shape, dtype=sums.dtype) for t in (k, v))
    for run in runs(on, first, k.shape[1], k.shape[2], q.dtype):
        dout_R = run.rows(dout)
        if run.there_WR is not None:
            dout_R.masked_fill_(~run.there_WR[..., None], 0)
        parts = run.rows(q), run.keys(k), run.keys(v), run.rows(raw), run.rows(sums)
        dq_R, dk_L, dv_L = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_R, *parts, 0.0, False, attn_mask=run.mask, scale=scale
        )
        run.put(dq, dq_R)
        sequence_W, keys, group_W = run.key
        for w, (b, g) in enumerate(zip(sequence_W.tolist(), group_W.tolist(), strict=True)):
            dk[b, keys, g] += dk_L[0, w]
            dv[b, keys, g] += dv_L[0, w]
    return dq, dk.to(k.dtype), dv.to(v.dtype), dgate
