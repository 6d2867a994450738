"""What a rank holds and sends with DeepSpeed, which cannot run on imagined tensors: by its rules.

Activations, dispatch buffers and the exchange of tokens do not depend on who divides parameters:
they are those of the native engine, imagined. Weights, gradients and moments follow from how ZeRO
lays parameters out. Its own collectives are what its stages need at least.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moe.config import RunConfig
from moe.engines import Engine, imagine
from moe.engines.deepspeed_json import generate
from moe.engines.measure import Footprint, Share
from moe.engines.parameters import freeze, parameter_groups
from moe.model import RoutedLlamaConfig
from moe.parallel.traffic import Collective, Kind

MOE_GROUP = 178_956_971  # elements in which DeepSpeed groups expert parameters at most
WIDE = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are flattened and divided together: elements of each on this rank."""

    sizes: tuple[int, ...]
    ranks: int  # among which it is divided
    expert: bool

    @property
    def padded(self) -> int:
        """Elements of all, a multiple of twice the ranks."""
        unit = 2 * self.ranks
        return -(-sum(self.sizes) // unit) * unit

    def part(self, stage: int) -> int:
        """Elements of which a rank has moments."""
        if stage == 3:  # each parameter is divided by itself
            return sum(-(-n // self.ranks) for n in self.sizes)
        return sum(self.sizes) if stage == 0 else self.padded // self.ranks

    def overlapping(self, rank: int) -> int:
        """Elements of the parameters that a rank's part has something of, and padding."""
        part, begin, total = self.padded // self.ranks, 0, 0
        for size in self.sizes:
            if begin < part * (rank + 1) and part * rank < begin + size:
                total += size
            begin += size
        return total + (self.padded - begin if rank == self.ranks - 1 else 0)


def footprint(
    config: RunConfig,
    model_config: RoutedLlamaConfig,
    rank: int,
    size: int,
    forward: Callable[[Engine], Tensor],
) -> Footprint:
    """Of one rank of `size`, in the device's memory; what is offloaded counts as `host`."""
    native = config.model_copy(update={"engine": "native"})
    if config.deepspeed.stage == 3:  # its own linear function keeps inputs of frozen weights too
        every = config.train.model_copy(update={"trainable": ["*"]})
        native = native.model_copy(update={"train": every})
    found = imagine.footprint(native, model_config, rank, size, forward)
    expert = config.parallel.expert
    model = imagine.blueprint(model_config)
    freeze(model, config.train.trainable)
    groups = groups_of(model, expert, size)
    frozen = [
        (p.numel() // (expert if ".experts." in n else 1), ".experts." in n)
        for n, p in model.named_parameters()
        if not p.requires_grad
    ]
    buffers = sum(b.nbytes for b in model.buffers())
    held = _held(config, groups, frozen, rank, size)
    held["weights"] = Share(held["weights"].total + buffers, held["weights"].experts)
    host = 0
    if config.deepspeed.offload != "none":
        host, held = _offloaded(config, held, groups)
    before = sum(getattr(found, n).total for n in ("weights", "gradients", "moments"))
    after = sum(share.total for share in held.values())
    zero = generate(config, size, "cpu")["zero_optimization"]
    bucket = WIDE * zero["reduce_bucket_size"]
    if config.deepspeed.stage == 3:  # small parameters stay whole from one layer to the next
        small = zero.get("stage3_param_persistence_threshold", 100_000)
        width = 2 if config.train.dtype == "bfloat16" else WIDE
        bucket += width * sum(n for g in groups for n in g.sizes if n <= small)
    first, last = _sent(config, groups, found, rank, size)
    return replace(
        found,
        weights=held["weights"],
        gradients=held["gradients"],
        moments=held["moments"],
        accumulated=0,
        peak=found.peak - found.accumulated - before + after + bucket,
        first=first,
        last=last,
        host=host,
    )


def groups_of(model: Any, expert: int, size: int) -> list[Group]:
    """As DeepSpeed has them: decayed, not decayed, then expert parameters where they are spread."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names = {id(p): n for n, p in named}
    dense, experts = [], []
    for group in parameter_groups(named):
        apart = [p.numel() // expert for p in group["params"] if _spread(names[id(p)], expert)]
        rest = [p.numel() for p in group["params"] if not _spread(names[id(p)], expert)]
        if rest:
            dense.append(Group(tuple(rest), size, False))
        experts += [Group(tuple(part), size // expert, True) for part in _pack(apart)]
    return dense + experts


def _spread(name: str, expert: int) -> bool:
    return expert > 1 and ".experts." in name


def _pack(sizes: list[int]) -> list[list[int]]:
    packed: list[list[int]] = []
    for size in sizes:
        if packed and sum(packed[-1]) + size <= MOE_GROUP:
            packed[-1].append(size)
        else:
            packed.append([size])
    return packed


def _held(
    config: RunConfig, groups: list[Group], frozen: list[tuple[int, bool]], rank: int, size: int
) -> dict[str, Share]:
    """Bytes of weights, gradients and moments, all of them on the device."""
    stage, narrow = config.deepspeed.stage, config.train.dtype == "bfloat16"
    width = 2 if narrow else WIDE

    offloads = config.deepspeed.offload != "none"

    def part(group: Group) -> int:
        return group.part(stage)

    def weights(group: Group) -> int:
        if stage == 0:
            return width * sum(group.sizes)
        if stage == 3:
            return (width + WIDE) * part(group)
        return width * group.padded + WIDE * part(group)

    def gradients(group: Group) -> int:
        if stage == 1 and narrow and not offloads:
            return WIDE * group.padded
        if stage in (1, 2) and not narrow and not offloads:
            return WIDE * group.overlapping(rank // (size // group.ranks))
        return WIDE * part(group)

    held = _share(groups, weights)
    still = [(n if stage < 3 else -(-n // size), ours) for n, ours in frozen]
    held = Share(
        held.total + width * sum(n for n, _ in still),
        held.experts + width * sum(n for n, ours in still if ours),
    )
    counters = WIDE * sum(len(g.sizes) if stage == 0 else _subgroups(g, stage) for g in groups)
    moments = _share(groups, lambda g: 2 * WIDE * part(g))
    return {
        "weights": held,
        "gradients": _share(groups, gradients),
        "moments": Share(moments.total + counters, moments.experts),
    }


def _subgroups(group: Group, stage: int) -> int:
    """Pieces that the optimiser updates one after another: each has a counter."""
    if stage < 3:
        return 1
    return max(1, math.ceil(group.part(stage) / 1e9))


def _offloaded(
    config: RunConfig, held: dict[str, Share], groups: list[Group]
) -> tuple[int, dict[str, Share]]:
    """Bytes in the host's memory, and what is left on the device."""
    stage, gone = config.deepspeed.stage, WIDE  # the float32 weights that moments belong to
    if config.deepspeed.offload == "parameters":
        gone += 2 if config.train.dtype == "bfloat16" else WIDE
    away = _share(groups, lambda g: gone * g.part(stage))
    weights = held["weights"]
    left = Share(weights.total - away.total, weights.experts - away.experts)
    host = away.total + held["moments"].total + held["gradients"].total
    return host, {"weights": left, "gradients": Share(0, 0), "moments": Share(0, 0)}


def _share(groups: list[Group], count: Callable[[Group], int]) -> Share:
    return Share(sum(count(g) for g in groups), sum(count(g) for g in groups if g.expert))


def _sent(
    config: RunConfig, groups: list[Group], found: Footprint, rank: int, size: int
) -> tuple[Counter[Collective], Counter[Collective]]:
    """Collectives of a micro-batch and of a step's last: tokens as imagined, weights by stage."""
    stage, width = config.deepspeed.stage, 2 if config.train.dtype == "bfloat16" else WIDE
    first, last = (
        Counter({c: n for c, n in calls.items() if c.kind == "all_to_all"})
        for calls in (found.first, found.last)
    )

    def call(kind: Kind, group: Group, elements: int, bytes_each: int) -> Collective:
        ranks = range(rank % (size // group.ranks), size, size // group.ranks)
        total, rounds = elements * bytes_each, 2 if kind == "all_reduce" else 1
        sent = rounds * total * (group.ranks - 1) // group.ranks
        return Collective(kind, tuple(ranks), rank, total, sent)

    for group in groups:
        if group.ranks == 1:
            continue
        if stage == 0:
            last[call("all_reduce", group, sum(group.sizes), WIDE)] += 1
            continue
        reduce = call("reduce_scatter", group, group.padded, WIDE)
        if stage > 1:  # a micro-batch's gradients are divided at once
            first[reduce] += 1
        last[reduce] += 1
        gather = call("all_gather", group, group.padded, width)
        if stage < 3:
            last[gather] += 1
        else:  # for the forward and for the backward pass
            first[gather] += 2
            last[gather] += 2
    return first, last
