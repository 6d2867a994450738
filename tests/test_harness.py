"""The rank harness returns every rank's result and names the rank that failed."""

import os
import signal
import time

import pytest
import torch
from harness import RankFailed, run_ranks
from torch import distributed


def _sum_of_ranks(start: float) -> tuple[int, torch.Tensor]:
    total = torch.full((3,), start + distributed.get_rank())
    distributed.all_reduce(total)
    return distributed.get_rank(), total


def _raise_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise ValueError("no such expert")
    distributed.barrier()


def _die_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _sleep_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        time.sleep(60)


def test_ranks_communicate_and_return_tensors() -> None:
    results = run_ranks(_sum_of_ranks, 2, 1.0)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(total, torch.full((3,), 3.0)) for _, total in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "timeout", "reason"),
    [
        (_raise_on, 60.0, "ValueError: no such expert"),
        (_die_on, 60.0, "exit code -9"),
        (_sleep_on, 25.0, r"late ranks: \[1\]"),
    ],
)
def test_failure_names_the_rank_and_does_not_hang(function, timeout, reason) -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailed, match=reason):
        run_ranks(function, 2, 1, timeout=timeout)
    assert time.monotonic() - begin < 59  # a rank takes seconds to start where cores are busy


def test_failure_of_the_second_rank_is_not_blamed_on_the_first() -> None:
    with pytest.raises(RankFailed) as failure:
        run_ranks(_raise_on, 2, 1)
    assert failure.value.rank == 1
