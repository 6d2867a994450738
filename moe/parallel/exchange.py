"""How tokens reach experts that other ranks hold: out to them and back, once per rank.

T tokens, H hidden, K chosen, W ranks of the group, N rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from moe.kernels import ops


class AllToAll:
    """The dispatcher of a group whose ranks hold E / W experts each, in order.

    A token travels once to each rank that holds one of its experts, and what that rank made of it
    comes back added up. Ranks and experts without tokens take part like all others. The host waits
    for the device once, to learn how many rows go where.
    """

    def __init__(self, group: ProcessGroup, experts: int) -> None:
        self.group, self.experts, self.size = group, experts, distributed.get_world_size(group)
        self.sent_rows = 0  # to other ranks, forward, since it was last set to 0
        self.rank = distributed.get_rank(group)

    def __call__(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        x_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        plan: ops.Plan | None = None,
    ) -> Tensor:
        packed = ops.pack(x_TH, indices_TK, weights_TK, self.experts, self.size)
        send_W = packed.offset_W1.diff()
        receive_W = torch.empty_like(send_W)
        distributed.all_to_all_single(receive_W, send_W, group=self.group)
        send, receive = torch.stack([send_W, receive_W]).tolist()
        count, bound = sum(send), len(packed.rows_NH)
        self.sent_rows += count - send[self.rank]
        # indices and weights need 4 bytes each on the way
        rows = _exchange(packed.rows_NH[:count], send, receive, self.group)
        indices = _exchange(packed.indices_NK[:count].int(), send, receive, self.group).long()
        weights = _exchange(packed.weights_NK[:count], send, receive, self.group)
        back = _exchange(experts(rows, indices, weights), receive, send, self.group)
        rest = back.new_zeros(bound - count, back.shape[1])
        return ops.unpack(torch.cat([back, rest]), packed)


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


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    # as a function even without gradient: every rank must take part in the backward pass
    return _Exchange.apply(rows, send, receive, group)  # type: ignore[no-any-return]


def _swap(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    distributed.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out
