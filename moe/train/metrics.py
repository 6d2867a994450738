"""What a run reports: one aligned line, its JSON twin, TensorBoard. Rank 0 only."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from moe.checkpoint.disk import replace_file
from moe.config import RunConfig
from moe.errors import UserError
from moe.model import RoutedLlamaConfig
from moe.model.accounting import flops_per_token
from moe.parallel.world import Ranks
from moe.progress import duration
from moe.train.board import Board
from moe.train.events import lines_until, note, rewritten
from moe.train.guard import Skipped
from moe.train.loads import NOUNS, LoadLog, StepLoads

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

PICTURES = 0.005  # of a run's time may go into drawing them


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None where it is not known, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def headline(config: RunConfig, ranks: Ranks, step: int) -> str:
    """What a run that starts at `step` is about to do."""
    return (
        f"{config.model} on {ranks.size} rank(s) of {ranks.device.type}, "
        f"{config.train.dtype}: steps {step} to {config.train.steps}, "
        f"{config.train.global_batch_size} × {config.data.sequence_length} tokens each, "
        f"into {config.out}"
    )


class Pace:
    """How fast training alone is, from `step` on."""

    def __init__(
        self, config: RunConfig, model: RoutedLlamaConfig, ranks: Ranks, step: int
    ) -> None:
        length = config.data.sequence_length
        self.tokens = config.train.global_batch_size * length  # of a step
        peak = peak_flops(ranks.device)
        self.share = flops_per_token(model, length) / (peak * ranks.size) if peak else None
        self._step, self._begin = step, time.monotonic()

    def take(self, step: int) -> dict[str, Any]:
        """Tokens seen, tokens/s since the last take, and the share of the device that they took."""
        now = time.monotonic()
        rate = (step - self._step) * self.tokens / (now - self._begin)
        self._step, self._begin = step, now
        mfu = rate * self.share if self.share else None
        return {"tokens": step * self.tokens, "tokens_per_second": rate, "mfu": mfu}

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that does not count."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin


def number(key: str, value: float) -> dict[str, Any]:
    """An entry of JSON, which has no word for what is not finite: null then, and `why`."""
    return {key: value} if math.isfinite(value) else {key: None, "why": str(value)}


def written(report: Callable[..., None]) -> Callable[..., None]:
    """Say in a line that the disk takes no more: raises UserError, and the run ends."""

    @functools.wraps(report)
    def call(self: "Reporter", *given: Any) -> None:
        try:
            report(self, *given)
        except OSError as error:
            files = error.filename or f"{self.path} or TensorBoard's files beside it"
            raise UserError(
                f"{files} cannot be written: {error.strerror or error}. Start the run again once "
                "that is mended, and it goes on from its newest checkpoint."
            ) from error

    return call


class Reporter:
    """Writes the metrics of a run into its folder, from the step after `first` on.

    What an interrupted run has reported of later steps is dropped: they come again.
    """

    @written
    def __init__(
        self, out: Path, config_text: str, first: int, steps: int, words: str = ""
    ) -> None:
        self.first, self.steps, self._begin = first, steps, time.monotonic()
        self._drawn = 0.0  # seconds
        self.path = path = out / "metrics.jsonl"
        replace_file(out / "config.yaml", config_text)
        lines = lines_until(path, first)
        held = [json.loads(line) for line in lines]
        self._validated = {x["step"] for x in held if "validation_loss" in x}
        self._evaluated = {x["step"] for x in held if "evaluation" in x}
        self._file, self._loads = rewritten(path, lines), LoadLog(out, first, steps)
        config = yaml.safe_load(config_text) or {}
        self._board = Board(out, config, config_text, first, words)
        note(out, first, "started")

    @written
    def report(self, metrics: dict[str, Any], loads: StepLoads) -> None:
        """Print, append and draw one step's metrics, of loads that are on the host."""
        print(self.line(metrics), flush=True)
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        step = metrics["step"]
        self._board.metrics(metrics)
        if self._loads.due(step, loads):
            layers = {noun: x for part, noun in NOUNS.items() if (x := loads.layers(part))}
            self._loads.write(step, layers)
            self._board.layers(step, layers)
        self._draw(loads, step)
        if step == self.steps:
            self._board.finish()
        self._board.flush()

    @written
    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss, unless it was before an interruption."""
        if step in self._validated:
            return
        print(f"step {step:>6}  validation loss {loss:.4f}", flush=True)
        found = number("validation_loss", loss)
        self._file.write(json.dumps({"step": step, **found}, allow_nan=False) + "\n")
        self._file.flush()
        self._board.add_scalar("validation/loss", loss, step)

    @written
    def evaluation(self, step: int, found: dict[str, dict[str, Any]]) -> None:
        """Report what a suite has found, unless it was before an interruption."""
        if step in self._evaluated:
            return
        print(f"step {step:>6}  evaluated: {len(found)} metrics", flush=True)
        self._file.write(json.dumps({"step": step, "evaluation": found}, allow_nan=False) + "\n")
        self._file.flush()
        for name, measured in found.items():
            if measured["value"] is not None:
                self._board.add_scalar(f"evaluation/{name}", measured["value"], step)
        self._board.flush()

    @written
    def skipped(self, step: Skipped) -> None:
        """Report a step that was not taken."""
        print(step, flush=True)
        self._file.write(json.dumps(step.record(), allow_nan=False) + "\n")
        self._file.flush()

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

    def _draw(self, loads: StepLoads, step: int) -> None:
        """Each layer's load as a histogram; all of them as a picture, as often as time allows."""
        self._board.histograms(step, loads)
        begin = time.monotonic()
        if step == self.steps or self._drawn <= PICTURES * (begin - self._begin):
            self._board.pictures(step, loads)
            self._drawn += time.monotonic() - begin

    def close(self) -> None:
        """End; what a full disk does not take has been said before."""
        for writer in (self._file, self._loads, self._board):
            with contextlib.suppress(OSError):
                writer.close()
