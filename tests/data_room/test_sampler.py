"""One stream of samples, however many ranks share it, wherever it is taken up again."""

import threading

import pytest
import torch
from torch.utils.data import Dataset

from moe.data.sampler import Batches, step_indices, validation_batches
from moe.errors import UserError


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.broken:
            raise OSError(f"sample {index} cannot be read")
        assert 0 <= index < self.size
        return {"tokens": torch.tensor([index]), "loss_mask": torch.ones(1)}


def stream(ranks: list[Batches], steps: int) -> list[list[int]]:
    """Samples of each step in the order of its micro-batches, those of the ranks in turn."""
    found = []
    for _ in range(steps):
        step = []
        for _ in range(ranks[0].micro_batches_per_step):
            for rank in ranks:
                step += next(rank)["tokens"][:, 0].tolist()
        found.append(step)
    return found


def ranks(world_size: int, micro_batch_size: int, consumed_samples: int = 0, size: int = 96):
    return [
        Batches(
            Numbers(size),
            global_batch_size=24,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            consumed_samples=consumed_samples,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_stream_is_the_same_for_any_ranks_and_micro_batches(world_size, micro_batch_size) -> None:
    expected = [list(range(start, start + 24)) for start in range(0, 96, 24)]
    assert stream(ranks(world_size, micro_batch_size), 4) == expected


def test_resumed_stream_goes_on_with_other_ranks() -> None:
    first = ranks(4, 3)
    begin = stream(first, 1)
    assert {batches.consumed_samples for batches in first} == {24}
    middle = ranks(1, 8, first[0].consumed_samples)
    begin += stream(middle, 2)
    last = ranks(2, 2, middle[0].consumed_samples)
    begin += stream(last, 1)
    assert begin == stream(ranks(1, 24), 4)
    assert last[0].consumed_samples == 96


def test_a_step_counts_when_its_last_micro_batch_is_out() -> None:
    (batches,) = ranks(1, 8)
    counts = []
    for _ in batches:
        counts.append(batches.consumed_samples)
    assert counts == [0, 0, 24, 24, 24, 48, 48, 48, 72, 72, 72, 96]


def test_stream_ends_before_a_step_it_cannot_fill() -> None:
    (batches,) = ranks(1, 24, size=71)
    assert [len(batch["tokens"]) for batch in batches] == [24, 24]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 5, 2), r"24 is not a multiple of micro_batch_size=5 x 2.*one of 1, 2, 3, 4, 6, 12\."),
        ((24, 1, 5), r"24 is not a multiple.*multiple of 5, such as global_batch_size=25\."),
        ((2, 1, 4), r"such as global_batch_size=4\."),
        ((8, 16, 1), r"one of 1, 2, 4, 8\."),
        ((8, 0, 1), r"one of 1, 2, 4, 8\."),
        ((0, 1, 2), r"such as global_batch_size=2\."),
    ],
)
def test_illegal_sizes_name_the_legal_ones(sizes, message) -> None:
    names = ("global_batch_size", "micro_batch_size", "world_size")
    with pytest.raises(UserError, match=message):
        step_indices(0, rank=0, **dict(zip(names, sizes, strict=True)))


def test_error_surfaces_at_its_batch_and_the_thread_ends() -> None:
    batches = Batches(Numbers(96, broken=30), global_batch_size=12, micro_batch_size=12)
    for expected in (0, 12):
        assert next(batches)["tokens"][0, 0] == expected
    with pytest.raises(OSError, match="sample 30 cannot be read"):
        next(batches)
    assert not reading_threads()


def test_close_ends_the_thread() -> None:
    batches = Batches(Numbers(96), global_batch_size=2, micro_batch_size=1)
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("size", "limit"), [(23, None), (24, None), (40, 23), (3, 99)])
def test_validation_sees_each_sample_once_in_equal_batches(world_size, size, limit) -> None:
    seen, shapes = [], []
    for rank in range(world_size):
        batches = list(
            validation_batches(Numbers(size), 3, rank=rank, world_size=world_size, limit=limit)
        )
        shapes.append([batch["tokens"].shape for batch in batches])
        for batch in batches:
            seen += batch["tokens"][batch["loss_mask"] > 0].tolist()
    assert sorted(seen) == list(range(min(size, limit or size)))
    assert all(shape == shapes[0] for shape in shapes)
    assert all(shape == (3, 1) for shape in shapes[0])
