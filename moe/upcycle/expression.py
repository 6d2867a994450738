"""Lazy tensors: what a target tensor is made of, evaluated a block of rows at a time.

A plan is `{target name: expression}`. An expression knows its shape and dtype without reading
anything; `rows(start, stop)` gives it as [rows, columns], columns its last dimension, so that a
tensor of any size passes through memory in slices.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from moe.errors import UserError
from moe.upcycle.source import StoredTensor, blocks, read_rows

DRAW_BLOCK = 2**20  # elements drawn from one seed; part of what a seed means, never change it


class Expression(Protocol):
    """A tensor to be: its shape, its dtype, its rows, and how to say it in words."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> Tensor: ...

    def __str__(self) -> str: ...


def num_rows(shape: Sequence[int]) -> int:
    """Rows of a tensor seen as [rows, columns]."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def num_columns(shape: Sequence[int]) -> int:
    """Columns of a tensor seen as [rows, columns]: its last dimension; 1 for a vector."""
    return shape[-1] if len(shape) > 1 else 1


@dataclass(frozen=True, slots=True)
class Read:
    """A stored tensor as it is."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return read_rows(self.tensor, start, stop)

    def __str__(self) -> str:
        return self.tensor.name


def pieces(expression: Expression, start: int, stop: int) -> Iterator[Tensor]:
    """Rows start..stop one part after the other: `rows` without joining them.

    A part that repeats the one before it is not evaluated again: its rows come once more.
    """
    if not isinstance(expression, Concat | Stack):
        yield expression.rows(start, stop)
        return
    first, kept = 0, None
    held: list[Tensor] = []
    for part in expression.parts:
        length = num_rows(part.shape)
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            if (part, low, high) != kept:
                kept, held = (part, low, high), list(pieces(part, low, high))
            yield from held
        first += length


def _joined(parts: Iterator[Tensor]) -> Tensor:
    blocks = list(parts)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


@dataclass(frozen=True, slots=True)
class Concat:
    """Tensors one after the other along their first dimension."""

    parts: tuple[Expression, ...]

    def __post_init__(self) -> None:
        _require_equal("concat", [p.shape[1:] for p in self.parts], self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return _joined(pieces(self, start, stop))

    def __str__(self) -> str:
        return f"concat({', '.join(map(str, self.parts))})"


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors of one shape along a new first dimension."""

    parts: tuple[Expression, ...]

    def __post_init__(self) -> None:
        _require_equal("stack", [p.shape for p in self.parts], self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return _joined(pieces(self, start, stop))

    def __str__(self) -> str:
        if len(set(self.parts)) == 1:
            return f"{len(self.parts)} × {self.parts[0]}"
        return f"stack({self.parts[0]}, …)"


def _require_equal(what: str, shapes: list[tuple[int, ...]], parts: Sequence[Expression]) -> None:
    if len(set(shapes)) > 1 or len({p.dtype for p in parts}) > 1:
        described = ", ".join(f"{p} {tuple(p.shape)} {p.dtype}" for p in parts)
        raise UserError(f"cannot {what} tensors of different shapes or dtypes: {described}.")


def draw(key: str, start: int, stop: int) -> Tensor:
    """Standard normal numbers start..stop of the endless sequence that `key` names, in float32.

    Counted from the key, so the numbers do not depend on how a tensor is cut into blocks.
    """
    pieces = []
    for block in range(start // DRAW_BLOCK, -(-stop // DRAW_BLOCK)):
        seed = xxhash.xxh3_64_intdigest(f"{key}/{block}".encode()) >> 1  # torch seeds are signed
        numbers = torch.randn(DRAW_BLOCK, generator=torch.Generator().manual_seed(seed))
        first = block * DRAW_BLOCK
        pieces.append(numbers[max(start - first, 0) : stop - first])
    return torch.cat(pieces) if pieces else torch.empty(0)


@dataclass(frozen=True, slots=True)
class Draw:
    """Normal numbers of deviation `std` (0: zeros), reproducible from `key`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    std: float
    key: str

    def rows(self, start: int, stop: int) -> Tensor:
        columns = num_columns(self.shape)
        if self.std == 0:
            return torch.zeros(stop - start, columns, dtype=self.dtype)
        numbers = draw(self.key, start * columns, stop * columns)
        return (self.std * numbers).to(self.dtype).view(-1, columns)

    def __str__(self) -> str:
        return f"normal(0, {self.std:g}²)" if self.std else "zeros"


@dataclass(frozen=True, slots=True)
class Mapped:
    """What all expressions share that keep the shape and the dtype of another."""

    base: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype


@dataclass(frozen=True, slots=True)
class Cast(Mapped):
    """A tensor in another dtype."""

    to: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.to

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(start, stop).to(self.to)

    def __str__(self) -> str:
        return f"{self.base} as {str(self.to).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Noise(Mapped):
    """A tensor plus normal noise of deviation `std`."""

    std: float
    key: str

    def rows(self, start: int, stop: int) -> Tensor:
        block = self.base.rows(start, stop)
        columns = block.shape[1]
        numbers = draw(self.key, start * columns, stop * columns).view(-1, columns)
        return (block.float() + self.std * numbers).to(self.dtype)

    def __str__(self) -> str:
        return f"({self.base} + noise {self.std:g})"


@dataclass(frozen=True, slots=True)
class Redraw(Mapped):
    """A matrix with some rows (axis 0) or columns (axis 1) drawn anew, from a normal distribution
    of the mean and deviation of what they replace. Source: Drop-Upcycling, eq. 3.
    """

    chosen: tuple[int, ...]
    axis: int
    key: str
    _moments: list[tuple[float, float]] = field(default_factory=list, compare=False, repr=False)

    def rows(self, start: int, stop: int) -> Tensor:
        block = self.base.rows(start, stop)
        if not self.chosen:
            return block
        mean, std = self.moments()
        columns = block.shape[1]
        fresh = mean + std * draw(self.key, start * columns, stop * columns).view(-1, columns)
        mask = self._mask(start, stop)
        return torch.where(mask, fresh.to(self.dtype), block)

    def moments(self) -> tuple[float, float]:
        """Mean and deviation of the values to be replaced, from one pass over the tensor."""
        if not self._moments:
            rows, columns = num_rows(self.shape), num_columns(self.shape)
            total = square = 0.0
            for start, stop in blocks(rows, columns, self.dtype):
                values = self.base.rows(start, stop).double() * self._mask(start, stop)
                total += values.sum().item()
                square += values.square().sum().item()
            count = len(self.chosen) * (columns if self.axis == 0 else rows)
            mean = total / count
            self._moments.append((mean, max(square / count - mean**2, 0.0) ** 0.5))
        return self._moments[0]

    def _mask(self, start: int, stop: int) -> Tensor:
        """[rows, 1] or [1, columns]: True where the values are drawn anew."""
        size = self.shape[self.axis]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(self.chosen)] = True
        return mask[start:stop, None] if self.axis == 0 else mask[None]

    def __str__(self) -> str:
        what = ("rows", "columns")[self.axis]
        return f"({self.base}, {len(self.chosen)} of {self.shape[self.axis]} {what} redrawn)"
