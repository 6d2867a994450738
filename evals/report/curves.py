"""Pictures of how runs went: losses, learning rate and gradient norm, evaluation meanwhile."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moe.evals.report.drawing import canvas, key, literal, style, svg, thinned, whole_steps
from moe.evals.report.inputs import Run

GREY = "0.3"
PANELS = 9  # of evaluations during training


def losses(runs: Sequence[Run]) -> Markup:
    """Training and validation loss of all runs, by step and by tokens."""
    figure, axes = canvas(3.1, columns=2, sharey=True)
    unit, counted = tokens(max(run.steps[-1]["tokens"] for run in runs))
    for ax, by_tokens in zip(axes[0], (False, True), strict=True):
        for number, run in enumerate(runs):
            scale = run.per_step / unit if by_tokens else 1.0
            x, y = thinned([s["step"] * scale for s in run.steps], [s["loss"] for s in run.steps])
            own = style(number)
            marker = own.pop("marker")
            ax.plot(x, y, **own, marker="." if len(x) == 1 else None)
            if run.validations:
                steps, values = zip(*run.validations, strict=True)
                own["linestyle"] = (0, (1, 1))
                ax.plot(
                    [s * scale for s in steps], values, **own, marker=marker, markersize=4.5,
                    markerfacecolor="white", linewidth=0.9,
                )  # fmt: skip
            mark(ax, run, own["color"], scale)
        ax.set_xlabel(counted if by_tokens else "step")
        whole_steps(ax) if not by_tokens else ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes[0][0].set_ylabel("loss per token (nats)")
    key(figure, [*names(runs), *meanings(runs)])
    return svg(figure, "losses", "Training and validation loss by step and by tokens")


def tokens(most: float) -> tuple[float, str]:
    """A unit in which so many are a number that an axis has room for, and its name."""
    if most >= 1e6:
        return 1e6, "million tokens"
    return (1e3, "thousand tokens") if most >= 1e3 else (1.0, "tokens")


def mark(ax: Axes, run: Run, colour: str, scale: float = 1.0) -> None:
    """Skipped steps as crosses below the curves, restarts as lines through them."""
    for step in run.restarts():
        ax.axvline(step * scale, color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
    if run.skipped:
        places = [s["step"] * scale for s in run.skipped]
        ax.plot(
            places, [0.02] * len(places), linestyle="", marker="x", markersize=5, color=colour,
            markeredgewidth=1.3, transform=ax.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def names(runs: Sequence[Run]) -> list[Line2D]:
    """A line a run for the legend."""
    return [
        Line2D([], [], **{**style(n), "marker": None}, label=literal(run.name))
        for n, run in enumerate(runs)
    ]


def meanings(runs: Sequence[Run]) -> list[Line2D]:
    """What else is in the picture."""
    found = []
    if any(run.validations for run in runs):
        found.append(
            Line2D([], [], color=GREY, linestyle=(0, (1, 1)), marker="o", markersize=4.5,
                   markerfacecolor="white", linewidth=0.9, label="validation")
        )  # fmt: skip
    if any(run.restarts() for run in runs):
        found.append(Line2D([], [], color=GREY, linestyle=(0, (1, 2)), label="started again"))
    if any(run.skipped for run in runs):
        found.append(
            Line2D([], [], color=GREY, linestyle="", marker="x", label="skipped step")
        )  # fmt: skip
    return found


def rates(runs: Sequence[Run]) -> Markup:
    """Learning rate and gradient norm (before clipping) by step."""
    figure, axes = canvas(2.7, columns=2)
    for ax, name, label in zip(
        axes[0], ("lr", "grad_norm"), ("learning rate", "gradient norm"),
        strict=True,
    ):  # fmt: skip
        for number, run in enumerate(runs):
            x, y = thinned([s["step"] for s in run.steps], [s[name] for s in run.steps])
            own = style(number)
            own["marker"] = "." if len(x) == 1 else None
            ax.plot(x, y, **own)
            mark(ax, run, own["color"])
        ax.set(xlabel="step", ylabel=label)
        whole_steps(ax)
    values = [s["grad_norm"] for run in runs for s in run.steps if s["grad_norm"] > 0]
    if values and max(values) > 20 * min(values):
        axes[0][1].set_yscale("log")
        axes[0][1].yaxis.set_major_formatter("{x:g}")  # not small exponents
    axes[0][0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    key(figure, [*names(runs), *[m for m in meanings(runs) if m.get_label() != "validation"]])
    return svg(figure, "rates", "Learning rate and gradient norm by step")


def scores(runs: Sequence[Run]) -> Markup:
    """What was evaluated during training, with 95 % intervals; PANELS metrics at most."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.scores))[:PANELS]
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure, axes = canvas(2.0 * rows + 0.6, rows, columns)
    for ax in axes.flat[len(metrics) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes.flat, metrics, strict=False):
        for number, run in enumerate(runs):
            points: list[Any] = run.scores.get(metric, [])
            if points:
                steps, values, held = zip(*sorted(points, key=lambda p: p[0]), strict=True)
                ends = [i or (v, v) for v, i in zip(values, held, strict=True)]
                bars = [
                    [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
                    [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
                ]
                ax.errorbar(steps, values, bars, **style(number), markersize=4, capsize=2)
        ax.set_title(literal(metric))
        ax.set_xlabel("step")
        whole_steps(ax)
    key(figure, [line for line, run in zip(names(runs), runs, strict=True) if run.scores])
    return svg(figure, "scores", "Evaluation during training")
