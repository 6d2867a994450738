"""Kill -9 of either of two ranks at every call that changes the disk: training goes on from whole
checkpoints, and ends in the same bits.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import toy_run
from injection import Call, as_rank, free_port, fresh, inject, kill_at

from moe.checkpoint import store

pytestmark = pytest.mark.slow
OPTIONS = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep=1", "parallel.timeout=60")
SOME = 12  # points of each rank in `make test`; all of them in `make test-full`


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    folder = tmp_path_factory.mktemp("kills")
    return toy_run.make(folder, [{"kind": "dense"}], [tiny.MOE], num_hidden_layers=1)


def train(toys: toy_run.Toys, out: Path, victim: int = -1, number: int = -1) -> tuple[list, str]:
    """Two ranks of a run, one of which is killed before, or at odd numbers within, its n-th call.

    Their wait statuses, and what rank 0 printed.
    """
    config, port = toys.config(out, *OPTIONS), free_port()
    printed = out.with_suffix(".printed")
    printed.write_text("")

    def one(rank: int) -> None:
        as_rank(rank, 2, port)
        calls: list[Call] = []
        act = kill_at(number, half=bool(number % 2)) if rank == victim else calls.append
        (out / store.FOLDER).mkdir(parents=True, exist_ok=True)
        with inject(out / store.FOLDER, act):
            said = toy_run.run(config)
        if rank == 0:
            printed.write_text(said)
        lines = "".join(f"{c.number} {c.function} {c.path}\n" for c in calls)
        (out / f"calls {rank}").write_text(lines)

    return fresh([lambda rank=rank: one(rank) for rank in (0, 1)]), printed.read_text()


@pytest.fixture(scope="module")
def undisturbed(toys, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    statuses, _ = train(toys, out)
    assert statuses == [0, 0]
    return out


def points(undisturbed: Path, rank: int) -> list[tuple[int, str]]:
    """The calls of a rank from its second save on, so that there is one to go back to."""
    lines = (undisturbed / f"calls {rank}").read_text().splitlines()
    calls = [(int(n), what) for n, _, what in (line.partition(" ") for line in lines)]
    first = next(n for n, what in calls if "step-2" in what)
    return calls[first:]


def survive(toys: toy_run.Toys, undisturbed: Path, out: Path, rank: int, number: int) -> int:
    """Kill and start again; the step that the second run went on from."""
    statuses, _ = train(toys, out, rank, number)
    assert os.WIFSIGNALED(statuses[rank]) and os.WTERMSIG(statuses[rank]) == signal.SIGKILL
    whole = store.steps(out)
    assert whole and all(not store.check(folder) for _, folder in whole), "a torn one"
    newest = whole[-1][0]
    statuses, printed = train(toys, out)
    assert statuses == [0, 0]
    assert f"going on from {out}/checkpoints/step-{newest}" in printed, "not from the newest"
    found, expected = toy_run.checkpoint(out, 3), toy_run.checkpoint(undisturbed, 3)
    assert toy_run.differing(found, expected) == []
    left = sorted(p.name for p in (out / store.FOLDER).iterdir())
    assert left == ["latest", "step-3"], "leftovers"
    shutil.rmtree(out)
    return newest


def grid(undisturbed: Path, rank: int, count: int | None) -> list[tuple[int, str]]:
    found = points(undisturbed, rank)
    step = max(1, len(found) // count) if count else 1
    return found[::step]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_survived(toys, undisturbed, tmp_path, rank) -> None:
    chosen = grid(undisturbed, rank, SOME)
    assert len(chosen) >= SOME
    newest = {survive(toys, undisturbed, tmp_path / "run", rank, n) for n, _ in chosen}
    assert newest == {1, 2, 3} if rank == 0 else newest >= {1, 2}


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_survived_at_every_call(toys, undisturbed, tmp_path, rank) -> None:
    for number, _ in grid(undisturbed, rank, None):
        survive(toys, undisturbed, tmp_path / "run", rank, number)


def test_a_torn_checkpoint_would_be_noticed(toys, undisturbed, tmp_path) -> None:
    """Negative control: a folder that looks published while a rank's bytes are another step's."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    assert all(not store.check(path) for _, path in store.steps(out))
    shard = out / "checkpoints/step-3/rank-00001.safetensors"
    content = shard.read_bytes()
    middle = len(content) // 2
    shard.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    assert any(store.check(path) for _, path in store.steps(out))
