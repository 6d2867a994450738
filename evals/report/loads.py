"""Pictures of where tokens went: loads of every layer's units, and their balance over steps."""

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from moe.evals.report.drawing import canvas, svg
from moe.evals.report.inputs import Run

NOUNS = {"heads": "head", "experts": "expert"}
SAMPLES = 300  # of steps in one picture
MARKED = 400  # units without tokens that get a mark
BALANCE = (  # what is drawn over steps, its name, and the ends of its colours at least
    ("max_over_mean", "worst load over mean", (1.0, 2.0)),
    ("load_entropy", "entropy of the load", (0.8, 1.0)),
    ("dead_share", "dead share", (0.0, 0.1)),
    ("entropy_share", "entropy of the choice", (0.0, 1.0)),
)


def routed(run: Run) -> list[str]:
    """Of heads and experts, what this run routes."""
    return [noun for noun in NOUNS if run.loads and run.loads[-1].get(noun)]


def units(number: int, run: Run, noun: str) -> Markup:
    """Layers × units, load over the layer's mean, at the first and the last sample."""
    samples = [line for line in run.loads if line.get(noun)]
    shown = [samples[0], samples[-1]] if len(samples) > 1 else samples
    layers = list(shown[-1][noun])
    height = 1.5 + min(4.2, 0.16 * len(layers) + 0.3)
    figure, axes = canvas(height, columns=2, sharey=True)
    for ax, line in zip(axes[0], shown, strict=False):
        grid = _grid([line[noun][layer]["load"] for layer in layers if layer in line[noun]]) / 100
        image = _image(ax, grid, layers, (0.0, 2.0))
        dead = np.argwhere(grid == 0)[:MARKED]
        ax.plot(
            dead[:, 1], dead[:, 0], linestyle="", marker="x", color="white", markersize=3.5,
            markeredgewidth=0.9,
        )  # fmt: skip
        ax.set_title(f"step {line['step']}")
        ax.set_xlabel(NOUNS[noun])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for ax in axes[0][len(shown) :]:
        ax.set_visible(False)
    axes[0][0].set_ylabel("layer")
    bar = figure.colorbar(
        image, ax=list(axes[0]), location="bottom", shrink=0.45, aspect=36, extend="max"
    )
    bar.set_label("load over the layer's mean (× no token)")
    bar.outline.set_linewidth(0.5)
    title = f"Load of every {NOUNS[noun]} in every layer of {run.name}"
    return svg(figure, f"units-{number}-{noun}", title)


def balance(number: int, run: Run, noun: str) -> Markup:
    """Layers × steps: worst load, entropy of the load, dead share, entropy of a token's choice."""
    samples = [line for line in run.loads if line.get(noun)]
    samples = samples[:: max(1, -(-len(samples) // SAMPLES))]
    layers = list(samples[-1][noun])
    steps = [line["step"] for line in samples]
    height = 1.6 + min(4.2, 0.16 * len(layers) + 0.3)
    figure, axes = canvas(height, columns=len(BALANCE), sharey=True)
    for ax, (name, label, (low, high)) in zip(axes[0], BALANCE, strict=True):
        rows = [[line[noun].get(x, {}).get(name, np.nan) for line in samples] for x in layers]
        grid = np.array(rows, float)
        top = max(high, float(np.nanpercentile(grid, 98)))  # one outlier must not pale the rest
        image = _image(ax, grid, layers, (min(low, np.nanmin(grid)), top))
        ticks = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(3, len(steps)))})
        ax.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
        ax.set_xlabel("step")
        ax.set_title(label)
        more: Any = "max" if np.nanmax(grid) > top else "neither"
        bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.9, aspect=18, extend=more)
        bar.outline.set_linewidth(0.5)
        bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes[0][0].set_ylabel("layer")
    title = f"Balance of {noun} in every layer of {run.name} over steps"
    return svg(figure, f"balance-{number}-{noun}", title)


def _grid(rows: list[list[float]]) -> np.ndarray:
    """[layers, units]; layers of fewer units end early."""
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        grid[place, : len(row)] = row
    return grid


def _image(ax: Any, grid: np.ndarray, layers: list[str], ends: tuple[Any, Any]) -> Any:
    """Cells of one colour scale, from dark to bright in grey too."""
    image = ax.imshow(
        np.ma.masked_invalid(grid), cmap="cividis", vmin=ends[0], vmax=ends[1], aspect="auto",
        interpolation="none",
    )  # fmt: skip
    every = max(1, -(-len(layers) // 16))
    ax.set_yticks(range(0, len(layers), every), layers[::every])
    ax.grid(visible=False)
    return image


def table(run: Run) -> list[dict[str, Any]]:
    """Per part: what the last sample says of all layers, and where it is worst."""
    found = []
    for noun in routed(run):
        layers = run.loads[-1][noun]
        worst = max(layers, key=lambda layer: layers[layer]["max_over_mean"])
        dead = [
            f"{layer}:{unit}"
            for layer, values in layers.items()
            if values["dead_share"]
            for unit, load in enumerate(values["load"])
            if load == 0
        ]
        count = sum(round(v["dead_share"] * len(v["load"])) for v in layers.values())
        found.append({
            "noun": noun, "step": run.loads[-1]["step"], "layers": layers,
            "units": sum(len(v["load"]) for v in layers.values()),
            "entropy_share": float(np.mean([v["entropy_share"] for v in layers.values()])),
            "load_entropy": float(np.mean([v["load_entropy"] for v in layers.values()])),
            "worst": worst, "max_over_mean": layers[worst]["max_over_mean"],
            "dead": count, "dead_units": dead[:12], "dead_more": max(0, len(dead) - 12),
        })  # fmt: skip
    return found
