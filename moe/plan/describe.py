"""A plan for people."""

from typing import Any

from moe.config import RunConfig

CLASSES = {
    "weights": "parameters in float32, buffers",
    "gradients": "after the last micro-batch of a step",
    "moments": "Adam's, in float32",
    "activations": "what the backward pass of a micro-batch keeps",
    "dispatch": "one layer's rows on their way to experts and back",
}
NAMES = {
    "all_gather": "gather weights",
    "reduce_scatter": "reduce gradients",
    "all_reduce": "sum over copies",
    "all_to_all": "tokens to experts",
}


def describe(found: dict[str, Any], config: RunConfig) -> str:
    """Tables of everything in a plan."""
    return "\n".join(
        [
            *_headline(found, config),
            "",
            *_meshes(found),
            "",
            *_bytes(found, config),
            "",
            *_traffic(found),
            "",
            *_worlds(found),
            "",
            *_assumptions(found, config),
        ]
    )


def size(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, scale, least in (("TB", 1e12, 1e12), ("GB", 1e9, 1e8), ("MB", 1e6, 1e5)):
        if count >= least:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.2f} kB" if count else "0"


def count(number: float) -> str:
    """A large number, short."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:,.0f}"


def time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _headline(found: dict[str, Any], config: RunConfig) -> list[str]:
    total, active = found["parameters"]["total"], found["parameters"]["active"]
    mesh = ", ".join(f"{axis} {value}" for axis, value in found["parallel"].items())
    train = config.train
    return [
        f"{config.model}: {count(total)} parameters, {count(active)} active per token "
        f"({active / total:.0%})",
        f"{found['ranks']} rank(s) ({mesh}), {train.dtype}, {found['micro_batches']} "
        f"micro-batch(es) of {train.micro_batch_size} × {config.data.sequence_length} tokens a "
        f"rank, {count(found['tokens_per_step'])} tokens a step",
    ]


def _meshes(found: dict[str, Any]) -> list[str]:
    lines = [f"Meshes of {found['ranks']} rank(s), the other axes as configured"]
    for axis, values in found["meshes"].items():
        lines.append(f"  parallel.{axis:<10} {', '.join(map(str, values['legal'])) or 'none'}")
        reasons: dict[str, list[int]] = {}
        for value, why in values["refused"].items():
            # the same rule says each value in its own words
            reasons.setdefault(why.replace(f"={value} ", "=… "), []).append(value)
        for why, refused in reasons.items():
            lines.append(f"    not {', '.join(map(str, refused))}: {why}")
    return lines


def _bytes(found: dict[str, Any], config: RunConfig) -> list[str]:
    held = found["bytes"]
    lines = ["Bytes of rank 0              total    experts'"]
    for name, what in CLASSES.items():
        total, experts = held[name]["total"], held[name]["experts"]
        lines.append(f"  {name:<18} {size(total):>13} {size(experts):>11}   {what}")
    if held["accumulated"]:
        lines.append(f"  {'accumulated':<18} {size(held['accumulated']):>13} {'':>11}   gradients "
                     "that wait for the step's last micro-batch, whole")  # fmt: skip
    lines += [
        f"  {'peak':<18} {size(held['peak']):>13} {'':>11}   the most at once, with gathered "
        "weights and what comes and goes",
    ]
    if held["start"]:
        lines.append(f"  {'start':<18} {size(held['start']):>13} {'':>11}   the whole model, "
                     "before it is divided")  # fmt: skip
    if held["host"]:
        lines.append(f"  {'host':<18} {size(held['host']):>13} {'':>11}   offloaded to the host's "
                     "memory")  # fmt: skip
    kept = "kept from save to save" if config.checkpoint.asynchronous else "while it is saved"
    lines.append(f"  {'checkpoint':<18} {size(held['saved']):>13} {'':>11}   a copy in the host's "
                 f"memory, {kept}")  # fmt: skip
    if found["memory"] is not None:
        need = max(held["peak"], held["start"])
        what = "peak" if need == held["peak"] else "start"
        lines.append(
            f"  {'fits' if found['fits'] else 'does not fit'} into {size(found['memory'])}: {what} "
            f"takes {need / found['memory']:.0%} of it"
        )
    return lines


def _traffic(found: dict[str, Any]) -> list[str]:
    if not found["collectives"]:
        return ["A step sends nothing to other ranks."]
    lines = ["Sent by rank 0 in a step   ranks  nodes    calls        bytes      time"]
    for row in found["collectives"]:
        lines.append(
            f"  {NAMES[row['kind']]:<22} {row['ranks']:>7} {row['nodes']:>6} {row['calls']:>8,} "
            f"{size(row['bytes_sent']):>12} {time(row['seconds']):>9}"
        )
    return lines


def _worlds(found: dict[str, Any]) -> list[str]:
    lines = [
        "    GPUs   peak of one    compute     gather     reduce   exchange       step   tokens/s"
    ]
    for row in found["worlds"]:
        if "refused" in row:
            lines.append(f"  {row['ranks']:>6,}   {row['refused']}")
            continue
        reduce = row["reduce_scatter_seconds"] + row["all_reduce_seconds"]
        times = (row["compute_seconds"], row["all_gather_seconds"], reduce,
                 row["all_to_all_seconds"], row["step_seconds"])  # fmt: skip
        lines.append(
            f"  {row['ranks']:>6,} {size(row['peak_bytes']):>13} "
            + " ".join(f"{time(t):>10}" for t in times)
            + f" {count(row['tokens_per_second']):>10}"
        )
    return lines


def _assumptions(found: dict[str, Any], config: RunConfig) -> list[str]:
    """What the numbers rest on."""
    given, visits = found["assumptions"], found["visits"]
    lines = [
        "Assumed",
        f"  {given['gpus_per_node']} GPUs a node; a GPU sends {given['inside'] / 1e9:g} GB/s "
        f"inside it and {given['outside'] / 1e9:g} GB/s out; {1e6 * given['latency']:g} µs for "
        "each doubling of the ranks in a call",
        f"  compute at {given['mfu']:.0%} of {given['flops'] / 1e12:g} TFLOP/s; weights and "
        "gradients travel meanwhile, tokens do not",
        "  as many micro-batches a rank on any number of GPUs; not counted: CUDA's context, NCCL's "
        "buffers, fragmentation",
    ]
    if visits is not None and config.parallel.expert > 1:
        lines.append(
            f"  balanced routing: a token's experts lie on {visits:.2f} of "
            f"{config.parallel.expert} ranks on average"
        )
    if config.train.compile:
        lines.append("  layers as they are uncompiled: torch.compile keeps less")
    if config.train.anneal_steps:
        lines.append("  every expert of a union on, as in the first step of its annealing")
    return lines
