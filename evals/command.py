"""`moe eval`."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from moe.errors import UserError, problem, raise_all
from moe.progress import quiet_libraries
from moe.tune.command import OtherModel, Scale, TuningFile

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model folder or training checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to create for results.json and results.md.")],
    tasks: Annotated[str | None, typer.Option(help="Task names, separated by commas.")] = None,
    suite: Annotated[str | None, typer.Option(help="A list of tasks shipped with moe.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more task files.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that local_… tasks read.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Model to hold it against; repeat for more.")
    ] = None,
    tuning: TuningFile = None,
    scale: Scale = None,
    other_model: OtherModel = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate with lm-evaluation-harness, beside baselines if any are given."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    models = [model, *(baseline or [])]
    problems = _problems(
        out, models, names, suite, {"--include-path": include_path, "--data": data}
    )
    if tuning is None and (scale is not None or other_model):
        problems.append("--scale and --other-model go with --tuning.")
    raise_all(problems)
    quiet_libraries()
    change = None
    if tuning is not None:
        from moe.tune.tuning import read_for

        change = read_for(tuning, model, scale, other_model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from moe.evals import run as runner

    if suite is not None:
        chosen = runner.suite(suite)
        names, limit = chosen["tasks"], limit or chosen.get("limit")
    report = runner.evaluate(
        models, names, include_path, data, limit, batch_size,
        say=lambda text: typer.echo(text, err=True), tuning=change,
    )  # fmt: skip
    labels = short_names(models, change is not None)
    table = runner.table(report, labels)
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    limited = f", {limit} items per task" if limit else ""
    (out / "results.md").write_text(f"# {labels[0]}{limited}\n\n{table}\n")
    typer.echo(json.dumps(report["rows"]) if as_json else f"{table}\n{out}/results.md")


def _problems(
    out: Path, models: list[Path], names: list[str], suite: str | None,
    folders: dict[str, Path | None],
) -> list[str]:  # fmt: skip
    """All that is wrong, said now and not after the first of several evaluations."""
    problems = problem(_check_out, out)
    for option, folder in folders.items():
        if folder is not None and not folder.is_dir():
            problems.append(f"{option} {folder} is not a folder.")
    if bool(names) == bool(suite):
        problems.append("give either --tasks or --suite.")
    for folder in models:
        problems += problem(_check_model, folder)
    return problems


def _check_out(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists. Choose another --out, or remove it.")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--out {out}: {parent} is not a folder that can be written to.")


def _check_model(folder: Path) -> None:
    from moe.checkpoint import store
    from moe.upcycle.source import read_config, weight_files

    read_config(folder)
    if not store.is_checkpoint(folder):
        weight_files(folder)


def short_names(models: list[Path], tuned: bool = False) -> list[str]:
    """Last parts of the paths, as many as it takes to tell them apart; the first may be tuned."""
    if tuned:
        first, *others = short_names([*models[1:], models[0]])[::-1]
        return [f"{first} tuned", *others[::-1]]
    for length in (1, 2, 3, 4):
        names = ["/".join(m.parts[-length:]) for m in models]
        if len(set(names)) == len(names):
            return names
    return [str(m) for m in models]
