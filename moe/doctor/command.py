"""`moe doctor`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moe.config import RunConfig, load
from moe.doctor import reach
from moe.doctor.finding import Finding
from moe.errors import UserError

app = typer.Typer(add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file, to check too.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, any key of the file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What would keep a run from working here, and what to do about it. Exit 2 where it will fail.

    Versions, devices, kernels, ranks that reach each other, disk, limits; and with CONFIG whether
    it is legal and there is room for its checkpoints.
    """
    settings, problem = _load(config, overrides or [])
    ranks = reach.Ranks()  # they load torch while this process does
    from moe.doctor import machine, training
    from moe.progress import quiet_libraries

    quiet_libraries()
    found = [machine.versions(), machine.devices(), machine.kernels()]
    found += [machine.shared_memory(), machine.open_files()]
    found += [f for f in (reach.launcher(),) if f is not None]
    if problem:
        advice = "\n".join(problem.splitlines())
        found.append(Finding("configuration", "fails", f"{config} is wrong", advice))
    if settings is not None:
        found += training.look(settings)
    found.append(ranks.finding())
    found += machine.disk(settings.out if settings else Path())  # last: nothing else is to slow it
    failing = [f for f in found if f.verdict == "fails"]
    if as_json:
        body = {"sound": not failing, "python": sys.executable,
                "findings": [asdict(f) for f in found]}  # fmt: skip
        typer.echo(json.dumps(body))
    else:
        typer.echo("\n".join(map(str, found)))
        typer.echo(f"{len(failing)} of {len(found)} will fail" if failing else "fine")
    raise typer.Exit(2 if failing else 0)


def _load(path: Path | None, overrides: list[str]) -> tuple[RunConfig | None, str]:
    """The configuration, or what is wrong with it: the machine is looked at all the same."""
    if path is None:
        return None, ""
    try:
        return load(path, overrides), ""
    except UserError as error:
        return None, str(error)
