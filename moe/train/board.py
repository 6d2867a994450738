"""What TensorBoard shows of a run, in groups: rank 0 only.

board = Board(out, config, first, words)      # of a run that goes on after step `first`
board.metrics(metrics); board.layers(step, layers); board.pictures(step, loads); board.close()
"""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moe.train.loads import NOUNS, StepLoads

GROUPS = {"tokens_per_second": "speed", "mfu": "speed"}  # of metrics without one; else train
RESULTS = ("train/loss", "train/grad_norm", "validation/loss", "speed/tokens_per_second")
LAYOUT = {  # charts of the dashboard "custom scalars"; names of scalars are patterns there
    "loss": {
        "training and validation": ["Multiline", ["train/loss", "validation/loss"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "balance": {
        "worst load over mean": ["Multiline", ["heads/max_over_mean", "experts/max_over_mean"]],
        "dead share": ["Multiline", ["heads/dead_share", "experts/dead_share"]],
        "chosen per token": ["Multiline", ["heads/per_token", "experts/per_token"]],
        "balance loss": ["Multiline", ["heads/balance", "experts/balance"]],
    },
    "entropy": {
        "of a token's probabilities": ["Multiline", ["(heads|experts)/entropy_share"]],
        "of the load": ["Multiline", ["(heads|experts)/load_entropy"]],
        "heads, by layer": ["Multiline", ["heads_by_layer/entropy_share_.*"]],
        "experts, by layer": ["Multiline", ["experts_by_layer/entropy_share_.*"]],
    },
    "throughput": {
        "tokens per second": ["Multiline", ["speed/tokens_per_second"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu"]],
    },
}


def said_elsewhere(given: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's thread: it keeps its error for whoever writes next."""
    if not isinstance(given.thread, _AsyncWriterThread):
        threading.__excepthook__(given)


class Board:
    """One run of TensorBoard, however often it was interrupted: later events of steps that come
    again are purged, and layout and hyper-parameters are written once.
    """

    def __init__(
        self, out: Path, config: dict[str, Any], text: str, first: int, words: str
    ) -> None:
        folder = out / "tensorboard"
        begun = any(folder.glob("events.out.tfevents.*"))
        threading.excepthook = said_elsewhere
        self._writer = SummaryWriter(str(folder), purge_step=first + 1)
        self._writer.add_text("config", f"```yaml\n{text}```", first)
        if words:
            self._writer.add_text("model", f"```\n{words}\n```", first)
        # add_hparams would make a run of its own of them
        begin, session, self._end = hparams(flat(config), dict.fromkeys(RESULTS, 0.0))
        if not begun:
            self._writer.add_custom_scalars(LAYOUT)
            for summary in (begin, session):
                self._writer._get_file_writer().add_summary(summary)

    def metrics(self, metrics: dict[str, Any]) -> None:
        """The scalars of a logged step."""
        for name, value in metrics.items():
            if name not in ("step", "tokens") and value is not None:
                tag = name if "/" in name else f"{GROUPS.get(name, 'train')}/{name}"
                self._writer.add_scalar(tag, value, metrics["step"])

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One more number, `group/name`."""
        self._writer.add_scalar(tag, value, step)

    def layers(self, step: int, layers: dict[str, dict[int, dict[str, Any]]]) -> None:
        """What each router did: entropies and worst load, a scalar a layer."""
        for noun, by_layer in layers.items():
            for layer, found in by_layer.items():
                for name in ("entropy_share", "load_entropy", "max_over_mean"):
                    tag = f"{noun}_by_layer/{name}_{layer:02}"
                    self._writer.add_scalar(tag, found[name], step)

    def histograms(self, step: int, loads: StepLoads) -> None:
        """Each layer's load as a histogram over its units."""
        for part, noun in NOUNS.items():
            for layer, load in loads.of(part).items():
                counts = load.counts.cpu().double()
                unit = torch.arange(len(counts), dtype=torch.float64)
                self._writer.add_histogram_raw(
                    f"{noun}/layer_{layer:02}",
                    min=0.0,
                    max=float(len(counts)),
                    num=int(counts.sum()),
                    sum=float((unit * counts).sum()),
                    sum_squares=float((unit.square() * counts).sum()),
                    bucket_limits=(unit + 1).tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=step,
                )

    def pictures(self, step: int, loads: StepLoads) -> None:
        """All layers' loads as one picture, for heads and for experts."""
        for part, noun in NOUNS.items():
            if by_layer := loads.of(part):
                figure = load_figure(by_layer, noun, step)
                self._writer.add_figure(f"{noun}/load", figure, step)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        """Say that the run has come to its end."""
        self._writer._get_file_writer().add_summary(self._end)

    def close(self) -> None:
        self._writer.close()


def flat(config: dict[str, Any], at: str = "") -> dict[str, Any]:
    """A configuration's keys in full, with values that are numbers, texts or truths."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{at}{key}.")
        else:
            plain = isinstance(value, int | float | str) and not isinstance(value, bool)
            found[f"{at}{key}"] = value if plain else json.dumps(value)
    return found


def load_figure(by_layer: dict[int, Any], noun: str, step: int) -> Any:
    """Layers × units, coloured by load over the layer's mean; layers of fewer units end early."""
    from matplotlib.figure import Figure

    width = max(len(load.counts) for load in by_layer.values())
    grid = torch.full((len(by_layer), width), float("nan"))
    for row, load in enumerate(by_layer.values()):
        counts = load.counts.cpu()
        grid[row, : len(counts)] = counts / counts.mean().clamp(min=1e-9)
    figure = Figure(figsize=(2.2 + 0.28 * min(width, 40), 1.4 + 0.16 * len(by_layer)), dpi=110)
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    layers = list(by_layer)
    shown = range(0, len(layers), max(1, len(layers) // 12))
    axes.set_yticks(list(shown), [str(layers[i]) for i in shown])
    axes.set_xticks(range(0, width, max(1, width // 12)))
    axes.set_xlabel(noun)
    axes.set_ylabel("layer")
    axes.set_title(f"load over mean, step {step}", fontsize=9)
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    return figure
