"""Which samples each rank trains on, and when: a function of the samples consumed, of nothing else.

    batches = Batches(dataset, global_batch_size=64, micro_batch_size=4, rank=0, world_size=2)
    for batch in batches: ...          # {"tokens": [4, S], ...}, 8 of them a step
    state = batches.consumed_samples   # all there is to save

Step t trains on the samples that follow those consumed, in order, whatever the number of ranks and
the micro-batch size; a run may change both between two steps and see the same tokens.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe.data.dataset import Sample
from moe.errors import UserError

PREFETCH = 2  # micro-batches read ahead


def step_indices(
    consumed_samples: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> list[range]:
    """Samples of each micro-batch of one rank, for the step after `consumed_samples`.

    Micro-batches of all ranks, taken in turn, are consecutive samples. Raises UserError, with the
    legal sizes, if the global batch is not a whole number of micro-batches on every rank.
    """
    together = micro_batch_size * world_size
    if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % together:
        raise UserError(_illegal_sizes(global_batch_size, micro_batch_size, world_size))
    begin = consumed_samples + rank * micro_batch_size
    starts = range(begin, begin + global_batch_size, together)
    return [range(start, start + micro_batch_size) for start in starts]


def _illegal_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    message = (
        f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size="
        f"{micro_batch_size} x {world_size} ranks."
    )
    share, rest = divmod(global_batch_size, world_size)
    if share < 1 or rest:
        near = max(1, round(global_batch_size / world_size)) * world_size
        return f"{message} Use a multiple of {world_size}, such as global_batch_size={near}."
    legal = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
    return f"{message} For this global batch micro_batch_size is one of {legal}."


class Batches:
    """Micro-batches of one rank, read ahead by a thread; ends when no whole step is left.

    consumed_samples counts those of all ranks in the steps handed out whole: what to resume from.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        consumed_samples: int = 0,
    ) -> None:
        sizes = {
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "rank": rank,
            "world_size": world_size,
        }
        self.micro_batches_per_step = len(step_indices(0, **sizes))
        self.global_batch_size = global_batch_size
        self._first, self._handed_out = consumed_samples, 0
        last = len(dataset) - global_batch_size  # type: ignore[arg-type]
        steps = range(consumed_samples, last + 1, global_batch_size)
        indices = (batch for consumed in steps for batch in step_indices(consumed, **sizes))
        self._batches = _load_ahead(dataset, indices)

    @property
    def consumed_samples(self) -> int:
        """Samples, over all ranks, of the steps whose last micro-batch was handed out."""
        steps = self._handed_out // self.micro_batches_per_step
        return self._first + steps * self.global_batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Sample:
        batch = next(self._batches)
        self._handed_out += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()


def validation_batches(
    dataset: Dataset[Sample],
    micro_batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> Generator[Sample, None, None]:
    """The first `limit` samples (default all), each once over all ranks, always in one order.

    Every rank gets the same number of batches of the same shape: where samples run out, the first
    is repeated with a loss_mask of zeros.
    """
    total = len(dataset)  # type: ignore[arg-type]
    total = total if limit is None else min(total, limit)
    together = micro_batch_size * world_size
    starts = range(rank * micro_batch_size, rank * micro_batch_size + total, together)
    indices = (range(start, start + micro_batch_size) for start in starts)
    return _load_ahead(dataset, indices, total)


def _load_ahead(
    dataset: Dataset[Sample], indices: Iterable[range], total: int | None = None
) -> Generator[Sample, None, None]:
    """Load batches of samples on a thread; an error is raised where its batch would have come."""

    def load(batch: range) -> Sample:
        samples = [dataset[index if total is None or index < total else 0] for index in batch]
        stacked = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        if total is not None:
            stacked["loss_mask"] *= _real(batch, total)[:, None]
        return stacked

    waiting = iter(indices)
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        pending = deque(thread.submit(load, b) for b in itertools.islice(waiting, PREFETCH))
        while pending:
            batch = pending.popleft().result()
            pending.extend(thread.submit(load, b) for b in itertools.islice(waiting, 1))
            yield batch


def _real(batch: range, total: int) -> Tensor:
    return torch.tensor([float(index < total) for index in batch])
