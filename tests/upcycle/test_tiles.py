"""A tensor from blocks that divide it in any way."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe.upcycle.expression import num_columns, num_rows
from moe.upcycle.rearrange import Tiles


@dataclass(frozen=True)
class Held:
    """An expression that is there already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(num_rows(self.shape), num_columns(self.shape))[start:stop]

    def __str__(self) -> str:
        return "held"


def tiled(whole: Tensor, cuts: tuple[int, ...]) -> Tiles:
    """Cut along every dimension into so many chunks, which are not all alike."""
    parts = [((0,) * whole.ndim, whole)]
    for dim, count in enumerate(cuts):
        cut = []
        for offset, part in parts:
            begin = 0
            for piece in part.chunk(count, dim):
                moved = list(offset)
                moved[dim] += begin
                cut.append((tuple(moved), piece))
                begin += piece.shape[dim]
        parts = cut
    return Tiles(
        tuple(whole.shape),
        tuple(o for o, _ in parts),
        tuple(Held(p.contiguous()) for _, p in parts),
    )


@pytest.mark.parametrize(("shape", "cuts"), [
    ((7, 5), (1, 2)), ((7, 5), (3, 2)), ((4, 6, 5), (1, 2, 1)), ((4, 6, 5), (2, 3, 2)),
    ((4, 6, 5), (2, 1, 1)), ((2, 3, 4, 5), (2, 2, 3, 2)),
])  # fmt: skip
def test_any_rows_of_any_division(shape, cuts):
    whole = torch.randn(shape)
    tiles, flat = tiled(whole, cuts), whole.reshape(num_rows(shape), shape[-1])
    assert tiles.shape == shape and tiles.dtype == whole.dtype
    for start, stop in ((0, len(flat)), (1, len(flat) - 1), (2, 3), (len(flat) // 2, len(flat))):
        assert torch.equal(tiles.rows(start, stop), flat[start:stop]), (start, stop)


def test_blocks_in_each_others_places_are_seen():
    """Negative control."""
    whole = torch.randn(4, 6)
    tiles = tiled(whole, (1, 2))
    swapped = Tiles(tiles.shape, tiles.offsets[::-1], tiles.parts)
    assert not torch.equal(swapped.rows(0, 4), whole)
