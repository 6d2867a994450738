"""`moe tune export`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from moe.errors import UserError
from moe.progress import quiet_libraries
from moe.tune.export import export_tuned
from moe.tune.tuning import Semantics, Tuning


def export(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    tuning: Annotated[Path, typer.Option(help="tuning.json: what is done to which experts.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    semantics: Annotated[
        Semantics | None, typer.Option(help="Where it takes place; default the tuning's own.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="How much of it, 0 to 1; default the tuning's own.")
    ] = None,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="Take experts that are off before the choice out of the weights."
        ),
    ] = False,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Apply a tuning that another model was made for.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Text to verify on.")] = None,
    verify: Annotated[
        bool,
        typer.Option(help="Load the result in float32 and hold it against the tuning at work."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model with a tuning in its weights, where weights can say it exactly.

    post_zero anywhere; pre_select where a router has a selection bias, or with --remove.
    """
    quiet_libraries()
    asked = Tuning.read(tuning)
    if scale is not None and not (math.isfinite(scale) and 0 <= scale <= 1):
        raise UserError(f"--scale {scale} must be between 0 and 1.")
    asked = dataclasses.replace(
        asked,
        semantics=semantics or asked.semantics,
        scale=asked.scale if scale is None else scale,
    )
    receipt = export_tuned(model, out, asked, remove, text, verify, other_model, quiet=as_json)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **dataclasses.asdict(receipt)}))
        return
    size = sum(entry["bytes"] for entry in receipt.files.values())
    typer.echo(f"{out}: {len(receipt.tensors)} tensors, {size / 1e9:.2f} GB, receipt.json")
    typer.echo(receipt.steps[-1]["statement"])
    typer.echo(_summary(receipt.verification) if receipt.verification else "not verified")


def _summary(record: dict) -> str:
    return (
        f"verified on {record['text']}: relative logit difference "
        f"{record['relative_difference']:.1e} from the tuning at work, "
        f"{record['without_tuning']:.1e} from the model without it"
    )
