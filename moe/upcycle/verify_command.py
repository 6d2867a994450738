"""`moe verify`: whether a folder still is what was written."""

import json
from pathlib import Path
from typing import Annotated, Any

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


def _check_model(path: Path) -> tuple[dict[str, Any], str]:
    """What is wrong with a model folder, and what it was held against."""
    problems, added, against = check(path), unknown(path), NAME
    if not (path / NAME).is_file():
        against = "its config and the headers alone (there is no receipt)"
        problems += _misfits(path)
    return {"problems": problems, "unknown": added}, against


def _check_checkpoints(path: Path, run: Path | None) -> tuple[dict[str, Any], str]:
    """The same of a run's checkpoints, or of one; where one is damaged, the newest that is not."""
    from moe.checkpoint import store

    folders = [path] if run != path else [folder for _, folder in store.numbered(path)]
    damage = {folder: store.check(folder) for folder in folders}
    problems = [str(d) for found in damage.values() for d in found]
    damaged = [
        {"file": str(d.file), "what": d.what, "tensors": list(d.tensors)}
        for found in damage.values()
        for d in found
    ]
    if run == path and (line := store.stale(path)):
        problems.append(line)
    added = [] if problems or run == path else store.unknown(path)
    found: dict[str, Any] = {"problems": problems, "unknown": added, "damaged": damaged}
    if problems and run is not None:
        sound = [f for f in folders if not damage[f]]
        fallback = sound[-1] if sound else store.newest_sound(run)
        found["fallback"] = str(fallback) if fallback else None
        problems.append(f"the newest sound checkpoint is {fallback or 'none'}")
    return found, "manifest.json" if run != path else f"{len(folders)} manifests"


def _run_of(path: Path) -> Path | None:
    """The run folder that a path is, or whose checkpoint it is."""
    from moe.checkpoint.store import FOLDER, numbered

    if numbered(path):
        return path
    place = path.resolve()
    return place.parents[1] if place.parent.name == FOLDER else None


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="Model folder, training checkpoint or run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check hashes, shapes and finiteness. Exit 3 where something is damaged."""
    from moe.checkpoint.store import FOLDER

    if not path.is_dir():
        raise UserError(f"{path} is not a folder.")
    require_finished(path)
    if path.resolve().name == FOLDER and list(path.glob("step-*")):
        raise UserError(f"{path} holds checkpoints: give one of them, or the run: {path.parent}.")
    of_run = _run_of(path)
    if of_run is not None or (path / "manifest.json").is_file():
        found, against = _check_checkpoints(path, of_run)
    else:
        found, against = _check_model(path)
    problems, added = found["problems"], found["unknown"]
    if as_json:
        typer.echo(json.dumps({"path": str(path), "sound": not problems} | found))
        raise typer.Exit(3 if problems else 0)
    if problems:
        raise Corrupt("\n".join(problems))
    typer.echo(f"{path}: sound, checked against {against}")
    if added:
        record = "receipt" if against == NAME else "manifest"
        typer.echo(f"not in the {record}, so not checked: {', '.join(added)}")
