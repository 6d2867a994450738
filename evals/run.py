"""Running tasks on models and putting the models side by side.

report = evaluate([model, parent], ["local_piqa"], data=Path("data"), limit=100)
"""

import contextlib
import dataclasses
import difflib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from moe.checkpoint import manifest
from moe.errors import UserError, raise_all
from moe.evals import measures, perplexity, suites
from moe.evals.adapter import MoeLM, alone
from moe.evals.answers import Answers
from moe.evals.harness import Prompting, answers_of, ask, check, load
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
            problems.append(unknown(name, manager.all_tasks))
    if problems and include:  # the harness passes over what it cannot read
        problems += unreadable(include)
    raise_all(problems)
    manager.check()
    return manager


def unknown(name: str, known: Sequence[str]) -> str:
    """What is said of a task that there is not."""
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"Closest: {', '.join(close)}." if close else "See --include-path."
    return f"task {name!r} does not exist. {hint}"


def unreadable(folder: Path) -> list[str]:
    """Task files that are not YAML."""
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            problems.append(f"{path} is not a task: {' '.join(str(error).split())}.")
    return problems


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
        answers = answers_of(loaded, limit)
        for model in models:
            given = read_config(model), load_tokenizer(model)
            check(loaded, *given, how.prompting, str(model), answers)
        results = [
            _result(model, loaded, limit, how, say, None if place else tuning)
            for place, model in enumerate(models)
        ]
        found = measures.measure(results, loaded["groups"])
        summary = suites.summary(suite, found, manager) if suite else None
    return {
        "models": [identify(model) for model in models],
        "tuning": None if tuning is None else dataclasses.asdict(tuning),
        "prompting": dataclasses.asdict(how.prompting),
        "versions": versions(),
        "rows": measures.rows(found),
        "suite": summary,
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


def table(report: dict[str, Any], names: Sequence[str]) -> str:
    """The comparison as a Markdown table with aligned columns."""
    lines = [["task", "metric", *names, *(f"{names[0]} - {n}" for n in names[1:])]]
    for row in report["rows"]:
        values = map(suites.cell, row["values"], row["errors"], row["why"])
        differences = (suites.cell(d["value"], d["error"], sign="+") for d in row["differences"])
        lines.append([row["task"], row["metric"], *values, *differences])
    return suites.aligned(lines)
