"""One page of everything: what the inputs hold as tables and pictures, filled into a template.

Path("report.html").write_text(render(read(folders)))
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moe.evals.chance import DRAWS, FEWEST, LEVEL
from moe.evals.report import curves, loads, quality
from moe.evals.report.drawing import STYLE
from moe.evals.report.inputs import Evaluation, Given, Input, Run, Speed
from moe.evals.report.significance import judge
from moe.hf.inspect import describe_model

PICTURED = 6  # runs whose loads are drawn: a page must stay small
ROWS = 40  # of a run's course


@matplotlib.rc_context(STYLE)
def render(inputs: Sequence[Given]) -> str:
    """The page. Whatever comes from files is escaped."""
    runs = [x for x in inputs if isinstance(x, Run)]
    shown = [run for run in runs if run.steps]
    evaluations = [x for x in inputs if isinstance(x, Evaluation)]
    verdicts = judge([x.rows for x in evaluations])
    found = quality.points(inputs)
    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    room.filters.update(number=number, amount=amount, value=plain)
    return room.get_template("page.html.jinja").render(
        style=Markup((Path(__file__).parent / "page.css").read_text()),
        inputs=inputs,
        runs=runs,
        shown=shown,
        results=[result(run) for run in runs],
        different=differences(runs),
        models=models(inputs),
        evaluations=evaluations,
        verdicts=verdicts,
        level=LEVEL,
        fewest=FEWEST,
        least=1 / (DRAWS + 1),
        comparisons=next((v.among for v in verdicts.values()), 0),
        curves={
            "losses": curves.losses(shown) if shown else None,
            "rates": curves.rates(shown) if shown else None,
            "scores": curves.scores(shown) if any(run.scores for run in shown) else None,
        },
        courses=[course(run) for run in shown],
        intervals=[quality.evaluations(n, x) for n, x in enumerate(evaluations)],
        speeds=[x for x in inputs if isinstance(x, Speed)],
        cost=quality.against_cost(found) if found else None,
        points=found,
        loads=[load_section(n, run) for n, run in enumerate(shown) if loads.routed(run)],
        receipts=[provenance(x) for x in inputs if x.facts],
    )


def result(run: Run) -> dict[str, Any]:
    """The verdict on a run in numbers; None where there is none."""
    last = run.steps[-1] if run.steps else {}
    validation = run.validations[-1] if run.validations else (None, None)
    lowest = min(run.validated, key=lambda v: v[1], default=(None, None))
    planned = run.config.get("train")
    speeds = [step["tokens_per_second"] for step in run.steps]
    started = run.count("started")
    return {
        "name": run.name,
        "step": last.get("step"),
        "planned": planned.get("steps") if isinstance(planned, dict) else None,
        "tokens": last.get("tokens"),
        "loss": finite(last.get("loss")),
        "validation": finite(validation[1]),
        "validation_step": validation[0],
        "lowest": lowest[1],
        "lowest_step": lowest[0],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "best": run.best[0] if run.best else None,
        "starts": started or None,
        "preemptions": run.count("preempted") if started else None,
        "skipped": len(run.skipped),
        "notes": run.notes,
    }


def finite(value: float | None) -> float | None:
    """The number, of one that JSON has too."""
    return None if value is None or not math.isfinite(value) else value


def course(run: Run) -> dict[str, Any]:
    """Some of a run's steps, evenly chosen, the last one always, with the validation losses."""
    every = max(1, math.ceil(len(run.steps) / ROWS))
    chosen = [s for i, s in enumerate(run.steps) if (len(run.steps) - 1 - i) % every == 0]
    validated = dict(run.validations)
    return {
        "name": run.name,
        "of": len(run.steps),
        "steps": [{**s, "validation": finite(validated.get(s["step"]))} for s in chosen],
        "skipped": run.skipped[:ROWS],
        "more": max(0, len(run.skipped) - ROWS),
    }


def load_section(number: int, run: Run) -> dict[str, Any]:
    """Pictures and tables of a run's loads."""
    parts = []
    for part in loads.table(run):
        drawn: tuple[Any, Any] = (None, None)
        if number < PICTURED:
            given = number, run, part["noun"]
            drawn = loads.units(*given), loads.balance(*given)
        parts.append({**part, "units_picture": drawn[0], "balance_picture": drawn[1]})
    return {"name": run.name, "parts": parts, "samples": len(run.loads)}


def models(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Every model whose size is known, with the inputs that are of it."""
    found: dict[str, dict[str, Any]] = {}
    of_inputs = [(x.name, x.facts) for x in inputs]
    for x in inputs:
        if isinstance(x, Evaluation):
            of_inputs += zip((f"{x.name}: {m}" for m in x.models), x.model_facts, strict=True)
    for name, facts in of_inputs:
        if facts:
            of = {k: v for k, v in facts.items() if k != "receipt"}
            entry = found.setdefault(repr(of), {**of, "names": [], "words": words(facts)})
            entry["names"].append(name)
    return list(found.values())


def provenance(x: Input) -> dict[str, Any]:
    """What a model was made from, and what was measured of it; receipts may lack anything."""
    receipt = (x.facts or {})["receipt"] or {}
    steps = []
    for step in receipt.get("steps", []):
        options, sources = step.get("options"), step.get("sources")
        steps.append({
            "recipe": str(step["recipe"]),
            "options": pairs(options, "="),
            "sources": [str(s.get("path")) for s in sources or [] if isinstance(s, dict)],
            "made": ", ".join(filter(None, [str(step.get("created") or ""),
                                            pairs(step.get("versions"), " ")])),
        })  # fmt: skip
    found = receipt.get("verification")
    return {"name": x.name, "steps": steps, "verification": verification(found) if found else None}


def pairs(table: Any, between: str) -> str:
    """A table of a receipt in a line."""
    if not isinstance(table, dict):
        return ""
    return ", ".join(f"{k}{between}{plain(v)}" for k, v in table.items() if v is not None)


def verification(record: Any) -> dict[str, Any]:
    """What stands in a receipt's verification, as rows of a name, a key and a value."""
    if not isinstance(record, dict):
        return {"text": "", "rows": []}
    said = {"pass": "the function is preserved", "fail": "the function is NOT preserved",
            "measured": "measured, nothing claimed"}  # fmt: skip
    rows = [("result", "status", said.get(str(record.get("status")), record.get("status")))]
    perplexity = record.get("perplexity")
    known = record | (perplexity if isinstance(perplexity, dict) else {})
    for name, key in (
        ("relative difference of logits", "relative_difference"),
        ("largest difference", "maximum_difference"),
        ("share of tokens with the same argmax", "argmax_agreement"),
        ("perplexity of the parent", "parent"),
        ("perplexity of the result", "converted"),
    ):
        if isinstance(known.get(key), int | float):
            rows.append((name, key, known[key]))
    return {"text": str(record.get("text", "")), "rows": rows}


def words(facts: dict[str, Any]) -> list[str]:
    """The routing of a model, equal layers on one line."""
    return [line.strip() for line in describe_model(Path(), facts)[1:]]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Configuration keys in which runs differ, with the value of each."""
    sides = [flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for side in sides for key in side))
    rows = [(key, [side.get(key, "–") for side in sides]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1]


def flat(config: dict[Any, Any], at: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{at}{key}.")
        else:
            found[f"{at}{key}"] = plain(value)
    return found


def plain(value: Any) -> str:
    """A value of a configuration in a line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()


def number(value: float | None, digits: int = 4) -> str:
    """With so many digits behind the point, or significant ones where that says nothing."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{digits}f}"


def amount(value: float | None) -> str:
    """1,234; 56.7 M; 8.9 B."""
    if value is None:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"
