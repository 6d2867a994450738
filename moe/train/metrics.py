"""What a run reports: one aligned line, its JSON twin, TensorBoard. Rank 0 only."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from moe.progress import duration
from moe.train.loads import PARTS, Part, StepLoads

# Dense bfloat16 peak in FLOP/s, by a part of the device's name (vendors' data sheets).
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None where it is not known, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Reporter:
    """Writes the metrics of a run into its folder, from the step after `first` on.

    What an interrupted run has reported of later steps is dropped: they come again.
    """

    def __init__(self, out: Path, config_text: str, first: int, steps: int) -> None:
        self.first, self.steps, self._begin = first, steps, time.monotonic()
        path = out / "metrics.jsonl"
        kept = path.with_name(path.name + ".partial")
        kept.write_text("".join(lines_until(path, first)))
        self._file = kept.rename(path).open("a")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)
        self._board.add_text("config", f"```yaml\n{config_text}```")

    def report(self, metrics: dict[str, Any], loads: StepLoads) -> None:
        """Print, append and draw one step's metrics."""
        print(self.line(metrics), flush=True)
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        step = metrics["step"]
        for name, value in metrics.items():
            if name not in ("step", "tokens") and value is not None:
                group = name if "/" in name else f"train/{name}"
                self._board.add_scalar(group, value, step)
        for part, noun in zip(PARTS, ("heads", "experts"), strict=True):
            self._draw(part, noun, loads, step)
        self._board.flush()

    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss."""
        print(f"step {step:>6}  validation loss {loss:.4f}", flush=True)
        self._file.write(json.dumps({"step": step, "validation_loss": loss}) + "\n")
        self._file.flush()
        self._board.add_scalar("validation/loss", loss, step)

    def line(self, metrics: dict[str, Any]) -> str:
        """The metrics in one line of fixed columns."""
        step = metrics["step"]
        columns = [
            f"step {step:>6}",
            f"loss {metrics['loss']:8.4f}",
            f"grad {metrics['grad_norm']:8.3f}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['tokens_per_second']:>9,.0f} tok/s",
        ]
        if metrics.get("mfu") is not None:
            columns.append(f"mfu {metrics['mfu']:5.1%}")
        for noun in ("heads", "experts"):
            if f"{noun}/balance" in metrics:
                columns.append(
                    f"{noun} bal {metrics[f'{noun}/balance']:6.3f} "
                    f"load {metrics[f'{noun}/max_over_mean']:5.2f} "
                    f"dead {metrics[f'{noun}/dead_share']:4.0%}"
                )
        left = (time.monotonic() - self._begin) / (step - self.first) * (self.steps - step)
        return "  ".join([*columns, f"left {duration(left)}"])

    def _draw(self, part: Part, noun: str, loads: StepLoads, step: int) -> None:
        """Each layer's load as a histogram over its units, and all layers as one picture."""
        by_layer = loads.of(part)
        if not by_layer:
            return
        for layer, load in by_layer.items():
            counts = load.counts.cpu().double()
            unit = torch.arange(len(counts), dtype=torch.float64)
            self._board.add_histogram_raw(
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
        self._board.add_figure(f"{noun}/load", load_figure(by_layer, noun, step), step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def lines_until(path: Path, last: int) -> list[str]:
    """The lines of a metrics file up to a step; a kill may have cut the very last one short."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("}\n")]
    return [line for line in whole if json.loads(line)["step"] <= last]


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
