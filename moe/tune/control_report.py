"""The page that `moe tune control` leaves: a table, a dose curve, and what may be said of them."""

import json
import math
from pathlib import Path
from typing import Any

from moe.tune.plot import dose_curve
from moe.tune.tuning import Tuning

NAMES = {
    "random": "random experts",
    "rate_matched": "as busy experts",
    "layer_matched": "of the same layers",
}
CAUTION = (
    "Rank scores alone prove nothing: the router of a fresh copy, whose experts are all the same, "
    "scores too. What counts is how far the tuning's change lies from that of other experts of the "
    "same number, and whether it spares the other groups."
)


def write(out: Path, result: dict[str, Any], tuning: Tuning, about: dict[str, Any]) -> str:
    """results.json, report.md and dose.png in a folder; returns the page."""
    (out / "results.json").write_text(json.dumps({"about": about, **result}, indent=1) + "\n")
    of_loss = result["measure"] == "loss"
    ylabel = "perplexity" if of_loss else f"share of {result['target']}"
    dose_curve(result["points"], out / "dose.png", ylabel, tuning.summary())
    page = text(result, tuning, about)
    (out / "report.md").write_text(page)
    return page


def text(result: dict[str, Any], tuning: Tuning, about: dict[str, Any]) -> str:
    """The page as Markdown."""
    of_loss = result["measure"] == "loss"
    what = (
        "perplexity (change in percent)"
        if of_loss
        else f"share of responses called {result['target']} (change in points)"
    )
    lines = [
        f"# {about['model']['name']}: {tuning.summary()}",
        "",
        f"What was found to go with **{result['target']}**, against other experts; {what}.",
        "",
        *_table(result, of_loss),
        "",
        *[f"- {_verdict(row, result['target'], of_loss)}" for row in result["groups"]],
        "",
        _busy(result["conditions"]),
        "",
        CAUTION,
        "",
        "![dose curve](dose.png)",
        "",
        "| expert | action | score | rate |",
        "|---|---|---:|---:|",
    ]
    for edit in tuning.experts[:20]:
        found = edit.found
        rate = found.get("rate_target", found.get("mass_target"))
        lines.append(
            f"| layer {edit.layer} {edit.part} {edit.expert} | {edit.action} | "
            f"{_number(found.get('score'))} | {_number(rate)} |"
        )
    if len(tuning.experts) > 20:
        lines.append(f"| … {len(tuning.experts) - 20} more | | | |")
    if about.get("text"):
        lines += ["", "## What should not suffer", "", about["text"]]
    if about.get("tasks"):
        lines += ["", "## Tasks", "", about["tasks"]]
    return "\n".join(lines) + "\n"


def table(result: dict[str, Any]) -> str:
    """A result's table alone."""
    return "\n".join(_table(result, result["measure"] == "loss"))


def _table(result: dict[str, Any], of_loss: bool) -> list[str]:
    kinds = list(result["groups"][0]["controls"])
    head = ["group", "prompts", "as it is", "tuned", "change", "95 %", *(NAMES[k] for k in kinds)]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    for row in result["groups"]:
        cells = [
            row["group"].replace("|", "\\|"),
            str(row["prompts"]),
            f"{row['plain']:.4g}",
            f"{row['tuned']:.4g}",
            _change(row["change"], of_loss),
            _span(row["interval"], of_loss),
        ]
        for kind in kinds:
            changes = row["controls"][kind]["changes"]
            cells.append(_span([min(changes), max(changes)], of_loss))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _verdict(row: dict[str, Any], target: str, of_loss: bool) -> str:
    """What a group's numbers say, and no more."""
    total = sum(len(c["changes"]) for c in row["controls"].values())
    smaller = sum(c["smaller"] for c in row["controls"].values())
    low, high = row["interval"]
    sure = low is not None and (low > 0 or high < 0)
    held = f"larger than that of {smaller} of {total} control sets" if total else "without controls"
    mark = " (the target)" if row["group"] == target else ""
    seen = "" if sure else "; over prompts it cannot be told from none"
    return f"{row['group']}{mark}: {_change(row['change'], of_loss)}, {held}{seen}."


def _span(ends: list[float | None], of_loss: bool) -> str:
    low, high = ends
    if low is None or high is None:
        return "one prompt"
    return f"{_change(low, of_loss)} to {_change(high, of_loss)}"


def _busy(conditions: list[dict[str, Any]]) -> str:
    """How busy the experts of each kind are: what matching by it came to."""
    full = max(len(c["experts"]) for c in conditions)
    rates: dict[str, list[float]] = {}
    for condition in conditions:
        if len(condition["experts"]) == full:
            rates.setdefault(condition["kind"], []).append(condition["rate"])
    parts = []
    for kind, some in rates.items():
        span = sorted({f"{rate:.3g}" for rate in some}, key=float)
        parts.append(f"{NAMES.get(kind, kind)} {' to '.join(dict.fromkeys((span[0], span[-1])))}")
    sets = {k: sum(c["kind"] == k for c in conditions) for k in NAMES if k in rates}
    return (
        f"Share of tokens that these experts are on for, mean of a set: {', '.join(parts)}. "
        f"Different sets: {', '.join(f'{n} {NAMES[k]}' for k, n in sets.items())}."
    )


def _change(change: float, of_loss: bool) -> str:
    """A log ratio of perplexities in percent, or a difference of shares in points."""
    if of_loss:
        return f"{100 * math.expm1(min(change, 50.0)):+.3g} %"
    return f"{100 * change:+.3g}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""
