"""Lazy rearrangements of tensors: parts, means, multiples, and neurons in another order.

Take(Read(down), order, 0, 192, axis=1)   # the columns of the first 192 neurons of an order
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from moe.upcycle.expression import Expression, Mapped, num_columns


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start..stop of a tensor seen as [rows, columns], as a matrix of their own."""

    base: Expression
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        count = self.stop - self.start
        return (count, num_columns(self.base.shape)) if len(self.base.shape) > 1 else (count,)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(self.start + start, self.start + stop)

    def __str__(self) -> str:
        return f"{self.base}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Scaled(Mapped):
    """A tensor times a constant, rounded to its own dtype: exact for powers of two."""

    factor: float

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(start, stop) * self.factor

    def __str__(self) -> str:
        return f"{self.factor:g} · {self.base}"


def scaled(base: Expression, factor: float) -> Expression:
    """`base` itself where there is nothing to multiply by."""
    return base if factor == 1 else Scaled(base, factor)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of tensors of one shape, summed in float32 or wider. Of equal ones: that one."""

    parts: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        first = self.parts[0].rows(start, stop)
        if len(set(self.parts)) == 1:
            return first
        # as differences from the first, so that equal values give themselves, bit for bit
        wide = torch.promote_types(self.dtype, torch.float32)
        total = torch.zeros(first.shape, dtype=wide)
        for part in self.parts[1:]:
            total += part.rows(start, stop).to(wide) - first.to(wide)
        return (first.to(wide) + total / len(self.parts)).to(self.dtype)

    def __str__(self) -> str:
        return f"mean of {len(self.parts)} × {self.parts[0]}"


@dataclass(frozen=True, slots=True)
class Beside:
    """Matrices side by side: the columns of one after those of the other."""

    parts: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(p.shape[1] for p in self.parts))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.cat([p.rows(start, stop) for p in self.parts], dim=1)

    def __str__(self) -> str:
        return f"beside({', '.join(map(str, self.parts))})"


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tensor of two dimensions or more from blocks that cover it, each where its offset says."""

    shape: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    parts: tuple[Expression, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, self.shape[-1], dtype=self.dtype)
        for offset, part in zip(self.offsets, self.parts, strict=True):
            *outer, run, width = part.shape
            for index, place in enumerate(itertools.product(*(range(n) for n in outer))):
                above = 0  # of what lies before this run of rows, in rows
                for o, i, n in zip(offset, place, self.shape[:-2], strict=False):
                    above = above * n + o + i
                first = above * self.shape[-2] + offset[-2]
                low, high = max(start, first), min(stop, first + run)
                if low < high:
                    begin = index * run + low - first
                    columns = slice(offset[-1], offset[-1] + width)
                    out[low - start : high - start, columns] = part.rows(begin, begin + high - low)
        return out

    def __str__(self) -> str:
        return f"tiles({', '.join(map(str, self.parts))})"


@dataclass(frozen=True, slots=True)
class Repeat:
    """A vector as each of `times` rows."""

    base: Expression
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.times, self.base.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(0, self.base.shape[0]).T.expand(stop - start, -1)

    def __str__(self) -> str:
        return f"{self.times} rows of {self.base}"


class Order(Protocol):
    """Some numbers 0..size in an order that may cost something to find, found once."""

    def indices(self) -> Sequence[int]: ...

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Given:
    """An order that is known."""

    numbers: tuple[int, ...]

    def indices(self) -> Sequence[int]:
        return self.numbers

    def __str__(self) -> str:
        return "reordered"


@dataclass(frozen=True, slots=True)
class Take:
    """Rows (axis 0) or columns (axis 1) of a matrix, or elements of a vector: those that stand at
    start..stop of an order.
    """

    base: Expression
    order: Order
    start: int
    stop: int
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        taken = self.stop - self.start
        return (taken, *self.base.shape[1:]) if self.axis == 0 else (self.base.shape[0], taken)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        chosen = self.order.indices()[self.start : self.stop]
        if self.axis == 1:
            return self.base.rows(start, stop)[:, list(chosen)]
        return torch.cat([self.base.rows(a, b) for a, b in _runs(chosen[start:stop])])

    def __str__(self) -> str:
        what = ("rows", "columns")[self.axis]
        return f"{self.base}[{self.order}, {what} {self.start}:{self.stop}]"


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as ranges: they are read at once."""
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    edges = [0, *breaks, len(numbers)]
    return [(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(edges)]
