"""Running tasks on models and putting the models side by side.

report = evaluate([model, parent], ["local_piqa"], data=Path("data"), limit=100)
"""

import contextlib
import dataclasses
import difflib
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe.checkpoint import manifest
from moe.errors import UserError, raise_all
from moe.evals import perplexity, suites
from moe.evals.adapter import MoeLM, alone
from moe.evals.answers import Answers
from moe.evals.harness import Prompting, ask, check, load
from moe.hf.inspect import routed, sizes
from moe.hf.loading import identity, load_tokenizer
from moe.parallel.world import Ranks
from moe.tune.families import sites
from moe.tune.intervene import tuned
from moe.tune.tuning import Tuning
from moe.upcycle import receipt
from moe.upcycle.source import hash_file, read_config

ROOT = Path(__file__).parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class How:
    """How models are asked: prompts, batches (a number of sequences or "auto"), ranks (`expert` of
    them share a model's experts), and a folder for what has been answered already.
    """

    prompting: Prompting = field(default_factory=Prompting)
    batch_size: int | str = 8
    ranks: Ranks = field(default_factory=alone)
    expert: int = 1
    cache: Path | None = None


def find_tasks(
    names: Sequence[str],
    include: Path | None,
    data: Path | None,
    folders: Sequence[Path] = (),
    suite: suites.Suite | None = None,
    windows: Mapping[str, int] | None = None,
) -> suites.Tasks:
    """The harness's tasks, ours and the user's; our own alone are found in a moment.

    Raises UserError for names that do not exist, with the closest that do, and for metrics of the
    suite that its tasks do not have.
    """
    paths: list[str | Path] = [ROOT / "tasks", *folders, *([include] if include else [])]
    metadata: dict[str, Any] = {"data": str(data) if data else None, **(windows or {})}
    manager = suites.Tasks(suite, paths, metadata, include_defaults=False)
    if not all(name in manager.all_tasks for name in names):
        manager = suites.Tasks(suite, paths, metadata)
    problems = []
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Closest: {', '.join(close)}." if close else "See --include-path."
            problems.append(f"task {name!r} does not exist. {hint}")
    raise_all(problems)
    manager.check()
    return manager


def evaluate(
    models: Sequence[Path],
    tasks: Sequence[str],
    include: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    how: How | None = None,
    say: Callable[[str], None] = print,
    tuning: Tuning | None = None,
    suite: suites.Suite | None = None,
    windows: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Every task on every model, the first being the one that the others are held against.

    A tuning is the first model's alone; the same folder may follow without it.
    Returns {"models": [identity …], "rows": [comparison …], "suite": its table or None,
    "results": [the harness's own …]}; on every rank, with the harness's errors on the first alone.
    """
    how = how or How()
    with perplexity.domain_tasks(tasks, data, divide=suite is None) as (tasks, folders):
        manager = find_tasks(tasks, include, data, folders, suite, windows)
        loaded = load(tasks, manager)
        kinds = {task.OUTPUT_TYPE for task in loaded["tasks"].values()}
        if windows and perplexity.REQUEST not in kinds:
            raise UserError(
                f"--window and --stride are for {perplexity.TASK}, which is not among the tasks."
            )
        for model in models:
            given = read_config(model), load_tokenizer(model)
            check(loaded, *given, how.prompting, str(model))
        results = [
            _result(model, loaded, limit, how, say, None if place else tuning)
            for place, model in enumerate(models)
        ]
        rows = compare(results)
        found = suites.summary(suite, rows, manager) if suite else None
    return {
        "models": [identify(model) for model in models],
        "tuning": None if tuning is None else dataclasses.asdict(tuning),
        "prompting": dataclasses.asdict(how.prompting),
        "versions": versions(),
        "rows": rows,
        "suite": found,
        "results": [
            {key: r[key] for key in ("results", "groups", "n-samples", "n-shot") if key in r}
            for r in results
        ],
    }


def versions() -> dict[str, str]:
    """Of all that scores depend on besides the model."""
    packages = ("lm_eval", "torch", "transformers")
    return {p: version(p) for p in packages} | {"python": platform.python_version()}


def _result(
    model: Path,
    loaded: Any,
    limit: int | None,
    how: How,
    say: Callable[[str], None],
    tuning: Tuning | None,
) -> Any:
    """The harness's own result for a model."""
    say(f"evaluating {model}" + (f", {tuning.summary()}" if tuning else ""))
    with contextlib.ExitStack() as stack:
        answers = None
        if how.cache is not None and how.ranks.rank == 0:
            answers = Answers(how.cache, depends_on(model, how, tuning))
            stack.callback(answers.close)
        lm = MoeLM(model, how.batch_size, ranks=how.ranks, answers=answers, expert=how.expert)
        for odd in tuning.cautions(sites(lm.model)) if tuning else ():
            say(f"note: {odd}")
        stack.enter_context(tuned(lm.model, tuning))
        return ask(lm, loaded, limit, how.prompting)


def depends_on(model: Path, how: How, tuning: Tuning | None) -> dict[str, Any]:
    """All that the answers of a model depend on besides the questions and how they are batched."""
    return {
        "model": {**identity(model), "name": None},  # wherever it lies
        "tokenizer": {n: hash_file(model / n) for n in TOKENIZER if (model / n).is_file()},
        "tuning": None if tuning is None else dataclasses.asdict(tuning),
        "device": how.ranks.device.type,
        "expert": how.expert,
        "versions": versions(),
    }


def identify(folder: Path) -> dict[str, Any]:
    """Which model that was: hashes of its config and of what lists the hashes of its weights; and
    its size, of an architecture that we know.
    """
    found: dict[str, Any] = {"path": str(folder)}
    for name in ("config.json", receipt.NAME, manifest.NAME):
        if (folder / name).is_file():
            found[name.removesuffix(".json")] = hash_file(folder / name)
    with contextlib.suppress(UserError):
        found |= sizes(routed(read_config(folder)))
    return found


def compare(results: Sequence[Any]) -> list[dict[str, Any]]:
    """One row a task and metric: each model's value and error, and each baseline's difference.

    Differences are first model minus baseline. Their standard error is paired over items, since all
    models answer the same ones, where the metric is a mean over items or, by bootstrap, a ratio of
    sums over documents; else it is None. Intervals hold 95 %.
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
            draws = perplexity.resample(results, task, name)
            if draws is not None:
                row["errors"] = [_error(float(d.std())) for d in draws]
            scores = [item_scores(r, task, name, filtered) for r in results]
            row["intervals"] = intervals(row["values"], row["errors"], draws, scores)
            for i, baseline in enumerate(results[1:], start=1):
                difference = value - baseline["results"][task][key]
                paired = paired_error(results[0], baseline, task, name, filtered)
                if draws is not None:
                    paired = _error(float((draws[0] - draws[i]).std()))
                row["differences"].append({"value": difference, "error": paired})
            rows.append(row)
    return rows


def intervals(
    values: Sequence[float], errors: Sequence[float | None], draws: Any, scores: Sequence[Any]
) -> list[tuple[float, float] | None]:
    """Each model's 95 %: of its draws; of a share of items, which ends at 0 and 1 and is there
    where all items are alike; else of the normal distribution around a mean.
    """
    if draws is not None:
        return [perplexity.interval(d) for d in draws]
    found: list[tuple[float, float] | None] = []
    for value, error, items in zip(values, errors, scores, strict=True):
        right = sum(items.values())
        if items and {*items.values()} <= {0.0, 1.0} and math.isclose(right / len(items), value):
            found.append(wilson(value, len(items)))
        else:
            found.append((value - 1.96 * error, value + 1.96 * error) if error else None)
    return found


def wilson(share: float, items: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of so many items (Wilson 1927)."""
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z * math.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2) / (1 + z * z / items)
    return max(0.0, middle - half), min(1.0, middle + half)


def _error(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def item_scores(result: Any, task: str, metric: str, filtered: str) -> dict[int, float]:
    """What each item of a task counts, by its number; none where a metric is no mean of items."""
    return {
        s["doc_id"]: float(s[metric])
        for s in result.get("samples", {}).get(task, [])
        if s.get("filter", "none") == filtered and isinstance(s.get(metric), int | float)
    }


def paired_error(first: Any, second: Any, task: str, metric: str, filtered: str) -> float | None:
    """Standard error of the mean difference over the items of a task."""
    left, right = (item_scores(result, task, metric, filtered) for result in (first, second))
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
    return suites.aligned(lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
