"""What a report is made of: run folders, results of `moe eval`, model folders; each is recognised
by what it holds, and read without taking anything in it for granted.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe.checkpoint import store
from moe.config import plain
from moe.errors import Corrupt, UserError, raise_all
from moe.evals.command import short_names
from moe.evals.report.significance import WIDTH
from moe.hf.inspect import inspect
from moe.jsonfile import parse_json, read_json
from moe.upcycle.receipt import Receipt

NUMBERS = ("loss", "grad_norm", "lr", "tokens", "tokens_per_second")
SIZES = ("total_parameters", "active_parameters", "flops_per_token")
BENCH = "bench.json"
SPEEDS = (
    "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token",
    "peak_memory_bytes", "cache_bytes_per_token", "forward_flops_per_token",
)  # fmt: skip
GONE = "its folder is gone"  # in the place of a model's kind
LAYER = ("max_over_mean", "dead_share", "entropy_share", "load_entropy")


Interval = tuple[float, float]


@dataclass
class Input:
    """A folder, the name that tells it from the others, what its model is (`moe inspect`), and what
    a reader should know.
    """

    folder: Path
    name: str
    facts: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Model(Input):
    """A model folder or a checkpoint."""


@dataclass
class Run(Input):
    """A run folder. `steps` are the logged ones; `validations` (step, loss); `scores` what was
    evaluated meanwhile, {"task/metric": [(step, value, interval or None)]}.
    """

    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, list[tuple[int, float, Interval | None]]] = field(default_factory=dict)
    gaps: dict[str, list[int]] = field(default_factory=dict)  # steps at which it is so
    skipped: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)

    @property
    def per_step(self) -> float:
        """Tokens of a step."""
        return self.steps[-1]["tokens"] / self.steps[-1]["step"] if self.steps else math.nan

    @property
    def validated(self) -> list[tuple[int, float]]:
        """The validations that gave a number."""
        return [(step, loss) for step, loss in self.validations if math.isfinite(loss)]

    @property
    def best(self) -> tuple[int, float | None] | None:
        """The checkpoint to use, and its validation loss: the lowest there is, else the newest;
        none whose validation gave no number.
        """
        kept = [(loss, step) for step, loss in self.validated if step in self.checkpoints]
        if kept:
            loss, step = min(kept)
            return step, loss
        broken = {step for step, _ in self.validations}
        sound = [step for step in self.checkpoints if step not in broken]
        return (sound[-1], None) if sound else None

    def restarts(self) -> list[int]:
        """Steps at which the run was started again."""
        starts = [event["step"] for event in self.events if event.get("event") == "started"]
        return [step for step in starts[1:] if step]

    def count(self, event: str) -> int:
        return sum(found.get("event") == event for found in self.events)


@dataclass
class Evaluation(Input):
    """What `moe eval` wrote: `rows` hold a value, an error and an interval (or None) a model, a
    difference with its p (or `why` there is none) a baseline.
    """

    models: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    model_facts: list[dict[str, Any] | None] = field(default_factory=list)


@dataclass
class Speed(Input):
    """What `moe bench` wrote: `rows` hold a model's numbers at a point, each a number or None, its
    speeds over the others' (or None), or an error.
    """

    device: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


Given = Run | Evaluation | Speed | Model


def read(folders: list[Path]) -> list[Given]:
    """All inputs. Raises UserError with every folder that is none, Corrupt where one is damaged."""
    problems = [p for folder in folders if (p := _unknown(folder))]
    twice = {f for f in folders if [g.absolute() for g in folders].count(f.absolute()) > 1}
    problems += [f"{folder} is given twice." for folder in sorted(twice)]
    raise_all(problems)
    found = [
        _read(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)
    ]
    if all(isinstance(x, Run) and not x.steps for x in found):
        names = ", ".join(str(x.folder) for x in found)
        raise UserError(
            f"{names}: nothing has been logged yet, the first line comes after train.log_every "
            "steps. Wait for it, or give another folder too."
        )
    return found


def _unknown(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder} is no folder. Give run folders, results of `moe eval`, or models."
    known = ("metrics.jsonl", "config.yaml", "results.json", BENCH, "config.json")
    if any((folder / name).is_file() for name in known):
        return None
    return (
        f"{folder} is neither a run folder (config.yaml, metrics.jsonl), nor results of `moe eval` "
        f"(results.json) or `moe bench` ({BENCH}), nor a model (config.json)."
    )


def _read(folder: Path, name: str) -> Given:
    if (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file():
        return read_run(folder, name)
    if (folder / "results.json").is_file():
        return read_evaluation(folder, name)
    if (folder / BENCH).is_file():
        return read_speed(folder, name)
    return Model(folder, name, inspect(folder))


def read_run(folder: Path, name: str) -> Run:
    """A run folder, whole or still being written."""
    run = Run(folder, name)
    if (path := folder / "config.yaml").is_file():
        try:
            run.text = path.read_text()
            run.config = plain(run.text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise Corrupt(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(run.config, dict):
            raise Corrupt(f"{path} holds no keys.")
    for line in read_lines(folder / "metrics.jsonl", run.notes):
        _take(run, line, folder / "metrics.jsonl")
    for said, at in run.gaps.items():
        more = f" and at {len(at) - 1} more" if len(at) > 1 else ""
        run.notes.append(f"{said} at step {at[0]}{more}")
    run.events = read_lines(folder / "events.jsonl", run.notes)
    run.loads = read_lines(folder / "loads.jsonl", run.notes)
    for line in run.loads:
        _check_loads(line, folder / "loads.jsonl")
    run.checkpoints = [step for step, _ in store.steps(folder)]
    if not run.steps:
        run.notes.append("it has logged no step yet")
    _find_model(run)
    return run


def _find_model(run: Run) -> None:
    """What is trained: from the newest checkpoint, else from the folder that the run began with;
    what proves that one's conversion stands in its own receipt.
    """
    newest, start = store.latest(run.folder), Path(str(run.config.get("model", "")))
    begun = (start / "config.json").is_file()
    if newest is not None:
        run.facts = inspect(newest)
    elif begun:
        run.facts = inspect(start)
    else:
        run.notes.append(f"neither a checkpoint nor its model {start} is here: its size is unknown")
    parent = Receipt.read(start) if begun else None
    if run.facts and run.facts["receipt"] and parent:
        run.facts["receipt"]["verification"] = parent.verification


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with its step; none where there is no file.

    A last line that is cut short is left out, and noted. Raises Corrupt for any other.
    """
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            value = parse_json(line)
            if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines):
                notes.append(f"the last line of {path.name} is cut short and left out")
                break
            raise Corrupt(
                f"{path}: line {number} is not what a run writes ({error}). Remove that line, or "
                "restore the file."
            ) from error
        found.append(value)
    return found


def _take(run: Run, line: dict[str, Any], path: Path) -> None:
    """Sort one line of metrics.jsonl. Raises Corrupt."""
    step = line["step"]
    try:
        if "skipped" in line:
            run.skipped.append({"step": step, "reason": str(line["skipped"])})
        elif "validation_loss" in line:
            run.validations.append((step, _gap(run, line, "validation_loss", "validation loss")))
        elif "evaluation" in line:
            for key, score in line["evaluation"].items():
                error = None if score.get("error") is None else _number(score["error"])
                value = _gap(run, {"step": step, **score}, "value", key)
                interval = _interval(_finite(value), error, score.get("interval"))
                run.scores.setdefault(key, []).append((step, value, interval))
        elif "loss" in line:
            values = {name: _number(line[name]) for name in NUMBERS}
            run.steps.append({**line, **values})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path}: step {step} is not what a run writes ({error!r}).") from error


def _gap(run: Run, line: dict[str, Any], key: str, name: str) -> float:
    """A number, or NaN and a gap where it was none: diverged runs are there to be looked at."""
    value = math.nan if line[key] is None else float(_number(line[key]))
    if not math.isfinite(value):
        run.gaps.setdefault(f"{name} is {line.get('why') or value}", []).append(line["step"])
    return value


def _check_loads(line: dict[str, Any], path: Path) -> None:
    try:
        for noun in ("heads", "experts"):
            for layer, found in line.get(noun, {}).items():
                int(layer)
                found.update({name: _number(found[name]) for name in LAYER})
                found["load"] = [_number(x) for x in found["load"]]
                if not found["load"]:
                    raise ValueError("no units")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path}: step {line['step']} is not a run's ({error!r}).") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.40} is no number")
    return value


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Results of `moe eval`. Raises Corrupt."""
    path = folder / "results.json"
    try:
        results = read_json(path)
        paths = [Path(str(model["path"])) for model in results["models"]]
        rows = [_row(row, len(paths)) for row in [*results["rows"], *_means(results)]]
        counts = results.get("results", [{}])[0].get("n-samples", {})
        facts = [_facts(p, m) for p, m in zip(paths, results["models"], strict=True)]
        for row in rows:
            row["items"] = (counts.get(row["task"]) or {}).get("effective")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path} is not what `moe eval` writes ({error!r}).") from error
    labels = short_names(paths, results.get("tuning") is not None)
    found = Evaluation(folder, name, models=labels, rows=rows, model_facts=facts)
    gone = [str(p) for p, known in zip(paths, facts, strict=True) if known is None]
    if gone:
        found.notes.append(f"{', '.join(gone)} is not here: its size is unknown")
    return found


def read_speed(folder: Path, name: str) -> Speed:
    """Results of `moe bench`. Raises Corrupt."""
    path = folder / BENCH
    try:
        results = read_json(path)
        labels = short_names([Path(str(model["path"])) for model in results["models"]])
        found = Speed(folder, name, device=str(results["device"]))
        found.notes = [str(note) for note in results.get("notes", [])]
        for point in results["points"]:
            place = {"batch": int(point["batch"]), "length": int(point["length"])}
            ratios = [None, *point["ratios"]]
            for label, measured, ratio in zip(labels, point["models"], ratios, strict=True):
                error = measured.get("error")
                row = {key: None if error else _finite(measured.get(key)) for key in SPEEDS}
                over = ratio and {key: _finite(ratio[key][0]) for key in SPEEDS[:3]}
                said = None if error is None else str(error)
                found.rows.append({**place, "model": label, **row, "over": over, "error": said})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path} is not what `moe bench` writes ({error!r}).") from error
    found.notes = [note.rstrip(".") for note in found.notes]
    return found


def _facts(folder: Path, model: dict[str, Any]) -> dict[str, Any] | None:
    """Of a model that was evaluated: its folder's, or the sizes in the results where it is gone."""
    if (folder / "config.json").is_file():
        return inspect(folder)
    if any(model.get(name) is None for name in SIZES):
        return None
    known = {name: _number(model[name]) for name in SIZES}
    if not all(math.isfinite(size) and size > 0 for size in known.values()):
        raise ValueError(f"sizes {known}")
    return {"model_type": GONE, **known, "layers": [], "receipt": None}


def _row(row: dict[str, Any], models: int) -> dict[str, Any]:
    """One metric of one task; a value that is not finite is none."""
    values = [_finite(value) for value in row["values"]]
    errors = [_finite(error) for error in row["errors"]]
    differences = [_difference(found) for found in row["differences"]]
    if not len(values) == len(errors) == len(differences) + 1 == models:
        raise ValueError(f"{len(values)} values of {models} models")
    given = row.get("intervals") or [None] * models
    return {
        "task": str(row["task"]), "metric": str(row["metric"]), "values": values,
        "errors": errors, "differences": differences,
        "intervals": [_interval(*x) for x in zip(values, errors, given, strict=True)],
    }  # fmt: skip


def _means(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a suite that are a mean over tasks, which stand nowhere else."""
    suite = results.get("suite") or {"rows": []}
    unit = " (%)" if suite.get("percent") else ""
    return [
        {**row, "task": row["name"], "metric": f"{row['metric']}{unit}"}
        for row in suite["rows"]
        if row.get("tasks", 1) > 1
    ]


def _difference(found: dict[str, Any]) -> dict[str, Any]:
    """Of a baseline. Nothing is claimed without a p, which results of before did not have."""
    value, error, p = (_finite(found.get(key)) for key in ("value", "error", "p"))
    if p is not None and not 0 <= p <= 1:
        raise ValueError(f"p {p}")
    interval = _interval(value, error, found.get("interval"))
    why = found.get("why") or (None if "p" in found else "evaluated without a test")
    return {
        "value": value, "error": error, "p": p, "of": str(found.get("of") or ""),
        "half": (interval[1] - interval[0]) / 2 if interval else None,
        "why": None if why is None else str(why),
    }  # fmt: skip


def _interval(value: float | None, error: float | None, given: Any) -> Interval | None:
    """The 95 % that the results name, else those of the normal distribution around a value."""
    if value is None:
        return None
    if given is not None:
        low, high = (_finite(end) for end in given)
        if low is None or high is None or not low <= high:
            raise ValueError(f"interval {given!r:.60}")
        return low, high
    return (value - WIDTH * error, value + WIDTH * error) if error else None


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(_number(value)) else float(value)
