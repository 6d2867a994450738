"""One run in a folder at a time: who holds it, who is refused, who waits."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moe.errors import SaidElsewhere, UserError
from moe.train import lock

HOLDER = """
import sys, time
from pathlib import Path
from moe.train import lock
class Alone:
    rank = 0
    gather = staticmethod(lambda value: [value])
with lock.take(Path(sys.argv[1]), Alone()):
    print("taken", flush=True)
    time.sleep(float(sys.argv[2]))
"""


class Alone:
    rank = 0

    @staticmethod
    def gather(value: str) -> list[str]:
        return [value]


class Second:
    """Rank 1, and what rank 0 had to say."""

    rank = 1

    def __init__(self, said: str) -> None:
        self.said = said

    def gather(self, value: str) -> list[str]:
        return [self.said, value]


def hold(out: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, out, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, monkeypatch):
    out = tmp_path / "new/run"
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    first = hold(out, 60)
    with pytest.raises(UserError) as refused:
        lock.take(out, Alone())
    place = f"{socket.gethostname()}, process {first.pid}, since 2"
    assert f"another run is writing into out={out} ({place}" in str(refused.value)
    assert json.loads((out / lock.FILE).read_text())["pid"] == first.pid
    first.send_signal(signal.SIGKILL)
    first.wait()
    with lock.take(out, Alone()):  # negative control: the file alone keeps nobody out
        assert json.loads((out / lock.FILE).read_text())["pid"] == os.getpid()


def test_one_that_is_ending_is_waited_for(tmp_path):
    first = hold(tmp_path, 1)
    with lock.take(tmp_path, Alone()):
        assert first.wait(10) == 0


def test_other_ranks_go_by_the_first(tmp_path):
    with lock.take(tmp_path, Second("")):
        assert not (tmp_path / lock.FILE).exists()
    with pytest.raises(SaidElsewhere) as refused:  # in silence: the first one says it
        lock.take(tmp_path, Second("another run"))
    assert refused.value.exit_code == UserError.exit_code


def test_children_do_not_keep_it(tmp_path):
    with lock.take(tmp_path, Alone()):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    hold(tmp_path, 0).wait()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_who_is_refused_takes_a_folder_of_his_own_away_again(tmp_path):
    """Not one that was there, nor one that holds more; nor after other errors."""
    for name, there, more, error, left in [
        ("new", False, False, UserError, False),
        ("there", True, False, UserError, True),
        ("written", False, True, UserError, True),
        ("broken", False, False, ValueError, True),
    ]:
        out = tmp_path / name
        if there:
            out.mkdir()
        with pytest.raises(error), lock.take(out, Alone()):
            if more:
                (out / "metrics.jsonl").write_text("")
            raise error("no")
        assert out.exists() == left, name


def test_a_lock_that_its_holder_has_removed_is_taken_anew(tmp_path):
    """Of a run that was refused while this one waited for it."""
    out, waited = tmp_path / "run", []

    def wait(*given: Any) -> None:
        if not waited:
            waited.append(True)
            shutil.rmtree(out)

    with mock.patch.object(fcntl, "lockf", side_effect=wait), lock.take(out, Alone()):
        assert waited and (out / lock.FILE).exists()


@pytest.mark.parametrize("number", lock.MISSING)
def test_a_file_system_without_locks_is_said(tmp_path, capsys, number):
    with (
        mock.patch.object(fcntl, "lockf", side_effect=OSError(number, os.strerror(number))),
        lock.take(tmp_path, Alone()),
    ):
        assert capsys.readouterr().out.count("without locks") == 1


def test_what_is_no_place_for_it_is_refused(tmp_path):
    (tmp_path / lock.FILE).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"out={out} cannot be written to"):
            lock.take(out, Alone())
    assert not (tmp_path / "elsewhere").exists()
    broken = OSError(errno.EIO, "Input/output error")
    with mock.patch.object(fcntl, "lockf", side_effect=broken), pytest.raises(OSError, match="Inp"):
        lock.take(tmp_path / "other", Alone())
