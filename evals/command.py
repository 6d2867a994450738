"""`moe eval`."""

import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe.errors import UserError, problem, raise_all
from moe.progress import quiet_libraries
from moe.tune.command import OtherModel, Scale, TuningFile

if TYPE_CHECKING:
    from moe.evals.run import How
    from moe.parallel.world import Ranks
    from moe.tune.tuning import Tuning

app = typer.Typer(add_completion=False)
ANSWERS = "answers"  # in the folder of the results, until there are some
RESULTS = "results.json"
AGAIN = "start the same command again, and it goes on from what has been answered"


@dataclass(frozen=True, slots=True)
class Request:
    """What the command was asked for."""

    models: Sequence[Path]
    out: Path
    tasks: Sequence[str]
    suite: str | None
    include_path: Path | None
    data: Path | None
    limit: int | None
    window: int | None
    stride: int | None
    batch_size: str
    tuning: Path | None
    scale: float | None
    other_model: bool
    chat: bool
    multiturn: bool | None
    system: str | None
    cache: Path | None
    expert: int

    @property
    def answers(self) -> Path:
        return self.cache or self.out / ANSWERS

    @property
    def windows(self) -> dict[str, int]:
        chosen = {"window": self.window, "stride": self.stride}
        return {key: value for key, value in chosen.items() if value is not None}


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model folder or training checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to create for results.json and results.md.")],
    tasks: Annotated[str | None, typer.Option(help="Task names, separated by commas.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="A list of tasks: its name, or a YAML file.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more task files.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that local_… tasks read.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window of local_perplexity.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Sequences per forward pass; auto: what free memory allows.")
    ] = "8",
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Model to hold it against; repeat for more.")
    ] = None,
    tuning: TuningFile = None,
    scale: Scale = None,
    other_model: OtherModel = False,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts are messages of a chat.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool | None, typer.Option(help="Few-shot examples are turns of the chat (they are).")
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option(help="What the system says in the chat.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps answers for other evaluations too.")
    ] = None,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks among which the experts of a layer are divided.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate with lm-evaluation-harness, beside baselines if any are given.

    Under torchrun: torchrun --nproc-per-node N -m moe eval …. One that was stopped goes on.
    """
    from moe.parallel.world import say_once, world

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    request = Request(
        [model, *(baseline or [])], out, names, suite, include_path, data, limit, window,
        stride, batch_size, tuning, scale, other_model, apply_chat_template, fewshot_as_multiturn,
        system_instruction, cache, expert_parallel,
    )  # fmt: skip
    with world(again=AGAIN) as ranks:
        report, text = say_once(ranks, _evaluate, request, ranks)
        if ranks.rank == 0:
            typer.echo(json.dumps(report["rows"]) if as_json else text)
        ranks.barrier()  # a launcher ends all ranks as soon as one has ended


def _evaluate(request: Request, ranks: "Ranks") -> tuple[dict[str, Any], str]:
    """The report, written by the first rank, and what to print of it."""
    raise_all(_problems(request))
    quiet_libraries()
    models, change = request.models, None
    if request.tuning is not None:
        from moe.tune.tuning import read_for

        change = read_for(request.tuning, models[0], request.scale, request.other_model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from moe.evals import run as runner
    from moe.evals import suites

    suite = suites.read(request.suite, request.data) if request.suite else None
    names, limit, include = request.tasks, request.limit, request.include_path
    windows = request.windows
    if suite is not None:
        names, limit, include = suite.tasks, limit or suite.limit, include or suite.include
        windows = suite.windows | windows
    how = runner.How(
        runner.Prompting(request.chat, request.multiturn is not False, request.system),
        request.batch_size, ranks, request.expert, request.answers,
    )  # fmt: skip
    _check_answers(request, how, change)
    found = runner.evaluate(
        models, names, include, request.data, limit, how,
        say=lambda text: typer.echo(text, err=True) if ranks.rank == 0 else None,
        tuning=change, suite=suite, windows=windows,
    )  # fmt: skip
    report = _plain(found)
    labels = short_names(list(models), change is not None)
    everything = runner.table(report, labels)
    table = suites.table(report["suite"], labels) if suite else everything
    if ranks.rank == 0:
        limited = f", {limit} items per task" if limit else ""
        more = f"\n## Every metric\n\n{everything}\n" if suite else ""
        _write(request.out, report, f"# {labels[0]}{limited}\n\n{table}\n{more}")
    return report, f"{table}\n{request.out}/results.md"


def _write(out: Path, report: dict[str, Any], text: str) -> None:
    """The results; what has been answered on the way to them is no longer needed."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(text)
    partial = out / f"{RESULTS}.partial"
    partial.write_text(json.dumps(report, indent=1, default=str, allow_nan=False) + "\n")
    os.replace(partial, out / RESULTS)
    shutil.rmtree(out / ANSWERS, ignore_errors=True)


def _plain(value: Any) -> Any:
    """The same with null for what is no number: JSON has no other."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _problems(request: Request) -> list[str]:
    """All that is wrong, said now and not after the first of several evaluations."""
    begun = (request.out / ANSWERS).is_dir() and not (request.out / RESULTS).exists()
    problems = problem(check_out, request.out, begun)
    folders = {"--include-path": request.include_path, "--data": request.data}
    for option, folder in folders.items():
        if folder is not None and not folder.is_dir():
            problems.append(f"{option} {folder} is not a folder.")
    if bool(request.tasks) == bool(request.suite):
        problems.append("give either --tasks or --suite.")
    size = request.batch_size
    if size != "auto" and not (size.isdecimal() and int(size)):
        problems.append(f"--batch-size {size} is neither a number from 1 on nor auto.")
    if request.cache is not None and request.cache.exists() and not request.cache.is_dir():
        problems.append(f"--cache {request.cache} is not a folder.")
    for folder in request.models:
        problems += problem(check_model, folder)
    if request.tuning is None and (request.scale is not None or request.other_model):
        problems.append("--scale and --other-model go with --tuning.")
    if not request.chat and (request.multiturn is not None or request.system is not None):
        problems.append(
            "--fewshot-as-multiturn and --system-instruction go with --apply-chat-template."
        )
    return problems


def check_out(out: Path, begun: bool = False) -> None:
    if out.exists() and not begun:
        raise UserError(f"{out} exists. Choose another --out, or remove it.")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--out {out}: {parent} is not a folder that can be written to.")


def _check_answers(request: Request, how: "How", tuning: "Tuning | None") -> None:
    """Raise UserError where the folder holds an evaluation of other models, begun and not ended."""
    from moe.evals.answers import strangers
    from moe.evals.run import depends_on

    folder = request.out / ANSWERS
    if not folder.is_dir():
        return
    tunings = [tuning, *([None] * (len(request.models) - 1))]
    known = [depends_on(m, how, t) for m, t in zip(request.models, tunings, strict=True)]
    if found := strangers(folder, known):
        raise UserError(
            f"--out {request.out} holds an evaluation, begun and not ended, of another model than "
            f"{', '.join(map(str, request.models))}, or one with other versions, ranks of "
            f"--expert-parallel or tuning ({found[0].name}). Choose another --out, or remove it."
        )


def check_model(folder: Path) -> None:
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
