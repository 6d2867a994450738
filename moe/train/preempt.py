"""Preemption: a signal or a time limit ends a run at its next step, saved, with exit code 85.

    watch()                                    # the first thing that a process does
    preemption = Preemption(out, ranks, limit)
    if ranks.any(preemption.asked): ...        # save, then
    preemption.leave(step)                     # OUT/preempted, and Preempted on every rank

Schedulers signal with SIGTERM or SIGUSR1 before they kill. Ranks must agree at which step they end,
or they would wait for one another: a signal is only ever looked for, at points that all reach.
The scripts of launch/ leave what they got in a file: for ranks of every node, begun or not.
"""

import contextlib
import json
import os
import signal
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moe.errors import Preempted

if TYPE_CHECKING:
    from moe.parallel.world import Ranks

MARKER = "preempted"  # in the run folder
LAUNCHER = "MOE_LAUNCHER_STATE"  # the environment's name for the folder of launch/*.sh
SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1})
_received: list[str] = []
_watching = threading.Event()


class Launcher:
    """The script of launch/ that started this rank, and keeps a folder for it and its peers.

    It writes the signal that it has got into `signal`, and holds the FIFO `alive` open while it
    lives: a kernel tells that of a killed one too.
    """

    def __init__(self, folder: Path) -> None:
        self.signal = folder / "signal"
        self.fifo: int | None = None
        with contextlib.suppress(OSError):
            self.fifo = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)
        if self.fifo is not None and not self._alive():  # it holds it on another node
            os.close(self.fifo)
            self.fifo = None

    def _alive(self) -> bool:
        try:
            return self.fifo is None or os.read(self.fifo, 1) != b""
        except BlockingIOError:  # nothing to read, yet somebody could write
            return True

    @property
    def reason(self) -> str:
        """Why its ranks are to end; empty where they are not."""
        with contextlib.suppress(OSError):
            if text := self.signal.read_text().strip():
                return text
        return "" if self._alive() else "lost launcher"


_launchers: list[Launcher] = []


def watch() -> None:
    """From now on SIGTERM and SIGUSR1 wait until they are looked for, however often they come."""
    if LAUNCHER in os.environ and not _launchers:
        _launchers.append(Launcher(Path(os.environ[LAUNCHER])))
    for number in SIGNALS:
        signal.signal(number, lambda given, _: _received.append(signal.Signals(given).name))
    _watching.set()
    _block()


def _block() -> None:
    # Processes that are started inherit this: compilers outlive a signal that goes to the whole
    # group, which is how torchrun sends it. multiprocessing's resource tracker unblocks SIGTERM
    # when it starts; hence the handlers, and blocking again.
    if _watching.is_set():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class Preemption:
    """What ends a run before its last step. One per rank; `limit` in seconds from now, which none
    that has not `stepped` obeys: runs that are started again and again would get nowhere.
    """

    def __init__(self, out: Path, ranks: "Ranks", limit: float | None = None) -> None:
        self.out, self.ranks, self.limit = out, ranks, limit
        self.end = None if limit is None else time.monotonic() + limit
        self.stepped = False
        if ranks.rank == 0:
            (out / MARKER).unlink(missing_ok=True)

    @property
    def reason(self) -> str:
        """What has asked this rank to end; empty where nothing has."""
        if self.stepped and self.end is not None and time.monotonic() >= self.end:
            return f"train.time_limit={self.limit:g}"
        pending = []
        if _watching.is_set():
            pending = sorted(signal.Signals(n).name for n in signal.sigpending() & SIGNALS)
            _block()
        return (_received or pending or [launcher.reason for launcher in _launchers] or [""])[0]

    @property
    def asked(self) -> bool:
        """Whether this rank has been asked to end."""
        return bool(self.reason)

    def leave(self, step: int) -> NoReturn:
        """Mark the run folder and raise Preempted, on every rank, once all are done with saving."""
        reasons = self.ranks.gather(self.reason)
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text)
        if len(reasons) > 1 and not all(reasons):
            reason += f" on rank {rank}"
        message = f"{reason} at step {step}. Start the run again, and it goes on from there."
        if self.ranks.rank == 0:
            from moe.checkpoint.disk import replace_file  # nothing slow before signals are watched
            from moe.train.events import note

            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.out.mkdir(parents=True, exist_ok=True)
            marker = {"step": step, "reason": reason, "time": now}
            replace_file(self.out / MARKER, json.dumps(marker) + "\n")
            note(self.out, step, "preempted", reason=reason)
        self.ranks.barrier()  # a launcher kills all ranks as soon as one has ended
        raise Preempted(message if self.ranks.rank == 0 else "")
