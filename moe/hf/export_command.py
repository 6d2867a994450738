"""`moe export`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from moe.hf.export import Form, export
from moe.upcycle.verify import summary

app = typer.Typer(add_completion=False)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="Training checkpoint (step-N) or model folder.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    to: Annotated[
        Form,
        typer.Option(
            help="hf: what transformers reads after import moe.model. mixtral, granitemoe, "
            "granitemoeshared, qwen2_moe: a class that transformers has, where it fits exactly. "
            "dense: the plain source family, where every head and expert is on; with --calibrate "
            "attention experts (BAM) and FFN experts too, side by side. "
            "remote-code: with the model's code, for trust_remote_code=True where moe is not."
        ),
    ] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the result; default as stored, which is float32 in checkpoints."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to verify on; not with --to hf, which changes nothing."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Text over which --to dense freezes gates that depend on the token to their mean: "
            "not the same function, its perplexity is measured on --text."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(help="Load the result in float32 and compare its logits; not for --to hf."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a checkpoint or RoutedLlama in the form that others read, with tokenizer and receipt.

    Exit 2 with all that stands in the way where a form has no room for the model.
    """
    kind = getattr(torch, dtype) if dtype else None
    receipt = export(path, out, kind, to, text, verify, quiet=as_json, calibrate=calibrate)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **dataclasses.asdict(receipt)}))
        return
    size = sum(entry["bytes"] for entry in receipt.files.values())
    typer.echo(f"{out}: {len(receipt.tensors)} tensors, {size / 1e9:.2f} GB, receipt.json")
    if to != "hf":
        typer.echo(receipt.steps[-1]["statement"])
        typer.echo(summary(receipt.verification) if receipt.verification else "not verified")
