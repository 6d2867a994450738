"""The guard: which steps are not taken, because loss or gradient cannot be trusted.

    guard = Guard(config.guard)
    if reason := guard.judge(loss, norm): engine.skip() ...    # numbers that all ranks have alike

A skipped step leaves everything as it was, but data and schedule go on.
"""

import math
import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.checkpoint.progress import Judged
from moe.config import Guard as Settings
from moe.errors import MoeError

FEWEST = 16  # clean steps, before a deviation from them says anything


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was not taken, and the samples of its global batch.

    suspects: those in micro-batches whose own loss was not finite. origins: per sample its source
    and documents, where the data can tell.
    """

    step: int
    reason: str
    samples: range
    suspects: Sequence[int]
    origins: Sequence[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """As a line of metrics.jsonl."""
        return {
            "step": self.step,
            "skipped": self.reason,
            "samples": list(self.samples),
            "suspects": list(self.suspects),
            "origins": list(self.origins),
        }

    def __str__(self) -> str:
        text = f"step {self.step:>6}  skipped: {self.reason}; samples {_span(self.samples)}"
        if self.suspects:
            text += f", not finite in {', '.join(map(str, self.suspects))}"
        sources = dict.fromkeys(o["source"] for o in self.origins)
        return text + (f", from {', '.join(sources)}" if sources else "")


class Guard:
    """Judges each step by its loss and gradient norm, and by those of the clean steps before."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.skipped = 0  # in all
        self._clean: deque[tuple[float, float]] = deque(maxlen=settings.window)
        self._row: list[tuple[int, range]] = []  # step and samples of those skipped in a row

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step is not to be taken. None where it is: it is a clean one from now on."""
        named = {"loss": loss, "gradient norm": norm}
        for index, (name, value) in enumerate(named.items()):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if self.settings.spike is not None and len(self._clean) >= FEWEST:
                before = [step[index] for step in self._clean]
                mean, deviation = statistics.fmean(before), statistics.pstdev(before)
                if value > mean + self.settings.spike * deviation:
                    return (
                        f"{name} {value:.4g} is more than guard.spike={self.settings.spike:g} "
                        f"deviations of {deviation:.2g} above {mean:.4g}, its mean over "
                        f"{len(before)} steps"
                    )
        self._clean.append((loss, norm))
        self._row = []
        return None

    def skip(self, step: int, samples: range) -> None:
        """Count a step as skipped."""
        self.skipped += 1
        self._row.append((step, samples))

    def check(self, newest: Any) -> None:
        """Raise MoeError where too many were skipped in a row; `newest`: the newest checkpoint."""
        if len(self._row) < self.settings.consecutive:
            return
        steps = "; ".join(f"step {step}: samples {_span(samples)}" for step, samples in self._row)
        raise MoeError(
            f"guard.consecutive={self.settings.consecutive} steps in a row were skipped: {steps}. "
            f"Nothing was updated in them; the newest checkpoint: {newest or 'none yet'}. "
            "metrics.jsonl says why, and which documents they hold. Take those out of the data, or "
            "lower optimizer.lr or train.clip, and start again."
        )

    def state(self) -> Judged:
        """What a resumed run needs to judge alike."""
        row = [[step, samples.start, samples.stop] for step, samples in self._row]
        return Judged(skipped=self.skipped, clean=[list(c) for c in self._clean], row=row)

    def restore(self, state: Judged) -> None:
        """The reverse of `state`."""
        self.skipped = state.skipped
        self._clean.extend((loss, norm) for loss, norm in state.clean)
        self._row = [(step, range(start, stop)) for step, start, stop in state.row]


class Generators:
    """The random state of this moment, to come back to: torch's, numpy's and Python's own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def suspects(losses: Sequence[Tensor], samples: Sequence[range]) -> list[int]:
    """Samples of the micro-batches whose loss is not finite."""
    return [i for loss, r in zip(losses, samples, strict=True) if not loss.isfinite() for i in r]


def _span(samples: range) -> str:
    return f"{samples[0]} to {samples[-1]}"
