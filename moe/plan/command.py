"""`moe plan`."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from moe.config import load
from moe.errors import UserError

MOST = 4096  # ranks: FSDP2's pieces are made one by one
app = typer.Typer(add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/train/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, any key of the file.")
    ] = None,
    world: Annotated[int, typer.Option("--world", help="Ranks: one a GPU.")] = 1,
    memory: Annotated[float | None, typer.Option(help="GB of one GPU, to fit into.")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that NVLink joins.")] = 8,
    node_bandwidth: Annotated[
        float, typer.Option(help="GB/s that a GPU sends to others of its node.")
    ] = 360.0,
    network_bandwidth: Annotated[
        float, typer.Option(help="GB/s that a GPU sends to other nodes.")
    ] = 45.0,
    tflops: Annotated[float, typer.Option(help="A GPU's dense peak in the run's dtype.")] = 989.0,
    mfu: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a run takes on N ranks: legal meshes, bytes per rank, traffic, and how it scales.

    Needs no GPU and no weights: of the model its config.json alone is read.
    """
    positive = {
        "--world": world,
        "--memory": 1.0 if memory is None else memory,
        "--gpus-per-node": gpus_per_node,
        "--node-bandwidth": node_bandwidth,
        "--network-bandwidth": network_bandwidth,
        "--tflops": tflops,
        "--mfu": mfu,
    }
    wrong = [n for n, v in positive.items() if not (math.isfinite(v) and v > 0)]
    if wrong:
        raise UserError("\n".join(f"{n} {positive[n]} must be greater than 0." for n in wrong))
    if world > MOST:
        raise UserError(f"--world {world} would take long to plan: at most {MOST}.")
    if mfu > 1:
        raise UserError(f"--mfu {mfu} is a share of the peak: at most 1.")
    settings = load(config, overrides or [])
    from moe.parallel.traffic import Network
    from moe.plan.describe import describe
    from moe.plan.plan import Machine, plan
    from moe.progress import quiet_libraries

    quiet_libraries()
    network = Network(gpus_per_node, 1e9 * node_bandwidth, 1e9 * network_bandwidth)
    room = None if memory is None else 1e9 * memory
    found = plan(settings, world, room, Machine(1e12 * tflops, mfu), network)
    typer.echo(json.dumps(found) if as_json else describe(found, settings))
