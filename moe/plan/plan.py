"""A run on so many ranks: what it takes, whether it fits, how it scales."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moe.config import RunConfig
from moe.engines.imagine import blueprint, refusals
from moe.engines.measure import Footprint, storage_bytes
from moe.hf.families import routed_config
from moe.model import RoutedLlamaConfig
from moe.model.accounting import flops_per_token, parameter_counts
from moe.model.spec import DenseMLP, routed_on
from moe.parallel.traffic import KINDS, Collective, Network, seconds, unique_ranks
from moe.plan.meshes import check, legal_meshes, with_ranks
from moe.plan.rank import footprint
from moe.upcycle.source import read_config

CHECKPOINT_BYTES = 4 + 8  # of a parameter: float32, and two moments
WORLDS = (8, 64, 1024)  # GPUs to extrapolate to


@dataclass(frozen=True, slots=True)
class Machine:
    """What is assumed of the GPUs, besides their network."""

    flops: float = 989e12  # an H100's dense bfloat16 peak
    mfu: float = 0.4  # share of it that forward and backward passes reach


def plan(
    config: RunConfig, size: int, memory: float | None, machine: Machine, network: Network
) -> dict[str, Any]:
    """Everything `moe plan` says, ready for JSON: bytes, seconds; `memory` in bytes of one GPU.

    Reads the model's config.json and nothing else of the files that the configuration names.
    Raises UserError where `size` ranks cannot run it.
    """
    model_config = routed_config(read_config(config.model))
    model = blueprint(model_config)
    check(config, model, size)
    per_pass = config.train.micro_batch_size * size // config.parallel.tensor
    micro_batches = config.train.global_batch_size // per_pass
    total, active = parameter_counts(model_config)
    found = footprint(config, model_config, size)
    start = _start(config, model)
    need = max(found.peak, start)
    worlds = []
    for ranks in sorted({size, *WORLDS}):
        scaled = config if ranks == size else with_ranks(config, ranks, micro_batches)
        known = found if ranks == size else None
        worlds.append(_world(scaled, model_config, model, ranks, known, machine, network))
    return {
        "parameters": {"total": total, "active": active},
        "ranks": size,
        "parallel": _mesh(config, size),
        "micro_batches": micro_batches,
        "tokens_per_step": config.train.global_batch_size * config.data.sequence_length,
        "meshes": legal_meshes(config, model, size),
        "bytes": _bytes(found)
        | {"start": start, "host": found.host}
        | {"saved": saved_bytes(config, found, total, size)},
        "memory": memory,
        "fits": None if memory is None else need <= memory,
        "visits": _visits(model_config, config.parallel.expert),
        "collectives": _by_group(_step(found, micro_batches), network),
        "worlds": worlds,
        "assumptions": asdict(machine) | asdict(network),
    }


def _start(config: RunConfig, model: nn.Module) -> int:
    """Bytes that the device holds before anything is divided. The native engine brings a model to
    it layer by layer, and divides each at once; DeepSpeed all of it, in the run's dtype.
    """
    if config.engine == "native":
        return 0
    whole = storage_bytes(model.parameters())
    return whole // 2 if config.train.dtype == "bfloat16" else whole


def saved_bytes(config: RunConfig, found: Footprint, parameters: int, size: int) -> int:
    """Bytes of the copy in the host's memory that a rank writes its part of a checkpoint from: all
    that it holds; of DeepSpeed's state, which is put together first, an even share.
    """
    if config.engine == "native":
        return found.weights.total + found.moments.total
    return -(-CHECKPOINT_BYTES * parameters // size)


def _mesh(config: RunConfig, size: int) -> dict[str, int]:
    """The axes, what is left to `shard` spelled out."""
    mesh = config.parallel
    shard = size // mesh.replicate // mesh.tensor
    return {
        "replicate": mesh.replicate, "shard": shard, "expert": mesh.expert, "tensor": mesh.tensor
    }  # fmt: skip


def _bytes(found: Footprint) -> dict[str, Any]:
    """The classes of a footprint."""
    shares = ("weights", "gradients", "moments", "activations")
    classes: dict[str, Any] = {name: asdict(getattr(found, name)) for name in shares}
    classes["dispatch"] = {"total": found.dispatch, "experts": found.dispatch}
    return classes | {"accumulated": found.accumulated, "peak": found.peak}


def _visits(config: RoutedLlamaConfig, expert: int) -> float | None:
    """On how many ranks a token's experts lie on average, over the layers that have some."""
    specs = [config.mlp_spec(i) for i in range(config.num_hidden_layers)]
    found = [
        unique_ranks(spec.num_experts, round(routed_on(spec)), expert)
        for spec in specs
        if not isinstance(spec, DenseMLP)
    ]
    return sum(found) / len(found) if found else None


def _step(found: Footprint, micro_batches: int) -> Counter[Collective]:
    """The collectives of a whole step."""
    step = Counter(found.last)
    for call, count in found.first.items():
        step[call] += (micro_batches - 1) * count
    return step


def _by_group(step: Counter[Collective], network: Network) -> list[dict[str, Any]]:
    """Calls, bytes that this rank sends and seconds, for each kind and group of ranks."""
    rows: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for call, count in sorted(step.items(), key=lambda item: KINDS.index(item[0].kind)):
        if len(call.ranks) == 1:
            continue
        row = rows.setdefault(
            (call.kind, call.ranks),
            {
                "kind": call.kind,
                "ranks": len(call.ranks),
                "nodes": len({r // network.gpus_per_node for r in call.ranks}),
                "calls": 0,
                "bytes_sent": 0,
                "seconds": 0.0,
            },
        )
        row["calls"] += count
        row["bytes_sent"] += count * call.sent
        row["seconds"] += count * seconds(call, network)
    return list(rows.values())


def _world(
    config: RunConfig,
    model_config: RoutedLlamaConfig,
    model: nn.Module,
    size: int,
    known: Footprint | None,
    machine: Machine,
    network: Network,
) -> dict[str, Any]:
    """How a step goes on `size` GPUs."""
    if problems := refusals(config, model, size):
        return {"ranks": size, "refused": " ".join(problems)}
    train, length = config.train, config.data.sequence_length
    found = known or footprint(config, model_config, size)
    data = size // config.parallel.tensor
    micro_batches = train.global_batch_size // (train.micro_batch_size * data)
    by_kind = dict.fromkeys(KINDS, 0.0)
    for row in _by_group(_step(found, micro_batches), network):
        by_kind[row["kind"]] += row["seconds"]
    tokens = train.global_batch_size * length
    again = 4 / 3 if train.activation_checkpointing == "full" else 1.0
    flops = again * flops_per_token(model_config, length) * tokens / size
    compute = flops / (machine.flops * machine.mfu)
    exchange = by_kind["all_to_all"]
    step = max(compute, sum(by_kind.values()) - exchange) + exchange
    return {
        "ranks": size,
        "peak_bytes": found.peak,
        "compute_seconds": compute,
        **{f"{kind}_seconds": value for kind, value in by_kind.items()},
        "step_seconds": step,
        "tokens_per_second": tokens / step,
    }
