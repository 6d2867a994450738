"""A picture of `moe bench`: speeds, memory and cache over the length of the prompt.

    plot(report, ["mixture", "dense"], Path("bench.png"))

No state of pyplot: the figure is made and gone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

DPI = 200
STYLE: Any = {"font.size": 9}
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's: every kind of colour vision
BATCHES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # line and marker of a batch size

Value = Callable[[dict[str, Any], int], float]
PANELS: tuple[tuple[str, str, Value], ...] = (
    ("reading the prompt", "tokens/s", lambda point, _: point["prefill_tokens_per_second"]),
    ("writing", "tokens/s", lambda point, _: point["decode_tokens_per_second"]),
    ("memory beyond the weights", "MB", lambda point, _: point["peak_memory_bytes"] / 1e6),
    (
        "keys and values of a sequence",
        "MB",
        lambda point, length: point["cache_bytes_per_token"] * length / 1e6,
    ),
)


def plot(report: dict[str, Any], names: Sequence[str], path: Path) -> Figure:
    """One panel a quantity, a line a model and batch size; points without numbers are left out."""
    points = report["points"]
    batches = sorted({point["batch"] for point in points})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        for number, (title, unit, value) in enumerate(PANELS):
            ax = figure.add_subplot(2, 2, number + 1)
            for model in range(len(names)):
                for rank, batch in enumerate(batches):
                    _line(ax, points, model, batch, rank, value)
            _dress(ax, title, unit, sorted({point["length"] for point in points}))
        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2, label=name)
            for i, name in enumerate(names)
        ]
        for rank, batch in enumerate(batches):
            style = _style(rank)
            handles.append(Line2D([], [], color="0.3", label=f"batch {batch}", **style))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        dtype, device = report["models"][0]["dtype"], report["device"]
        figure.suptitle(f"{' and '.join(names)}: {dtype}, {device}", fontsize=10, parse_math=False)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return figure


def _line(
    ax: Axes, points: list[dict[str, Any]], model: int, batch: int, rank: int, value: Value
) -> None:
    there = [
        (point["length"], value(point["models"][model], point["length"]))
        for point in points
        if point["batch"] == batch and "error" not in point["models"][model]
    ]
    ax.plot(
        *zip(*sorted(there), strict=True) if there else ([], []),
        color=COLOURS[model % len(COLOURS)],
        linewidth=1.2 if model else 2.4,  # both are seen where they are equal
        **_style(rank),
    )


def _style(rank: int) -> dict[str, Any]:
    """Line and marker of the batch size of this rank, hollow but for the first."""
    line, marker = BATCHES[rank % len(BATCHES)]
    face = {"markerfacecolor": "white"} if rank else {}
    return {"linestyle": line, "marker": marker, "markersize": 4, **face}


def _dress(ax: Axes, title: str, unit: str, lengths: list[int]) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(unit)
    ax.set_xlabel("tokens in the prompt")
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(bottom=0)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
