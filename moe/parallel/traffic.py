"""What ranks send each other: counted as it is sent, and how long a described network takes for it.

with Wire() as wire:          # on real ranks, or on imagined ones
    loss.backward()
seconds(wire.calls[0], Network())
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
c10d = torch.ops.c10d


@dataclass(frozen=True, slots=True)
class Collective:
    """One call on one rank; bytes."""

    kind: Kind
    ranks: tuple[int, ...]  # of the world, those that take part
    rank: int  # this one
    size: int  # of what is gathered, reduced or, by this rank, sent; padding of its ends included
    sent: int  # by this rank to others, over a ring where it is no exchange


class Wire(TorchDispatchMode):
    """Every collective that runs under it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation in _READ:
            self.calls.append(_READ[operation](*args))
        return operation(*args, **(kwargs or {}))


def _call(kind: Kind, tensor: Tensor, group: Any, rounds: int = 1) -> Collective:
    ranks, rank = _members(group)
    size = tensor.numel() * tensor.element_size()
    return Collective(kind, ranks, rank, size, rounds * size * (len(ranks) - 1) // len(ranks))


def _all_to_all(out: Tensor, rows: Tensor, group: Any, _: list[int], send: list[int]) -> Collective:
    ranks, rank = _members(group)
    size = rows.numel() * rows.element_size()
    own = size // len(ranks)  # without counts every rank gets the same
    if send:
        own = size // max(sum(send), 1) * send[ranks.index(rank)]
    return Collective("all_to_all", ranks, rank, size, size - own)


def _members(group: Any) -> tuple[tuple[int, ...], int]:
    found = ProcessGroup.unbox(group)
    return tuple(distributed.get_process_group_ranks(found)), distributed.get_rank()


_READ: dict[Any, Any] = {
    c10d._allgather_base_.default: lambda out, own, group, *_: _call("all_gather", out, group),
    c10d._reduce_scatter_base_.default: lambda out, whole, group, *_: _call(
        "reduce_scatter", whole, group
    ),
    c10d.allreduce_.default: lambda tensors, group, *_: _call("all_reduce", tensors[0], group, 2),
    c10d.alltoall_base_.default: lambda out, rows, group, receive, send, *_: _all_to_all(
        out, rows, group, receive, send
    ),
}


def unique_ranks(experts: int, top_k: int, ranks: int) -> float:
    """How many ranks a token's choices lie on, on average: each of the ways to choose `top_k`
    different ones of `experts` is as likely as any other, and a rank holds experts / ranks.

    1 - C(E - E/W, K) / C(E, K) is the probability that one rank has any of them.
    """
    missed = math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k)
    return ranks * (1 - missed)


@dataclass(frozen=True, slots=True)
class Network:
    """A cluster, seen from one GPU: what it can send in bytes per second, seconds of delay."""

    gpus_per_node: int = 8
    inside: float = 360e9  # to GPUs of its node: four fifths of NVLink 4's 450 GB/s
    outside: float = 45e9  # to other nodes: nine tenths of its own 400 Gb/s
    latency: float = 10e-6  # for each doubling of the ranks that take part


def seconds(call: Collective, network: Network) -> float:
    """How long one call takes where nothing else is sent.

    Gathers and reductions: the whole less a share enters each node once, over the links of all GPUs
    of the node that take part, and is passed on inside; the slower of the two is the time. An
    exchange: a GPU's rows for other nodes leave by its own link, those for its node inside.
    """
    count = len(call.ranks)
    if count == 1:
        return 0.0
    node = call.rank // network.gpus_per_node
    mine = sum(r // network.gpus_per_node == node for r in call.ranks)
    nodes = len({r // network.gpus_per_node for r in call.ranks})
    delay = network.latency * math.ceil(math.log2(count))
    if call.kind == "all_to_all":
        away = call.sent * (count - mine) / (count - 1)
        return max(away / network.outside, (call.sent - away) / network.inside) + delay
    rounds = 2 if call.kind == "all_reduce" else 1
    between = call.size * (nodes - 1) / nodes / (mine * network.outside)
    within = call.size * (mine - 1) / mine / network.inside
    return rounds * max(between, within) + delay


def total(calls: Sequence[Collective], kind: Kind) -> int:
    """Bytes that this rank sends in all calls of a kind."""
    return sum(call.sent for call in calls if call.kind == kind)
