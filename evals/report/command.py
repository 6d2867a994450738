"""`moe report`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from moe.errors import raise_all

app = typer.Typer(add_completion=False)


@app.command()
def run(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, results of moe eval and moe bench, models or checkpoints.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to create.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """One page that compares runs, evaluations and models; it needs nothing but itself."""
    raise_all(_problems(out))
    from moe.evals.report.inputs import Run, read
    from moe.evals.report.page import render, result

    inputs = read(folders)
    page = render(inputs)
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)
    for x in inputs:
        for note in x.notes:
            typer.echo(f"note: {x.name}: {note}", err=True)
    found = [result(x) for x in inputs if isinstance(x, Run)]
    said = json.dumps({"out": str(out), "runs": found})
    typer.echo(
        said if as_json else f"{out}: {out.stat().st_size / 1e6:.2f} MB, {len(inputs)} input(s)"
    )


def _problems(out: Path) -> list[str]:
    if out.exists():
        return [f"{out} exists. Choose another --out, or remove it."]
    parent = next(p for p in out.absolute().parents if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return [f"--out {out}: {parent} is not a folder that can be written to."]
    return []
