"""A run folder that is not as a run leaves it: nothing of others is harmed, and a line says why."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import toy_run
from injection import as_rank, free_port, fresh
from invoke import moe
from tensorboard.summary.writer.record_writer import RecordWriter

from moe.checkpoint import folders, store
from moe.errors import Corrupt, MoeError, SaidElsewhere, UserError
from moe.parallel.world import world
from moe.train.guard import Guard
from moe.train.metrics import Reporter

OPTIONS = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=9", "schedule.kind=constant")


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    toy_run.run(toys.config(out, *OPTIONS))
    return out


@pytest.fixture
def out(straight, tmp_path) -> Path:
    return shutil.copytree(straight, tmp_path / "run")


FILES = ("config.yaml", "metrics.jsonl", "metrics.jsonl.new", "config.yaml.new")


def test_a_runs_files_are_replaced_and_never_written_through_a_link(toys, out, tmp_path) -> None:
    victims = {name: tmp_path / f"victim of {name}" for name in FILES}
    for name, victim in victims.items():
        victim.write_text("precious\n")
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    toy_run.run(toys.config(out, *OPTIONS, "train.steps=5"))
    assert {victim.read_text() for victim in victims.values()} == {"precious\n"}
    assert not any(path.is_symlink() for path in out.iterdir())
    assert [line["step"] for line in toy_run.metrics(out)] == [5]


def test_linked_checkpoints_are_refused_and_nothing_is_deleted_there(toys, out, tmp_path) -> None:
    shutil.move(out / store.FOLDER, tmp_path / "others")
    (out / store.FOLDER).symlink_to(tmp_path / "others")
    before = sorted((tmp_path / "others").rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints is a symbolic link.* put out there") as error:
        toy_run.run(toys.config(out, *OPTIONS, "train.steps=5", "checkpoint.keep=1"))
    assert "\n" not in str(error.value)
    code, _, said = moe("verify", out)
    assert code == 2 and "is a symbolic link" in said
    assert sorted((tmp_path / "others").rglob("*")) == before
    (out / store.FOLDER).unlink()
    shutil.move(tmp_path / "others", out / store.FOLDER)
    alias = tmp_path / "alias"
    alias.symlink_to(out)
    toy_run.run(toys.config(alias, *OPTIONS, "train.steps=5", "checkpoint.keep=1"))
    assert [p.name for _, p in store.steps(out)] == ["step-5"], "out itself may be a link"


def test_a_linked_checkpoint_is_damage(toys, out, tmp_path) -> None:
    step, others = out / store.FOLDER / "step-4", tmp_path / "others"
    shutil.move(step, others)
    step.symlink_to(others)
    before = sorted(others.iterdir())
    code, _, said = moe("verify", step)
    assert code == 3 and "a symbolic link, which is not followed" in said
    with pytest.raises(Corrupt, match="symbolic link"):
        toy_run.run(toys.config(tmp_path / "new", f"model={step}"))
    printed = toy_run.run(toys.config(out, *OPTIONS, "checkpoint.keep=1"))
    assert "the newest sound checkpoint is step-3" in printed
    assert sorted(others.iterdir()) == before
    assert (out / store.FOLDER / "step-4.damaged").is_symlink()
    assert moe("verify", others).code == 0, "negative control: the folder itself is sound"


def occupy(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.write_text("x") if path.name in ("tensorboard", "checkpoints") else path.mkdir()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "tensorboard", "checkpoints"])
def test_what_stands_in_the_way_is_named_in_a_line(toys, tmp_path, name) -> None:
    out = tmp_path / "run"
    out.mkdir()
    occupy(out / name)
    with pytest.raises(UserError, match=f"^{out / name} (cannot be written|is not a folder)"):
        toy_run.run(toys.config(out, "train.steps=1"))
    shutil.rmtree(out)
    toy_run.run(toys.config(out, "train.steps=1"))  # negative control


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_disk_that_is_full_at_the_start_is_said_in_a_line(toys, out, name) -> None:
    write = os.write

    def of_that(descriptor: int, data: Any) -> int:
        if f"{name}.new" in os.readlink(f"/proc/self/fd/{descriptor}"):
            full()
        return write(descriptor, data)

    before = {path: path.read_bytes() for path in out.glob("*.*")}
    with (
        mock.patch.object(os, "write", of_that),
        pytest.raises(UserError, match=f"{name} cannot be written: No space left on device"),
    ):
        toy_run.run(toys.config(out, *OPTIONS, "train.steps=5"))
    left = {path: path.read_bytes() for path in out.glob("*.*")}
    assert left.keys() == before.keys() and left[out / name] == before[out / name]


def test_tensorboards_thread_leaves_it_to_us_to_say(tmp_path, capfd) -> None:
    with mock.patch.object(RecordWriter, "write", full), pytest.raises(UserError, match="No space"):
        reporter = Reporter(tmp_path, "", 0, 9)
        for step in range(9):
            reporter.validation(step, 0.5)
            reporter._board.flush()
    assert capfd.readouterr().err == ""
    thread = threading.Thread(target=full)
    thread.start()
    thread.join()
    assert "Traceback" in capfd.readouterr().err, "negative control: other threads are heard"


def test_a_checkpoint_is_there_though_latest_is_not_written(toys, tmp_path) -> None:
    out, right = tmp_path / "run", folders.replace_file

    def of_latest(path: Path, text: str) -> None:
        if text.startswith(("step-2", "step-4")):
            full()
        right(path, text)

    with mock.patch.object(folders, "replace_file", of_latest):
        printed = toy_run.run(toys.config(out, *OPTIONS, "checkpoint.keep=2"))
    said = [line for line in printed.splitlines() if "latest" in line]
    assert [line.split(", but latest")[0] for line in said] == [
        f"{out}/checkpoints/step-{n} is saved" for n in (2, 4)
    ]
    assert all("No space left on device" in line for line in said)
    assert "Training goes on" not in printed, "nothing has failed"
    assert [p.name for _, p in store.steps(out)] == ["step-3", "step-4"], "retention goes on"
    assert (out / store.FOLDER / "latest").read_text() == "step-3\n"


@pytest.mark.slow
def test_rank_0_alone_speaks_of_what_all_end_on(toys, tmp_path) -> None:
    out, port = tmp_path / "run", free_port()
    (out / "config.yaml").mkdir(parents=True)
    guarded = toys.config(tmp_path / "guarded", "train.steps=4", "guard.consecutive=2")
    config = toys.config(out, "train.steps=1")

    def one(rank: int) -> None:
        as_rank(rank, 2, port)
        with world(60):
            for number, settings in enumerate((config, guarded)):
                with mock.patch.object(Guard, "judge", lambda *_: "loss is nan"):
                    try:
                        toy_run.run(settings)
                    except MoeError as error:
                        said = [type(error).__name__, str(error.exit_code), str(error)]
                        (tmp_path / f"{number} of {rank}").write_text("\t".join(said))

    assert fresh([lambda rank=rank: one(rank) for rank in (0, 1)]) == [0, 0]
    for number, (kind, code) in enumerate((("UserError", "2"), ("MoeError", "1"))):
        first, second = ((tmp_path / f"{number} of {r}").read_text().split("\t") for r in (0, 1))
        assert first[:2] == [kind, code] and first[2]
        assert second == [SaidElsewhere.__name__, code, ""]
