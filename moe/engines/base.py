"""The seam between the training loop and what holds the parameters.

The loop owns data order, loss, schedule, metrics and checkpoints; an engine owns parameters,
gradients and the optimiser. `moe.train` sees this protocol only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from torch import Tensor

from moe.errors import raise_all

Kind = Literal["parameter", "buffer", "exp_avg", "exp_avg_sq"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the state under its canonical name, plain or sharded (DTensor)."""

    name: str
    kind: Kind
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Take over what was written into `tensor`: nothing to do where it is the state itself."""


class Engine(Protocol):
    """What every engine does, with the same numbers."""

    def forward(self, **inputs: Any) -> Any:
        """The model's output; gradients will be asked of it."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, already divided by the global batch's tokens.

        Gradients are summed over ranks, undivided; `last` marks the step's last micro-batch, until
        which nothing needs to be sent.
        """

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradient, each parameter counted once."""

    def step(self, lr: float, scale: Tensor) -> None:
        """Scale the gradient, update the parameters, drop the gradient."""

    def skip(self) -> None:
        """Drop the gradient, and change nothing else."""

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""

    def state(self) -> Iterator[Entry]:
        """Every tensor of the state, in an order that all ranks share. Moments exist after `step`
        or `prepare_moments`.
        """

    def prepare_moments(self) -> None:
        """Create the optimiser's moments (zeros), so that `state` can be read into."""

    @property
    def updates(self) -> int:
        """Optimiser steps taken, which Adam's bias correction depends on."""

    @updates.setter
    def updates(self, value: int) -> None: ...


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise UserError for every pattern that matches no parameter's name."""
    raise_all(
        [
            f"train.trainable pattern {pattern!r} matches none of the {len(names)} parameters, "
            f"which are named like {names[len(names) // 2]!r}."
            for pattern in patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
    )
