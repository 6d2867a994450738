"""Who shares the text: one process, or those that torchrun started, each with some of the windows.

The only module of this room that joins a process group, and only where there are several processes.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe.errors import Corrupt

T = TypeVar("T")


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


def together(ranks: Ranks, run: Callable[[], T]) -> T:
    """What `run` gives. Where a rank's text shows that something is damaged, every rank raises."""
    found, failure = None, None
    try:
        found = run()
    except Corrupt as error:
        failure = str(error)
    if failures := [text for text in ranks.gather(failure) if text]:
        raise Corrupt(failures[0])
    assert found is not None
    return found


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The ranks of torchrun's environment, or this process alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Alone()
        return
    from moe.parallel.world import world

    with world() as ranks:
        yield ranks
