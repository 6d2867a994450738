"""How tokens reach experts that other ranks hold: out to them and back, once per rank.

T tokens, H hidden, K chosen, W ranks of the group, N rows.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from moe.kernels import ops


class AllToAll:
    """The dispatcher of a group whose ranks hold E / W experts each, in order.

    A token travels once to each rank that holds one of its experts, and what that rank made of it
    comes back added up; `meanwhile` runs on the way back, in the backward pass too. Ranks and
    experts without tokens take part like all others. The host waits for the device once, to learn
    how many rows go where.

    The counters go on until set to 0; what is computed again for the backward pass travels again
    and is counted again.
    """

    def __init__(self, group: ProcessGroup, experts: int) -> None:
        self.group, self.experts, self.size = group, experts, distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)
        self.sent_rows = 0  # to other ranks, out to their experts
        self.sent_bytes = 0  # of these rows, with the indices and weights that go with them
        # by the host for rows on the way back and, in the backward pass, for their gradients;
        # NCCL makes the device wait instead
        self.waited_seconds = 0.0

    # how many rows go where is known when they go: there is no graph to compile around that
    @torch.compiler.disable
    def __call__(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        x_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        plan: ops.Plan | None = None,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        packed = self.pack(x_TH, indices_TK, weights_TK)
        send_W = packed.offset_W1.diff()
        receive_W = torch.empty_like(send_W)
        distributed.all_to_all_single(receive_W, send_W, group=self.group)
        send, receive = self.counts(torch.stack([send_W, receive_W]), packed)
        count, bound = sum(send), len(packed.rows_NH)
        there = send, receive, self.group
        # functions even without gradient: every rank must take part in the backward pass
        rows: Tensor = _Exchange.apply(packed.rows_NH[:count], *there)  # type: ignore[assignment]
        which = packed.indices_NK[:count], packed.weights_NK[:count]
        kind = label_type(self.experts // self.size)
        indices, weights = _Labels.apply(*which, kind, *there)
        self._count(count - send[self.rank], packed, kind)
        journey = _Journey(self, receive, send)
        ticket = _Leave.apply(experts(rows, indices, weights), journey)
        # between the two also for autograd, which goes by age: it runs while gradients travel
        beside = None if meanwhile is None else meanwhile()
        back: Tensor = _Arrive.apply(ticket, journey)  # type: ignore[assignment]
        rest = back.new_zeros(bound - count, back.shape[1])
        y_TH = ops.unpack(torch.cat([back, rest]), packed)
        return y_TH if beside is None else y_TH + beside

    def pack(self, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> ops.Packed:
        return ops.pack(x_TH, indices_TK, weights_TK, self.experts, self.size)

    def counts(self, rows_2W: Tensor, packed: ops.Packed) -> tuple[list[int], list[int]]:
        """Rows to each rank and from each, on the host."""
        send, receive = rows_2W.tolist()
        return send, receive

    def _count(self, remote: int, packed: ops.Packed, kind: torch.dtype) -> None:
        rows_NH, weights_NK = packed.rows_NH, packed.weights_NK
        label = weights_NK.element_size() + kind.itemsize
        one = rows_NH.shape[1] * rows_NH.element_size() + weights_NK.shape[1] * label
        self.sent_rows += remote
        self.sent_bytes += remote * one


class _Journey:
    """Rows on their way, while something else is done: out in the forward pass, their gradients
    home in the backward pass.
    """

    def __init__(self, owner: AllToAll, send: list[int], receive: list[int]) -> None:
        self.owner, self.send, self.receive = owner, send, receive
        self._under_way: tuple[distributed.Work, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, home: bool = False) -> None:
        send, receive = (self.receive, self.send) if home else (self.send, self.receive)
        rows = rows.contiguous()
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        work = distributed.all_to_all_single(
            out, rows, receive, send, group=self.owner.group, async_op=True
        )
        assert work is not None
        self._under_way = work, out, rows  # rows too: their memory is read until they arrive

    def wait(self) -> Tensor:
        """What arrived; on a GPU whatever the current stream does next is after it."""
        assert self._under_way is not None, "nothing is under way"
        work, out, _ = self._under_way
        begin = time.perf_counter()
        work.wait()
        self.owner.waited_seconds += time.perf_counter() - begin
        self._under_way = None
        return out


class _Leave(torch.autograd.Function):
    """Rows set off. The ticket to meet them with is empty: autograd, and whoever looks into its
    graph, never sees memory that is yet to be filled.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.start(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.wait(), None


class _Arrive(torch.autograd.Function):
    """The rows that a ticket is for; in the backward pass their gradients set off."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.journey.start(gradients[0], home=True)
        return gradients[0].new_empty(0), None


class _Exchange(torch.autograd.Function):
    """Rows to where they go; in the backward pass their gradients the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.how = receive, send, group
        return _swap(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(gradients[0], *ctx.how), None, None, None


class _Labels(torch.autograd.Function):
    """Each row's indices (as `kind` on the way) and weights, in one message of bytes."""

    @staticmethod
    def forward(
        ctx: Any,
        indices_NK: Tensor,
        weights_NK: Tensor,
        kind: torch.dtype,
        send: list[int],
        receive: list[int],
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.how = receive, send, group
        parts = weights_NK.contiguous(), indices_NK.to(kind)
        message = _swap(torch.cat([p.view(torch.uint8) for p in parts], 1), send, receive, group)
        first = weights_NK.shape[1] * weights_NK.element_size()
        # strides of a slice of one row, which is contiguous as it is, would not do
        weights, indices = (
            m.clone(memory_format=torch.contiguous_format).view(dtype)
            for m, dtype in ((message[:, :first], weights_NK.dtype), (message[:, first:], kind))
        )
        indices = indices.long()
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None, None, None]:
        return None, _swap(gradients[1], *ctx.how), None, None, None, None


def _swap(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    distributed.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def buffer_bytes(packed: ops.Packed, experts: int, sent: int, received: int) -> int:
    """What one exchange of a layer with `experts` a rank allocates on its way to them and back, for
    so many rows: `packed`; labels as they travel, and what they are made of; rows and labels that
    arrive, apart again, indices as numbers too; what comes back, and the same filled up. Most of it
    is gone when the layer is done.
    """
    bound, hidden = packed.rows_NH.shape
    row, weights = hidden * packed.rows_NH.element_size(), packed.weights_NK[:1].nbytes
    small = packed.indices_NK.shape[1] * label_type(experts).itemsize
    here = sum(t.nbytes for t in packed) + sent * (small + weights + small)
    arrived = received * (row + 2 * (weights + small) + packed.indices_NK[:1].nbytes)
    return here + arrived + 2 * bound * row


def label_type(experts: int) -> torch.dtype:
    """Of an index among a rank's experts, or none of them, on its way: a byte as a rule."""
    return torch.uint8 if experts < 256 else torch.int16
