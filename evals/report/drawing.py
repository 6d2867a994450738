"""How pictures of the report look: SVG as wide as a printed page, told apart without colour too.

with canvas(height, columns=2) as (figure, axes): ...
drawn = svg(figure, "losses", "Losses by step")
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 7.17  # inches: A4 without its margins, so that 8.5 points stay 8.5 points on paper
POINTS = 500  # of a curve; neighbours beyond are averaged
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
)  # Okabe, Ito
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "figure.constrained_layout.h_pad": 0.06,
    "svg.fonttype": "none",
}


def style(number: int) -> dict[str, Any]:
    """Colour, line and marker of the n-th of several."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def canvas(height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, Any]:
    """A figure of the page's width, `height` in inches, with its axes [rows, columns]."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an element of a page; names inside it are its own among all figures."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    for found in used:
        text = re.sub(
            rf'(id="|url\(|href=")(#?){re.escape(found)}(?=["\)])', rf"\1\2{name}-{found}", text
        )
    label = escape(title)
    head = f'<svg role="img" aria-label="{label}" data-figure="{escape(name)}" '
    text = re.sub(r'^<svg (?:xmlns:xlink="[^"]*" )?', head, text, count=1)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    return Markup(text)


def literal(text: str) -> str:
    """The text as it is (between dollars matplotlib would read formulas), at most 40 of it."""
    short = text if len(text) <= 40 else f"…{text[-39:]}"
    return short.replace("$", r"\$")


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, POINTS of them at most."""
    size = max(1, -(-len(x) // POINTS))
    starts = np.arange(0, len(x), size)
    counts = np.diff([*starts, len(x)])
    return (
        np.add.reduceat(np.asarray(x, float), starts) / counts,
        np.add.reduceat(np.asarray(y, float), starts) / counts,
    )


def whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def key(figure: Figure, handles: Sequence[Any]) -> None:
    """One legend for all axes, below them."""
    columns = max(1, min(len(handles), 4))
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, frameon=False,
        handlelength=3.2,
    )  # fmt: skip
