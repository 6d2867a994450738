"""`moe export`."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from moe.hf.export import export

app = typer.Typer(add_completion=False)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="Training checkpoint (step-N) or model folder.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    to: Annotated[
        Literal["hf"],
        typer.Option(help="hf: what transformers reads after import moe.model."),
    ] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the result; default as stored, which is float32 in checkpoints."),
    ] = None,
) -> None:
    """Write a checkpoint's weights as a model folder, with tokenizer, config and receipt."""
    receipt = export(path, out, getattr(torch, dtype) if dtype else None)
    size = sum(entry["bytes"] for entry in receipt.files.values())
    typer.echo(f"{out}: {len(receipt.tensors)} tensors, {size / 1e9:.2f} GB, receipt.json")
