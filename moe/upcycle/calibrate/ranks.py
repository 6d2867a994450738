"""Who shares the text: one process, or those that torchrun started, each with some of the windows.

The only module of this room that joins a process group, and only where there are several processes.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """This process among its peers."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        ...


class Alone:
    """A single process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The ranks of torchrun's environment, or this process alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Alone()
        return
    from moe.parallel.world import world

    with world() as ranks:
        yield ranks
