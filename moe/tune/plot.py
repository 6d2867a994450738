"""Pictures of a ranking and of what its experts do, as PNG (200 dpi) or SVG by the file's name.

    heatmap(sites, scores_C, chosen, Path("map.png"), title="…", label="rate_diff")
    dose_curve(points, Path("dose.png"), ylabel="refusals", title="…")

No state of pyplot: figures are made and gone. C experts of all sites in a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from moe.tune.families import PARTS, Part, Site, columns

DPI = 200
COLOURS = "RdBu_r"  # white at 0, and its ends differ to every kind of colour vision
GREY = "0.82"  # an expert that was not compared
OUTLINE = "black"
PALE = 3.0  # colour ends at so many times what 99 % of |scores| keep within: most stay pale
STYLE: Any = {"font.size": 9, "hatch.linewidth": 0.5, "svg.hashsalt": "moe"}
KINDS = {  # of a dose curve: colour (Okabe and Ito's), line, marker, name
    "tuned": ("#0072B2", "-", "o", "tuned"),
    "random": ("#E69F00", "--", "s", "random experts"),
    "rate_matched": ("#009E73", "-.", "^", "as busy experts"),
    "layer_matched": ("#CC79A7", ":", "D", "of the same layers"),
}
EXPERTS = {"mlp": "expert", "attention": "head or attention expert"}


class Panel(NamedTuple):
    """Scores of one part [layers, experts]; NaN where none is. `routed` says which layers are."""

    part: Part
    scores: np.ndarray
    there: np.ndarray  # bool, the same shape: an expert is there, compared or not
    chosen: list[tuple[int, int]]  # row, expert

    @property
    def routed(self) -> np.ndarray:
        return np.asarray(self.there.any(1))

    @property
    def unknown(self) -> np.ndarray:
        """Cells without a score in layers that have a router."""
        return self.routed[:, None] & np.isnan(self.scores)


def heatmap(
    sites: Sequence[Site],
    scores: np.ndarray,
    chosen: Sequence[int],
    path: Path,
    *,
    title: str,
    label: str,
) -> Figure:
    """Layers x experts, 0 white, the chosen outlined, with each layer's largest |score| beside it.

    `scores` [C], NaN where nothing was compared; `chosen` are columns of it. Returns the figure.
    """
    panels = [panel for part in PARTS if (panel := _panel(part, sites, scores, chosen)).there.any()]
    known = np.abs(scores[np.isfinite(scores)])
    limit = _limit(known)
    clipped = int((known > limit).sum())
    with matplotlib.rc_context(STYLE):
        figure, cell = _canvas(panels)
        grid = figure.add_gridspec(
            1, 2 * len(panels), width_ratios=[w for p in panels for w in _widths(p, cell)]
        )
        axes: list[Axes] = []
        bars: list[Axes] = []
        for number, panel in enumerate(panels):
            ax = figure.add_subplot(grid[0, 2 * number], sharey=axes[0] if axes else None)
            mesh = _draw(ax, panel, limit, cell)
            bar = figure.add_subplot(grid[0, 2 * number + 1], sharey=ax)
            _margin(bar, panel, float(known.max()) or 1.0)
            axes.append(ax)
            bars.append(bar)
            ax.set_title(f"{panel.part}" if len(panels) > 1 else "", fontsize=9)
        axes[0].set_ylabel("layer")
        ends = f"; colour ends at ±{limit:.3g}, {clipped:,} beyond" if clipped else ""
        figure.suptitle(literal(title), fontsize=10)
        extend: Any = "both" if clipped else "neither"
        colours = figure.colorbar(
            mesh, ax=axes + bars, location="bottom", shrink=0.6, aspect=40, extend=extend
        )
        colours.set_label(literal(f"{label}{ends}"))
        figure.legend(handles=_legend(panels), loc="outside lower center", ncols=3, frameon=False)
        _save(figure, path)
    return figure


def _limit(known: np.ndarray) -> float:
    """Where colour ends: one outlier must not pale the rest, nor noise drown what stands out."""
    largest = float(known.max())
    return min(PALE * float(np.percentile(known, 99)), largest) or largest or 1.0


def _panel(part: Part, sites: Sequence[Site], scores: np.ndarray, chosen: Sequence[int]) -> Panel:
    layers = 1 + max(site.layer for site in sites)
    width = max((site.experts for site in sites if site.part == part), default=0)
    matrix = np.full((layers, width), np.nan)
    there = np.zeros((layers, width), bool)
    marked = []
    for site, start in zip(sites, columns(list(sites))[:-1], strict=True):
        if site.part == part:
            matrix[site.layer, : site.experts] = scores[start : start + site.experts]
            there[site.layer, : site.experts] = True
            marked += [(site.layer, c - start) for c in chosen if 0 <= c - start < site.experts]
    return Panel(part, matrix, there, marked)


def _canvas(panels: list[Panel]) -> tuple[Figure, tuple[float, float]]:
    """A figure that fits a landscape page, and the size of a cell in inches."""
    layers, experts = len(panels[0].scores), sum(panel.scores.shape[1] for panel in panels)
    cell = (min(8.6 / experts, 0.4), min(max(4.4 / layers, 0.075), 6.0 / layers, 0.4))
    width = sum(sum(_widths(panel, cell)) for panel in panels) + 0.9 * len(panels) + 0.4
    figure = Figure(figsize=(max(width, 5.5), cell[1] * layers + 2.1), layout="constrained")
    return figure, cell


def _widths(panel: Panel, cell: tuple[float, float]) -> tuple[float, float]:
    """Of a panel and of the bars beside it, in inches."""
    return max(panel.scores.shape[1] * cell[0], 0.9), 0.6


def _draw(ax: Axes, panel: Panel, limit: float, cell: tuple[float, float]) -> Any:
    rows, width = panel.scores.shape
    edges = np.arange(width + 1) - 0.5, np.arange(rows + 1) - 0.5
    ax.set_facecolor("white")
    for row in np.flatnonzero(~panel.routed):
        ax.add_patch(
            Rectangle(
                (-0.5, row - 0.5), width, 1, facecolor="white", edgecolor="0.6", hatch="////",
                linewidth=0,
            )
        )  # fmt: skip
    grey = np.ma.masked_where(~panel.unknown, panel.unknown)
    ax.pcolormesh(*edges, grey, cmap=ListedColormap([GREY]), rasterized=True)
    large = min(cell) > 0.15
    mesh = ax.pcolormesh(
        *edges, np.ma.masked_invalid(panel.scores), cmap=COLOURS, norm=Normalize(-limit, limit),
        rasterized=True, edgecolor="0.85" if large else "none", linewidth=0.4 if large else 0,
    )  # fmt: skip
    # narrow cells would vanish under their outline, so it stands a little outside them
    dx, dy = (max(0.5, 0.028 / size) for size in cell)
    outlines = [Rectangle((expert - dx, row - dy), 2 * dx, 2 * dy) for row, expert in panel.chosen]
    width_pt = 1.6 if large else 0.9
    ax.add_collection(
        PatchCollection(
            outlines, facecolor="none", edgecolor=OUTLINE, linewidth=width_pt, zorder=3,
            clip_on=False, label="chosen",
        )
    )  # fmt: skip
    ax.set(xlim=(-0.5, width - 0.5), ylim=(rows - 0.5, -0.5), xlabel=EXPERTS[panel.part])
    ax.xaxis.set_major_locator(MaxNLocator(nbins=max(1, min(16, width)), integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=max(1, min(15, rows)), integer=True))
    return mesh


def _margin(ax: Axes, panel: Panel, top: float) -> None:
    largest = np.nanmax(np.abs(panel.scores), axis=1, initial=0.0)
    ax.barh(np.arange(len(largest)), largest, height=0.8, color="0.35")
    ax.set_xlim(0, top * 1.05)
    ax.tick_params(axis="y", labelleft=False, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=2))
    ax.set_xlabel("max |score|")


def _legend(panels: list[Panel]) -> list[Patch]:
    found = [Patch(facecolor="white", edgecolor=OUTLINE, linewidth=1.2, label="chosen")]
    if any(panel.unknown.any() for panel in panels):
        found.append(Patch(facecolor=GREY, label="none there, or not compared"))
    if any(not panel.routed.all() for panel in panels):
        found.append(
            Patch(facecolor="white", edgecolor="0.6", hatch="////", label="no router in the layer")
        )
    return found


def dose_curve(points: list[dict[str, Any]], path: Path, ylabel: str, title: str) -> Figure:
    """A measure against the number of experts, and against scale, of a tuning and its controls.

    A point is {kind, experts, scale, seed, label, value}; kind is plain (nothing is done: a dashed
    line), tuned, or a control, whose seeds are dots and whose mean ± sd is a band. A column of
    panels per label; a row for what varies: experts at the largest scale, scale at the most
    experts. Returns the figure. Raises ValueError for a kind that is not in KINDS.
    """
    if strange := sorted({point["kind"] for point in points} - {"plain", *KINDS}):
        raise ValueError(f"kinds {strange} are unknown: plain, {', '.join(KINDS)} are drawn")
    labels = list(dict.fromkeys(point["label"] for point in points))
    doses = _doses(points)
    with matplotlib.rc_context(STYLE):
        size = (max(2.9 * len(labels) + 0.6, 4.6), 2.4 * len(doses) + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(doses), len(labels), squeeze=False, sharey="col")
        for row, (dose, other, fixed) in enumerate(doses):
            for ax, label in zip(axes[row], labels, strict=True):
                _curves(ax, [point for point in points if point["label"] == label], *doses[row])
                ax.set_xlabel(f"{dose} ({other} {fixed:g})")
                ax.set_title(literal(label) if row == 0 else "", fontsize=9)
            axes[row][0].set_ylabel(literal(ylabel))
        figure.suptitle(literal(title), fontsize=10)
        handles: dict[str, Any] = {}
        for ax in axes.flat:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", frameon=False,
            ncols=min(len(handles), 3 if len(labels) < 3 else 5),
        )  # fmt: skip
        _save(figure, path)
    return figure


def _doses(points: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """What varies, what does not in the same row of panels, and at which value of it."""
    values = {
        key: {point[key] for point in points if point["kind"] != "plain"}
        for key in ("experts", "scale")
    }
    rows = [
        (dose, other, max(values[other]))
        for dose, other in (("experts", "scale"), ("scale", "experts"))
        if len(values[dose]) > 1
    ]
    return rows or [("experts", "scale", max(values["scale"]))]


def _curves(ax: Axes, points: list[dict[str, Any]], dose: str, other: str, fixed: float) -> None:
    plain = [point["value"] for point in points if point["kind"] == "plain"]
    if plain:
        ax.axhline(np.mean(plain), color="0.3", linestyle=(0, (6, 3)), linewidth=1, label="plain")
    shown = [p for p in points if p["kind"] != "plain" and p[other] == fixed]
    xs = sorted({point[dose] for point in shown})
    wide = dose == "experts" and xs[0] > 0 and xs[-1] >= 20 * xs[0]
    for number, (kind, (colour, line, marker, name)) in enumerate(KINDS.items()):
        beside = 0.0 if len(xs) > 1 else 0.1 * number  # one dose: kinds side by side
        by_dose: dict[float, list[float]] = {}
        for point in shown:
            if point["kind"] == kind:
                by_dose.setdefault(point[dose] + beside, []).append(point["value"])
        if not by_dose:
            continue
        x = np.array(sorted(by_dose), float)
        mean = np.array([np.mean(by_dose[value]) for value in x])
        sd = np.array([np.std(by_dose[v], ddof=1) if len(by_dose[v]) > 1 else 0.0 for v in x])
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "zorder": 3}
        width = 1.8 if kind == "tuned" else 1.1
        ax.plot(x, mean, linestyle=line, linewidth=width, label=name, **style)
        if kind == "tuned":
            continue
        if len(x) > 1:
            ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
        else:
            ax.errorbar(x, mean, sd, color=colour, capsize=4, linewidth=1)
        dots = [(value, seed) for value, seeds in by_dose.items() for seed in seeds]
        seeds_x, seeds_y = zip(*dots, strict=True)
        ax.scatter(seeds_x, seeds_y, s=7, color=colour, alpha=0.35, linewidth=0, zorder=2)
    if len(xs) == 1:
        ax.set_xlim(xs[0] - 0.5, xs[0] + 0.8)
    if wide:
        ax.set_xscale("log")
    if len(xs) <= 8:
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)


def literal(text: str) -> str:
    """The text as it is: between dollars matplotlib would read formulas."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    """The same numbers make the same bytes."""
    svg = path.suffix == ".svg"
    figure.savefig(path, dpi=DPI, metadata={"Date": None} if svg else {"Software": None})
