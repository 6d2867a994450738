"""Launch scripts as users start them: a folder with a python, a run's file, processes to signal."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

# overrides of a run that takes some seconds, and is saved along the way
STEPS = ["train.steps=30", "checkpoint.every=5", "schedule.warmup_steps=1"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
)
# as from a terminal: a shell cannot trap what it was started to ignore, as nohup and & do
LISTENING = ["env", "--default-signal=INT,HUP"]
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}


def real_bin(folder: Path) -> Path:
    """A folder whose `python` is this one, and `moe` this one's."""
    return _bin(folder, "")


def stub_bin(folder: Path) -> Path:
    """The same, with stub_train.py in place of `moe.train`."""
    stub = f'exec {sys.executable} {HERE / "stub_train.py"} "${{@:4}}"'
    return _bin(folder, f'[ "${{*:1:3}}" != "-u -m moe.train" ] || {stub}\n')


def _bin(folder: Path, before: str) -> Path:
    folder.mkdir()
    executable(folder / "python", f'{before}exec {sys.executable} "$@"')
    executable(folder / "moe", f'exec {sys.executable} -m moe "$@"')
    return folder


def executable(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def write_config(out: Path, **more: Any) -> Path:
    """A run that the stub takes: of files that are not there."""
    path = out.with_suffix(".yaml")
    values = {"model": "m", "out": str(out), "data": {"train": [{"path": "p"}]}, **more}
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class Launch:
    """A started script, its output going to a file."""

    process: subprocess.Popen
    log: Path
    ended: list[int] = field(default_factory=list)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 120) -> int:
        """The exit code. A script that is late is killed, and so is all it has started."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # ranks have a session of their own: it ends them
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"late:\n{self.text}") from None

    @property
    def text(self) -> str:
        return self.log.read_text()


def start(
    arguments: list[Any], log: Path, environment: dict[str, str], cwd: Path | None = None
) -> Launch:
    with log.open("w") as file:
        process = subprocess.Popen(
            [*LISTENING, *map(str, arguments)],
            env={**os.environ, **QUIET, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )
    return Launch(process, log)


def run(arguments: list[Any], log: Path, environment: dict[str, str], **more: Any) -> Launch:
    launch = start(arguments, log, environment, **more)
    launch.ended.append(launch.wait())
    return launch


def wait_for(condition: Callable[[], Any], what: str, launch: Launch, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert launch.process.poll() is None, f"ended before {what}:\n{launch.text}"
        assert time.monotonic() < deadline, f"no {what} in time:\n{launch.text}"
        time.sleep(0.02)


def values(out: Path, rank: int) -> list[str]:
    """The steps that a stub's rank took, one line each."""
    path = out / f"values-{rank}"
    return path.read_text().splitlines() if path.exists() else []


def signals(out: Path, rank: int) -> list[str]:
    path = out / f"signals-{rank}"
    return path.read_text().splitlines() if path.exists() else []


def undisturbed(rank: int, steps: int = 20) -> list[str]:
    """What a stub's rank writes where nothing happens to it."""
    value, lines = 1, []
    for step in range(1, steps + 1):
        value = value * 6364136223846793005 % 2**64 + rank
        lines.append(f"{step} {value}")
    return lines


def answers(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def below(pid: int, name: str) -> list[psutil.Process]:
    """The processes that it has started, and these, whose command names it."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] * any(name in word for word in child.cmdline())
    return found
