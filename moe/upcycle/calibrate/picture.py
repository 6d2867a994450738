"""A picture of what heads and slices are worth, layer by layer, and how many are on."""

from pathlib import Path
from typing import Any

import numpy as np

DPI = 200
MOST = 64  # columns beside each other; more units are told as quantiles
NAME = "calibration.png"


def draw(parts: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean worth of each unit over its layer's largest, dark where it is most, as PNG.

    `parts` is a receipt's record: per part its layers with `worth` of units, and what is on.
    """
    from matplotlib.figure import Figure  # a second that no other conversion should wait for
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8 * len(parts) + 1, 5.2), layout="constrained")
    spaces = figure.subplots(1, 2 * len(parts), width_ratios=[3, 1] * len(parts), squeeze=False)[0]
    for number, (name, part) in enumerate(parts.items()):
        image, bars = spaces[2 * number], spaces[2 * number + 1]
        layers = list(part["layers"])
        worth = np.array([part["layers"][layer]["worth"] for layer in layers])
        noun = {"attention": "head or group", "mlp": "slice"}[name]
        if worth.shape[1] > MOST:
            worth, noun = -np.sort(-worth, axis=1), f"{noun}, the most important first"
        largest = worth.max(axis=1, keepdims=True)
        shades = worth / np.where(largest > 0, largest, 1)
        shown = image.imshow(shades, aspect="auto", cmap="Greys", vmin=0, vmax=1)
        image.set(xlabel=noun, ylabel="layer", title=f"{name}: mean worth by {part['target']}")
        image.set_yticks(range(len(layers)), layers, fontsize=6)
        figure.colorbar(shown, ax=image, location="bottom", label="over the layer's largest")
        on = [part["layers"][layer].get("mean_on", 0) for layer in layers]
        on = [
            mean or part["layers"][layer].get("top_k", 0) + len(part["layers"][layer]["shared"])
            for mean, layer in zip(on, layers, strict=True)
        ]
        bars.barh(range(len(layers)), on, color="0.35")
        for axis in (image.xaxis, bars.xaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        bars.set(xlabel=f"on per token, of {part['units']}", xlim=(0, part["units"]))
        bars.set_ylim(image.get_ylim())
        bars.set_yticks([])
    figure.savefig(path, dpi=DPI)
