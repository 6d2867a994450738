"""Running tasks on models and putting the models side by side.

report = evaluate([model, parent], ["local_piqa"], data=Path("data"), limit=100)
"""

import contextlib
import dataclasses
import difflib
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError
from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager

from moe.checkpoint import manifest
from moe.errors import UserError
from moe.evals.adapter import MoeLM
from moe.tune.families import sites
from moe.tune.intervene import tuned
from moe.tune.tuning import Tuning
from moe.upcycle import receipt
from moe.upcycle.source import hash_file

ROOT = Path(__file__).parent
DOMAIN_TASK = "local_perplexity"
# the harness asks git for the revision of the folder we stand in, which says "fatal" in any other
evaluator.get_git_commit_hash = lambda: None


def suite(name: str) -> dict[str, Any]:
    """A named list of tasks with its limits, from evals/suites. Raises UserError."""
    path = ROOT / "suites" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"--suite {name}: no such suite. There is {', '.join(known)}.")
    return yaml.safe_load(path.read_text())


def find_tasks(
    names: Sequence[str], include: Path | None, data: Path | None, folders: Sequence[Path] = ()
) -> TaskManager:
    """The harness's tasks, ours and the user's; our own alone are found in a moment.

    Raises UserError for names that do not exist, with the closest that do.
    """
    paths: list[str | Path] = [ROOT / "tasks", *folders, *([include] if include else [])]
    metadata: dict[str, Any] = {"data": str(data) if data else None}
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = TaskManager(include_path=paths, metadata=metadata)
    problems = []
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Closest: {', '.join(close)}." if close else "See --include-path."
            problems.append(f"task {name!r} does not exist. {hint}")
    if problems:
        raise UserError("\n".join(problems))
    return manager


def evaluate(
    models: Sequence[Path],
    tasks: Sequence[str],
    include: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    say: Callable[[str], None] = print,
    tuning: Tuning | None = None,
) -> dict[str, Any]:
    """Every task on every model, the first being the one that the others are held against.

    A tuning is the first model's alone; the same folder may follow without it.
    Returns {"models": [identity …], "rows": [comparison …], "results": [the harness's own …]}.
    """
    with domain_tasks(tasks, data) as (tasks, folders):
        manager = find_tasks(tasks, include, data, folders)
        results = _results(models, tasks, manager, limit, batch_size, say, tuning)
    return {
        "models": [identify(model) for model in models],
        "tuning": None if tuning is None else dataclasses.asdict(tuning),
        "versions": {p: version(p) for p in ("lm_eval", "torch", "transformers")}
        | {"python": platform.python_version()},
        "rows": compare(results),
        "results": [
            {key: r[key] for key in ("results", "groups", "n-samples", "n-shot") if key in r}
            for r in results
        ],
    }


@contextlib.contextmanager
def domain_tasks(tasks: Sequence[str], data: Path | None) -> Iterator[tuple[list[str], list[Path]]]:
    """The tasks, and folders to find them in too.

    `local_perplexity` becomes a task per subfolder of `text/` in the data, where it has any: rows
    per domain instead of one number for all.
    """
    text = data / "text" if data else None
    inside = sorted(text.iterdir()) if text is not None and text.is_dir() else []
    domains = [p.name for p in inside if p.is_dir()]
    if DOMAIN_TASK not in tasks or not domains:
        yield list(tasks), []
        return
    with tempfile.TemporaryDirectory() as temporary:
        names = []
        for domain in domains:
            names.append(f"{DOMAIN_TASK}_{domain}")
            fields = {
                "include": str(ROOT / "tasks" / "perplexity.yaml"),
                "task": names[-1],
                "dataset_kwargs": {"domain": domain},
            }
            (Path(temporary) / f"{names[-1]}.yaml").write_text(yaml.safe_dump(fields))
        place = list(tasks).index(DOMAIN_TASK)
        yield [*tasks[:place], *names, *tasks[place + 1 :]], [Path(temporary)]


def _results(
    models: Sequence[Path],
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None,
    batch_size: int,
    say: Callable[[str], None],
    tuning: Tuning | None,
) -> list[Any]:
    """The harness's own result for each model."""
    results: list[Any] = []
    for model in models:
        first = tuning if not results else None
        say(f"evaluating {model}" + (f", {first.summary()}" if first else ""))
        lm = MoeLM(model, batch_size)
        for odd in first.cautions(sites(lm.model)) if first else ():
            say(f"note: {odd}")
        try:
            with tuned(lm.model, first):
                result = simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=1000,
                )
        except (ConnectionError, OSError) as error:
            raise UserError(_offline(error, tasks)) from error
        except TemplateError as error:
            raise UserError(f"a template of {', '.join(tasks)} fails: {error}.") from error
        assert result is not None
        results.append(result)
    return results


def _offline(error: Exception, tasks: Sequence[str]) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"a data set of {', '.join(tasks)} could not be fetched ({reason}). Without a network use "
        "tasks that read local files: --tasks local_… with --data, or --include-path."
    )


def identify(folder: Path) -> dict[str, Any]:
    """Which model that was: hashes of its config and of what lists the hashes of its weights."""
    identity = {"path": str(folder)}
    for name in ("config.json", receipt.NAME, manifest.NAME):
        if (folder / name).is_file():
            identity[name.removesuffix(".json")] = hash_file(folder / name)
    return identity


def compare(results: Sequence[Any]) -> list[dict[str, Any]]:
    """One row a task and metric: each model's value and error, and each baseline's difference.

    Differences are first model minus baseline. Their standard error is paired over items where
    the metric is a mean over items, since all models answer the same ones; else it is None.
    """
    rows = []
    for task, metrics in results[0]["results"].items():
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error_key = f"{name}_stderr,{filtered}"
            row = {
                "task": task,
                "metric": name if filtered == "none" else f"{name} ({filtered})",
                "values": [r["results"][task][key] for r in results],
                "errors": [_error(r["results"][task].get(error_key)) for r in results],
                "differences": [],
            }
            for baseline in results[1:]:
                difference = value - baseline["results"][task][key]
                paired = paired_error(results[0], baseline, task, name, filtered)
                row["differences"].append({"value": difference, "error": paired})
            rows.append(row)
    return rows


def _error(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def paired_error(first: Any, second: Any, task: str, metric: str, filtered: str) -> float | None:
    """Standard error of the mean difference over the items of a task."""

    def scores(result: Any) -> dict[int, float]:
        return {
            s["doc_id"]: float(s[metric])
            for s in result.get("samples", {}).get(task, [])
            if s.get("filter", "none") == filtered and isinstance(s.get(metric), int | float)
        }

    left, right = scores(first), scores(second)
    differences = [left[item] - right[item] for item in left if item in right]
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    return math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)


def table(report: dict[str, Any], names: Sequence[str]) -> str:
    """The comparison as a Markdown table with aligned columns."""
    head = ["task", "metric", *names, *(f"{names[0]} - {n}" for n in names[1:])]
    lines = [head]
    for row in report["rows"]:
        values = [
            _number(v) + (f" ± {_number(e)}" if e is not None else "")
            for v, e in zip(row["values"], row["errors"], strict=True)
        ]
        differences = [
            f"{d['value']:+.4f}" + (f" ± {_number(d['error'])}" if d["error"] is not None else "")
            for d in row["differences"]
        ]
        lines.append([row["task"], row["metric"], *values, *differences])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
