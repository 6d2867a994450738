"""`moe import`."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from moe.hf.importing import import_model

app = typer.Typer(add_completion=False)


@app.command()
def run(
    source: Annotated[str, typer.Argument(help="GGUF file, model folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="Of the result. A folder keeps its own; a GGUF file becomes float32, since "
            "bfloat16 cannot hold what its quantised blocks stand for."
        ),
    ] = None,
) -> None:
    """Bring a LLaMA-like model, or a Mixtral, GraniteMoe or Qwen2-MoE, into a folder of safetensors
    with a receipt. The mixtures become RoutedLlamas, where they compute nothing else.
    """
    receipt = import_model(source, out, getattr(torch, dtype) if dtype else None)
    size = sum(entry["bytes"] for entry in receipt.files.values())
    typer.echo(f"{out}: {len(receipt.tensors)} tensors, {size / 1e9:.2f} GB, receipt.json")
