"""Saving in the background: of one moment, whole or not at all, and a failure stops nothing."""

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from injection import Call, as_rank, fail_after, fork, free_port, inject
from stored import alone, blank, differing, load, progress, side_files, state
from torch.distributed.tensor import Shard, distribute_tensor

from moe.checkpoint import pieces, store
from moe.checkpoint.saver import Saver
from moe.engines.base import Entry
from moe.errors import UserError
from moe.parallel.world import world

NONE = progress(0)


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / store.FOLDER).iterdir() if p.name != "latest")


class Gate:
    """Holds the first write until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, call: Call) -> None:
        if call.function == "write":
            self.reached.set()
            assert self.open.wait(30)


def save_and_change(out: Path) -> list[str]:
    """Tensors whose saved values are not those of the moment when save() was called."""
    saver, entries, gate = Saver(out, 0, alone), state(), Gate()
    with inject(out, gate):
        torch.manual_seed(5)
        generator = torch.get_rng_state()
        saver.save(1, entries, NONE, side_files)
        assert gate.reached.wait(30), "it is written in the background"
        for entry in entries:
            entry.tensor.add_(1)
        torch.rand(9)
        gate.open.set()
        saver.finish()
    read = blank(state())
    with store.Reader(out / store.FOLDER / "step-1") as reader:
        reader.load(read)
        assert torch.equal(reader.random_state(0), generator)
    return differing(read, state())


def test_what_changes_after_save_is_not_in_the_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "run").mkdir()
    assert save_and_change(tmp_path / "run") == []
    monkeypatch.setattr(pieces, "_copy", lambda key, local, buffers: local.contiguous())
    (tmp_path / "uncopied").mkdir()
    changed = save_and_change(tmp_path / "uncopied")  # negative control
    assert {"parameter/embed", "exp_avg/embed", "buffer/bias"} <= set(changed)


def test_a_save_waits_for_the_one_before_and_uses_its_buffers(tmp_path) -> None:
    saver, gate = Saver(tmp_path, 0, alone, keep=9), Gate()
    with inject(tmp_path, gate):
        saver.save(1, state(1), NONE, side_files)
        assert gate.reached.wait(30)
        first = {key: tensor.data_ptr() for key, tensor in saver._buffers.items()}
        second = threading.Thread(target=saver.save, args=(2, state(2), NONE, side_files))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it did not wait"
        gate.open.set()
        second.join(30)
        saver.finish()
    assert {key: tensor.data_ptr() for key, tensor in saver._buffers.items()} == first
    for step in (1, 2):
        read = blank(state())
        load(tmp_path / store.FOLDER / f"step-{step}", read)
        assert not differing(read, state(step))


def test_the_step_that_was_saved_last_is_not_written_again(tmp_path) -> None:
    saver = Saver(tmp_path, 0, alone)
    saver.save(1, state(), NONE, side_files)
    saver.finish()
    calls: list[Call] = []
    with inject(tmp_path, calls.append):
        saver.save(1, state(), NONE, side_files)
        saver.finish()
        assert not calls
        saver.save(2, state(), NONE, side_files)  # negative control
        saver.finish()
    assert calls


# Ranks whose disk fails. Each forked rank saves steps 1 to 3, the second with a fault.


def three_saves(out: Path, rank: int, port: str, faulty: int, act: Callable, last: bool) -> None:
    as_rank(rank, 2, port)
    with (
        world(20) as here,
        open(out.parent / f"printed {rank}", "w", buffering=1) as printed,
        contextlib.redirect_stdout(printed),
    ):
        saver = Saver(out, rank, here.gather, keep=9, timeout=20)
        entries = [Entry(f"w{i}", "parameter", torch.full((40_000,), 1.0 + i)) for i in range(3)]
        mesh = here.mesh(1)["shard"]
        entries = [
            Entry(e.name, e.kind, distribute_tensor(e.tensor, mesh, [Shard(0)])) for e in entries
        ]
        for step in (1, 2, 3) if not last else (1, 2):
            fault = act if (rank, step) == (faulty, 2) else lambda call: None
            with inject(out, fault):
                saver.save(step, entries, progress(step), side_files)
                busy = not last
                while busy:  # training steps, each with its sum
                    flags = [0.0, saver.trouble, float(saver._thread.is_alive())]
                    _, trouble, busy = here.sum(torch.tensor(flags), every=2).tolist()
                    if trouble:
                        saver.learn()
                saver.wait() if not last or step == 1 else finish(saver)
        finish(saver)


def finish(saver: Saver) -> None:
    try:
        saver.finish()
    except UserError as error:
        print(error)
        raise


def fails_from(function: str, file: str, code: int) -> Callable[[Call], None]:
    seen: list[Call] = []

    def act(call: Call) -> None:
        if call.function == function and file in call.path and not seen:
            seen.append(call)
            raise OSError(code, os.strerror(code), call.path)

    return act


FAULTS: dict[str, Callable[[], Callable[[Call], None]]] = {
    **{f"full after {n} bytes": lambda n=n: fail_after(n, errno.ENOSPC)
       for n in (0, 50, 1_000, 100_000, 241_000)},
    "fsync": lambda: fails_from("fsync", "rank-", errno.EIO),
    "read-only": lambda: fails_from("open", "rank-", errno.EROFS),
    "no rename of its part": lambda: fails_from("rename", "rank-", errno.EACCES),
}  # fmt: skip
OF_RANK_0 = {
    "manifest": lambda: fails_from("open", "manifest.json", errno.ENOSPC),
    "publishing": lambda: fails_from("rename", ".partial", errno.EIO),
}


@pytest.mark.parametrize(
    ("fault", "rank"),
    [*((f, i % 2) for i, f in enumerate(FAULTS)), *((f, 0) for f in OF_RANK_0),
     pytest.param("fsync", 1, marks=pytest.mark.full),
     *(pytest.param(f, 1 - i % 2, marks=pytest.mark.full) for i, f in enumerate(FAULTS))],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True], ids=["training goes on", "the last"])
def test_a_rank_that_cannot_write_stops_nothing(tmp_path, fault, rank, last) -> None:
    out, port = tmp_path / "run", free_port()
    (out / store.FOLDER).mkdir(parents=True)
    act = {**FAULTS, **OF_RANK_0}[fault]()
    statuses = fork(
        [lambda r=r: three_saves(out, r, port, rank, act, last) for r in (0, 1)], timeout=60
    )
    printed = [(tmp_path / f"printed {r}").read_text() for r in (0, 1)]
    said = [line for line in printed[0].splitlines() if "Training goes on" in line]
    assert len(said) == 1, printed
    assert f"step-2 cannot be written on rank {rank}: " in said[0]
    assert "the newest checkpoint is step-1" in said[0] and "Training goes on" not in printed[1]
    assert [os.waitstatus_to_exitcode(s) for s in statuses] == ([2, 2] if last else [0, 0])
    assert ("Start the run again" in printed[0]) == last
    assert names(out) == (["step-1"] if last else ["step-1", "step-3"])
    assert all(not store.check(folder) for _, folder in store.steps(out))


def test_without_a_fault_all_three_are_there(tmp_path) -> None:
    """Negative control."""
    out, port = tmp_path / "run", free_port()
    (out / store.FOLDER).mkdir(parents=True)
    fork([lambda r=r: three_saves(out, r, port, 0, lambda c: None, False) for r in (0, 1)])
    assert names(out) == ["step-1", "step-2", "step-3"]
    assert "cannot" not in (tmp_path / "printed 0").read_text()


# Real disks.


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[..., None]]:
    """Mounts a small disk at a folder, where that is allowed."""
    done: list[Path] = []

    def mount(folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        call = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if folder in done:
            call = ["mount", "-o", ",".join(("remount", *options)), str(folder)]
        if subprocess.run(call, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        done.append(folder)

    yield mount
    for folder in set(done):
        subprocess.run(["umount", str(folder)], check=True)


def big(value: float) -> list[Entry]:
    return [Entry("big", "parameter", torch.full((400_000,), float(value)))]


def test_full_disk_keeps_what_was_there(tmp_path, mounted, capsys) -> None:
    mounted(tmp_path / store.FOLDER, "size=4m")
    saver = Saver(tmp_path, 0, alone, keep=9)
    saver.save(1, big(1), NONE, side_files)
    saver.save(2, big(2), NONE, side_files)
    saver.save(3, big(3), NONE, side_files)
    with pytest.raises(UserError, match=r"step-3 cannot be written: No space left on device"):
        saver.finish()
    assert "Training goes on; the newest checkpoint is step-2." in capsys.readouterr().out
    assert names(tmp_path) == ["step-1", "step-2"]
    assert all(not store.check(folder) for _, folder in store.steps(tmp_path))
    mounted(tmp_path / store.FOLDER, "size=8m")
    saver.save(3, big(3), NONE, side_files)
    saver.finish()
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_disk_that_has_become_read_only_keeps_what_was_there(tmp_path, mounted) -> None:
    mounted(tmp_path / store.FOLDER, "size=4m")
    saver = Saver(tmp_path, 0, alone, keep=9)
    saver.save(1, big(1), NONE, side_files)
    saver.wait()
    mounted(tmp_path / store.FOLDER, "ro")
    saver.save(2, big(2), NONE, side_files)
    with pytest.raises(UserError, match=r"step-2 cannot be written: Read-only file system"):
        saver.finish()
    assert names(tmp_path) == ["step-1"] and not store.check(store.latest(tmp_path))
