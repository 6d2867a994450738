"""`moe inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe.hf.inspect import describe, inspect

app = typer.Typer(add_completion=False)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Architecture, total and active parameters, routing per layer, receipt."""
    found = inspect(folder)
    typer.echo(json.dumps(found) if as_json else describe(folder, found))
