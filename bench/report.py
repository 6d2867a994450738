"""Timing sides in turn, and what a benchmark leaves: a table, and results as JSON and Markdown."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure to reach: `value` must be at most, or at least, `limit`."""

    what: str
    value: float
    sign: str  # ≤ or ≥
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.sign == "≤" else self.value >= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        return f"{self.what}: {self.value:.2f} (goal {self.sign} {self.limit:g}): {verdict}"


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each side, run in turn (A B C A B C …), so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(warmup + repeats):
        for name, run in sides.items():
            start = clock()
            run()
            if round_ >= warmup:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table, aligned for the terminal too."""
    cells = [list(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in pairs) + " |"
        for line in cells
        for pairs in [list(enumerate(zip(line, widths, strict=True)))]
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else (
        f"{value:.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def publish(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Goal],
    notes: Sequence[str],
    out: Path | None,
    packages: tuple[str, ...] = machine.PACKAGES,
) -> None:
    """Print a result; with `out`, a folder, write NAME.json and NAME.md there."""
    facts = machine.describe(packages)
    text = "\n".join(
        [
            f"# {title}",
            "",
            table(rows),
            "",
            *(f"- {goal}" for goal in goals),
            "",
            *(line for note in notes for line in (note, "")),
            table([{"machine": key, "": value} for key, value in facts.items()]),
        ]
    )
    print(text, flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        values = {
            "name": name,
            "machine": facts,
            "rows": rows,
            "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
            "notes": notes,
        }
        (out / f"{name}.md").write_text(text + "\n")
        (out / f"{name}.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
