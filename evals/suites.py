"""Suites: lists of tasks with their shots and metrics, averaged and held beside a paper's table.

    suite = read("moh14", data=Path("data"))
    suite.tasks, suite.shots       # what to run, and with how many examples each
    table(suite, report, ["ours"])  # a row an entry, the averages, the paper's columns, notes

A hub task is replaced by a local one where the data folder holds the files that this one reads.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe.errors import UserError, raise_all
from moe.evals.measures import Measures, columns, mean

FOLDER = Path(__file__).parent / "suites"
LOCAL = "local_"  # what names of tasks on local files begin with


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Strict):
    """A row: the metric of a task or group, or the mean of it over several tasks.

    metric: as the harness names it, `exact_match,strict-match` where a filter has a name.
    data: a local task that can stand in for the only one, and the files that it reads.
    paper: the paper's values, one a column.
    """

    name: str
    task: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    shots: int = 0
    metric: str
    data: dict[str, tuple[str, ...]] = {}
    hypothesis: str | None = None
    paper: tuple[float | None, ...] = ()
    local: bool = False  # whether a local task stands in

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.task,) if isinstance(self.task, str) else self.task

    @property
    def key(self) -> str:
        """The metric as the harness's results name it."""
        return self.metric if "," in self.metric else f"{self.metric},none"

    @property
    def label(self) -> str:
        return f"{self.name} (local)" if self.local else self.name


class Average(_Strict):
    """The mean of all entries but some, as the paper takes it."""

    name: str
    without: tuple[str, ...] = ()
    paper: tuple[float | None, ...] = ()


class Suite(_Strict):
    """`columns` names the paper's models; `percent`: its scores are percentages; `include`: the
    folder of a suite's own tasks, which lie beside it where it names none.
    """

    about: str
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]
    averages: tuple[Average, ...] = ()
    columns: tuple[str, ...] = ()
    percent: bool = False
    notes: tuple[str, ...] = ()
    limit: int | None = None
    include: Path | None = None
    window: int | None = None
    stride: int | None = None

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for entry in self.entries for task in entry.tasks))

    @property
    def shots(self) -> dict[str, int]:
        return {task: entry.shots for entry in self.entries for task in entry.tasks}

    def stand_ins(self, task: str) -> list[str]:
        """The files in the folder of --data that would spare a task's own data."""
        of = [entry.data.values() for entry in self.entries if task in entry.tasks]
        return [" and ".join(files) for every in of for files in every]

    @property
    def windows(self) -> dict[str, int]:
        chosen = {"window": self.window, "stride": self.stride}
        return {key: value for key, value in chosen.items() if value is not None}


def read(name: str, data: Path | None = None) -> Suite:
    """A suite of ours by its name, or of a file that ends in .yaml; local tasks stand in where the
    data folder has their files. Raises UserError.
    """
    own = name.endswith(".yaml")
    path = Path(name) if own else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserError(f"suite {name}: there is none. There is {known}, or a .yaml file.")
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    except ValidationError as error:
        lines = (f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError("\n".join(lines)) from error
    found = tuple(_stand_in(entry, data) for entry in suite.entries)
    include = path.parent / (suite.include or "") if own else None
    suite = suite.model_copy(update={"entries": found, "include": include})
    _check(path, suite)
    return suite


def _check(path: Path, suite: Suite) -> None:
    """What a row, a column or an average that does not add up would be printed as."""
    names = [entry.name for entry in suite.entries]
    problems = [f"{path}: two entries are named {n}." for n in set(names) if names.count(n) > 1]
    asked = [(task, entry) for entry in suite.entries for task in entry.tasks]
    for task, entry in asked:
        if suite.shots[task] != entry.shots:
            problems.append(
                f"{path}: task {task} is asked with {entry.shots} shots and with "
                f"{suite.shots[task]}: a suite asks a task once. Use one number, or a task file of "
                "your own that includes it under another name."
            )
    rows: tuple[Entry | Average, ...] = (*suite.entries, *suite.averages)
    for row in rows:
        if row.paper and len(row.paper) != len(suite.columns):
            problems.append(
                f"{path}: {row.name} has {len(row.paper)} of the paper's values, there are "
                f"{len(suite.columns)} columns."
            )
    for average in suite.averages:
        unknown = [n for n in average.without if n not in names]
        problems += [f"{path}: {average.name} is without {n}, which is no entry." for n in unknown]
    raise_all(problems)


def _stand_in(entry: Entry, data: Path | None) -> Entry:
    for task, files in entry.data.items():
        if data is not None and all((data / file).is_file() for file in files):
            return entry.model_copy(update={"task": task, "local": True})
    return entry.model_copy(update={"local": all(t.startswith(LOCAL) for t in entry.tasks)})


def declared(manager: TaskManager, name: str) -> tuple[set[str], int]:
    """What a task, group or tag says of itself, without its data: metrics, and default shots.

    A group's metrics are those that it aggregates and that all its tasks have.
    """
    entry = manager.task_index[name]
    if entry.yaml_path is None:  # a tag: several tasks by one name, and no number for all of them
        return set(), 0
    config = load_yaml(entry.yaml_path, resolve_func=False)
    if not isinstance(config.get("task"), list):
        metrics = [m["metric"] for m in config.get("metric_list", [])]
        filters = [f["name"] for f in config.get("filter_list") or [{"name": "none"}]]
        return {f"{m},{f}" for m in metrics for f in filters}, config.get("num_fewshot") or 0
    children = [declared(manager, c) for c in _names(config["task"], manager)]
    common = set.intersection(*(metrics for metrics, _ in children)) if children else set()
    listed = config.get("aggregate_metric_list") or []
    chosen = {m["metric"] for m in (listed if isinstance(listed, list) else [listed])}
    return {m for m in common if m.split(",")[0] in chosen}, max(
        (s for _, s in children), default=0
    )


def _names(members: Sequence[Any], manager: TaskManager) -> list[str]:
    """Names of a group's members, of a tag's tasks."""
    found: list[str] = []
    for member in members:
        name = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(name, list):
            found += _names(name, manager)
        elif name in manager.task_index:
            entry = manager.task_index[name]
            found += [name] if entry.yaml_path else sorted(entry.tags)
    return found


class Tasks(TaskManager):
    """The harness's tasks, and the suite that says how they are asked, if one does."""

    def __init__(
        self,
        suite: Suite | None,
        include_path: list[str | Path],
        metadata: dict[str, Any],
        include_defaults: bool = True,
    ) -> None:
        super().__init__(
            include_path=include_path, metadata=metadata, include_defaults=include_defaults
        )
        self.suite = suite

    def check(self) -> None:
        """Raise UserError with every metric of the suite that its task does not have."""
        problems = []
        for entry in self.suite.entries if self.suite else ():
            for task in entry.tasks:
                metrics, _ = declared(self, task)
                if entry.key not in metrics:
                    close = difflib.get_close_matches(entry.key, metrics, n=3, cutoff=0)
                    has = f"It has {', '.join(close)}." if close else "Name the tasks in it."
                    problems.append(f"task {task} has no metric {entry.metric}. {has}")
        raise_all(problems)


def summary(suite: Suite, found: Measures, manager: TaskManager) -> dict[str, Any]:
    """A suite's table, ready for JSON: a row per entry and average, in the suite's unit; `tasks`
    are of how many a row is the mean.
    """
    unit = 100.0 if suite.percent else 1.0
    entries, averages, of = [], [], {}
    for entry in suite.entries:
        metric, _, filtered = entry.key.partition(",")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        parts = zip(*(found[task, name] for task in entry.tasks), strict=True)
        of[entry.name] = [mean(part).times(unit) for part in parts]
        entries.append({
            "name": entry.label, "shots": entry.shots, "metric": name, "tasks": len(entry.tasks),
            **columns(of[entry.name]), "paper": list(entry.paper),
        })  # fmt: skip
    for average in suite.averages:
        chosen = [values for name, values in of.items() if name not in average.without]
        averages.append({
            "name": average.name, "shots": None, "metric": f"mean of {len(chosen)}",
            "tasks": len(chosen), **columns([mean(part) for part in zip(*chosen, strict=True)]),
            "paper": list(average.paper),
        })  # fmt: skip
    return {
        "about": suite.about,
        "columns": list(suite.columns),
        "percent": suite.percent,
        "rows": entries + averages,
        "notes": _notes(suite, manager),
    }


def _notes(suite: Suite, manager: TaskManager) -> list[str]:
    """What is to be known of the rows: hypotheses, stand-ins, shots that are not the harness's."""
    lines = [f"{entry.name}: {entry.hypothesis}" for entry in suite.entries if entry.hypothesis]
    lines += suite.notes
    for entry in suite.entries:
        if entry.local and entry.data:
            files = " and ".join(f for files in entry.data.values() for f in files)
            lines.append(f"{entry.label}: {entry.tasks[0]}, on {files} in the folder of --data.")
    other = [
        f"{entry.name} {default}"
        for entry in suite.entries
        if (default := max(declared(manager, t)[1] for t in entry.tasks)) != entry.shots
    ]
    if other:
        lines.append(f"Shots that the harness would take by itself: {', '.join(other)}.")
    return lines


def table(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """A summary as Markdown: what it is, the rows, the paper's columns, the notes."""
    digits = 1 if found["percent"] else 4
    against = [f"{names[0]} - {name}" for name in names[1:]]
    papers = [f"paper: {column}" for column in found["columns"]]
    lines = [["task", "shots", "metric", *names, *against, *papers]]
    for row in found["rows"]:
        ours = [
            cell(*of, digits=digits)
            for of in zip(row["values"], row["errors"], row["why"], strict=True)
        ]
        ours += [cell(d["value"], d["error"], None, digits, "+") for d in row["differences"]]
        theirs = [cell(v, digits=digits) for v in row["paper"]] or ["–"] * len(papers)
        shots = "" if row["shots"] is None else str(row["shots"])
        lines.append([row["name"], shots, row["metric"], *ours, *theirs])
    notes = "\n".join(f"- {note}" for note in found["notes"])
    return "\n\n".join(filter(None, [found["about"], aligned(lines), notes]))


def cell(
    value: float | None,
    error: float | None = None,
    why: str | None = None,
    digits: int = 4,
    sign: str = "-",
) -> str:
    """A number with its error, or `why` it is none; large ones with an exponent."""

    def text(number: float, sign: str = "-") -> str:
        return f"{number:{sign}.{digits}f}" if abs(number) < 1e5 else f"{number:{sign}.4g}"

    if value is None:
        return why or "–"
    return text(value, sign) + ("" if error is None else f" ± {text(error)}")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the first its head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)
