"""`moe train`."""

from pathlib import Path
from typing import Annotated

import typer

from moe.config import load
from moe.train import preempt

app = typer.Typer(add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/train/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, any key of the file.")
    ] = None,
) -> None:
    """Continue-train a model: one process here, several under torchrun with -m moe.train."""
    preempt.watch()
    settings = load(config, overrides or [])
    from moe.train.loop import train

    train(settings)
