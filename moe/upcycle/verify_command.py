"""`moe verify`: whether a folder still is what was written."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe.errors import Corrupt, UserError
from moe.hf.native import HOMES
from moe.upcycle.receipt import NAME, check, unknown
from moe.upcycle.recipes import unchanged
from moe.upcycle.source import Source, require_finished

app = typer.Typer(add_completion=False)


def _misfits(folder: Path) -> list[str]:
    """What keeps the tensors of a folder from being those of its config's model."""
    try:
        source = Source.open(folder)
        if source.config.model_type not in HOMES:  # whose tensors have other names
            unchanged(source)
    except (UserError, Corrupt) as error:
        return [str(error)]
    return []


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="Model folder or training checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check hashes, shapes and finiteness. Exit 3 where something is damaged."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder.")
    require_finished(path)
    added: list[str] = []
    if (path / "manifest.json").is_file():
        from moe.checkpoint.store import check as check_checkpoint

        problems, against = check_checkpoint(path), "manifest.json"
    else:
        problems, added = check(path), unknown(path)
        against = NAME
        if not (path / NAME).is_file():
            against = "its config and the headers alone (there is no receipt)"
            problems += _misfits(path)
    if as_json:
        found = {"path": str(path), "sound": not problems, "problems": problems, "unknown": added}
        typer.echo(json.dumps(found))
        raise typer.Exit(3 if problems else 0)
    if problems:
        raise Corrupt("\n".join(problems))
    typer.echo(f"{path}: sound, checked against {against}")
    if added:
        typer.echo(f"not in the receipt, so not checked: {', '.join(added)}")
