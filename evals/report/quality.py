"""Pictures of what models are worth: evaluations with their intervals, and quality against cost."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from moe.evals.report.drawing import canvas, key, literal, style, svg
from moe.evals.report.inputs import Evaluation, Input, Run

TASKS, MEASURES = 30, 4  # in one picture
LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
COSTS = (("flops_per_token", 1e6, "MFLOPs to train on a token"),
         ("active_parameters", 1e6, "million parameters active per token"))  # fmt: skip


class Point(NamedTuple):
    """A model's quality by one measure; what it costs stands in its facts."""

    measure: str
    label: str
    value: float
    facts: dict[str, Any]


def evaluations(number: int, found: Evaluation) -> list[tuple[str, Markup]]:
    """Per metric: tasks below each other, models beside each other, 95 % intervals."""
    metrics = dict.fromkeys(row["metric"] for row in found.rows)
    drawn = []
    for place, metric in enumerate(metrics):
        rows = [row for row in found.rows if row["metric"] == metric][:TASKS]
        models = len(found.models)
        figure, ((ax,),) = canvas(0.9 + len(rows) * (0.16 * models + 0.12))
        for model in range(models):
            shift = 0.7 * ((model + 0.5) / models - 0.5)
            shown = [(y, r) for y, r in enumerate(rows) if r["values"][model] is not None]
            own = {**style(model), "linestyle": ""}
            ax.errorbar(
                [r["values"][model] for _, r in shown], [y + shift for y, _ in shown],
                xerr=_reach(shown, model),
                **own, markersize=4.5, capsize=2, elinewidth=1.1,
            )  # fmt: skip
        ax.set_yticks(range(len(rows)), [literal(row["task"]) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel(literal(metric) + better(metric))
        ax.grid(axis="y", visible=False)
        handles = [
            Line2D([], [], **{**style(m), "linestyle": ""}, markersize=4.5, label=literal(name))
            for m, name in enumerate(found.models)
        ]
        key(figure, handles)
        name = f"evaluation-{number}-{place}"
        drawn.append((metric, svg(figure, name, f"{metric} of every task and model")))
    return drawn


def _reach(rows: Sequence[tuple[int, dict[str, Any]]], model: int) -> list[list[float]]:
    """How far each interval goes below the value and above it; nowhere where there is none."""
    found: list[list[float]] = [[], []]
    for _, row in rows:
        value = row["values"][model]
        low, high = row["intervals"][model] or (value, value)
        found[0].append(max(0.0, value - low))
        found[1].append(max(0.0, high - value))
    return found


def better(metric: str) -> str:
    return "  (less is better)" if any(m in metric for m in LESS_IS_BETTER) else ""


def points(inputs: Sequence[Input]) -> list[Point]:
    """What every model whose size is known scored, runs at their end; of numbers alone."""
    found = []
    for x in inputs:
        if isinstance(x, Run) and x.facts and x.steps:
            if x.validations:
                found.append(Point("validation loss", x.name, x.validations[-1][1], x.facts))
            else:
                found.append(Point("training loss", x.name, x.steps[-1]["loss"], x.facts))
            for metric, scores in x.scores.items():
                found.append(Point(metric, x.name, scores[-1][1], x.facts))
        elif isinstance(x, Evaluation):
            for row in x.rows:
                for label, facts, value in zip(x.models, x.model_facts, row["values"], strict=True):
                    if facts and value is not None:
                        measure = f"{row['task']}/{row['metric']}"
                        found.append(Point(measure, label, value, facts))
    return [point for point in found if math.isfinite(point.value)]


def against_cost(found: Sequence[Point]) -> Markup:
    """The losses and the measures of most sizes of models, against active FLOPs and active
    parameters, log x.
    """
    sizes: dict[str, set[float]] = {}
    for point in found:
        sizes.setdefault(point.measure, set()).add(point.facts[COSTS[0][0]])
    first = ("validation loss", "training loss")
    measures = sorted(sizes, key=lambda m: (m not in first, -len(sizes[m])))[:MEASURES]
    labels = list(dict.fromkeys(point.label for point in found if point.measure in measures))
    figure, axes = canvas(2.0 * len(measures) + 0.5, len(measures), 2, sharey="row")
    for row, measure in zip(axes, measures, strict=True):
        for ax, (cost, unit, name) in zip(row, COSTS, strict=True):
            for point in (p for p in found if p.measure == measure):
                own = {**style(labels.index(point.label)), "linestyle": ""}
                ax.plot(point.facts[cost] / unit, point.value, **own, markersize=6)
            _log(ax, [p.facts[cost] / unit for p in found if p.measure == measure])
            ax.margins(y=0.2)
            ax.set_xlabel(name)
        row[0].set_title(literal(measure) + better(measure), loc="left")
    handles = [
        Line2D([], [], **{**style(n), "linestyle": ""}, markersize=6, label=literal(label))
        for n, label in enumerate(labels)
    ]
    key(figure, handles)
    return svg(figure, "quality", "Quality against active FLOPs and parameters")


def _log(ax: Any, values: Sequence[float]) -> None:
    """A logarithmic axis, with the models' own numbers below it where they have room."""
    low, high = min(values), max(values)
    room = max(1.2, (high / low) ** 0.15)
    ax.set_xscale("log")
    ax.set_xlim(low / room, high * room)
    ax.xaxis.set_minor_locator(NullLocator())
    ticks = [low]
    for value in sorted(values):
        if value / ticks[-1] > (high / low * room**2) ** 0.12:
            ticks.append(value)
    ax.set_xticks(ticks, [f"{tick:.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
