"""Training and its saves: a disk that fails in the middle of a run stops nothing but the last."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_run
from injection import Call, as_rank, free_port, fresh, inject

from moe.checkpoint import store
from moe.errors import UserError

OPTIONS = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=9")


def full_at(step: int) -> Callable[[Call], None]:
    """A disk that is full while this step is saved."""

    def act(call: Call) -> None:
        if call.function == "write" and f"step-{step}." in call.path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.path)

    return act


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / store.FOLDER).glob("step-*"))


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    printed = toy_run.run(toys.config(out, *OPTIONS))
    assert "cannot be written" not in printed and names(out) == ["step-2", "step-4", "step-6"]
    return out


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_when_a_save_fails(toys, straight, tmp_path, asynchronous) -> None:
    out = tmp_path / "run"
    with inject(tmp_path, full_at(4)):
        printed = toy_run.run(toys.config(out, *OPTIONS, f"checkpoint.asynchronous={asynchronous}"))
    assert printed.count("cannot be written") == 1
    line = next(line for line in printed.splitlines() if "cannot be written" in line)
    assert line.startswith(f"{out}/checkpoints/step-4 cannot be written: No space left on device")
    assert line.endswith("Training goes on; the newest checkpoint is step-2.")
    said = printed[printed.index(line) :]
    assert "step      6" in said, "it is said while training goes on, not at its end"
    assert names(out) == ["step-2", "step-6"]
    assert not toy_run.differing(toy_run.checkpoint(out, 6), toy_run.checkpoint(straight, 6))


def test_run_whose_last_save_fails_ends_in_an_error_and_can_go_on(toys, straight, tmp_path) -> None:
    out = tmp_path / "run"
    with (
        inject(tmp_path, full_at(6)),
        pytest.raises(UserError, match=r"step-6 cannot be written: No space .* Start the"),
    ):
        toy_run.run(toys.config(out, *OPTIONS))
    assert names(out) == ["step-2", "step-4"]
    assert "going on from" in toy_run.run(toys.config(out, *OPTIONS))
    assert not toy_run.differing(toy_run.checkpoint(out, 6), toy_run.checkpoint(straight, 6))


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_rank_learns_of_a_failure_of_one(toys, tmp_path, tensor) -> None:
    """Of a rank that shares its batches with another too."""
    out, port = tmp_path / "run", free_port()
    if tensor > 1:
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        toys = toy_run.make(tmp_path, [{"kind": "dense"}], [{"kind": "dense"}],
                            num_hidden_layers=1, vocab_size=98, **sizes)  # fmt: skip
    config = toys.config(out, *OPTIONS, f"parallel.tensor={tensor}", "parallel.timeout=30")

    def one(rank: int) -> None:
        as_rank(rank, 2, port)
        with inject(tmp_path, full_at(4) if rank == 1 else lambda call: None):
            (tmp_path / f"printed {rank}").write_text(toy_run.run(config))

    assert fresh([lambda rank=rank: one(rank) for rank in (0, 1)]) == [0, 0]
    printed = [(tmp_path / f"printed {rank}").read_text() for rank in (0, 1)]
    assert printed[0].count("step-4 cannot be written on rank 1: No space left on device") == 1
    assert "cannot be written" not in printed[1]
    assert printed[0].index("cannot be written") < printed[0].index("step      6"), "in a step"
    assert names(out) == ["step-2", "step-6"]
    assert all(not store.check(folder) for _, folder in store.steps(out))
