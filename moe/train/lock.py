"""The lock on a run's folder: two runs in one would delete each other's files.

with lock.take(out, ranks): ...      # on every rank

The kernel gives it back when rank 0 ends, however it ends. A run that is refused before it has
written anything takes a folder that was made for it away again.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from moe.errors import UserError
from moe.parallel.world import Ranks, leave_it_to_the_first

FILE = "lock"  # in the run folder, where it stays
PATIENCE = 10.0  # seconds for a rank 0 that is ending: of ranks that start again, of a requeued job
LOOK = 0.2
HELD = (errno.EAGAIN, errno.EACCES)
MISSING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def take(out: Path, ranks: Ranks) -> contextlib.AbstractContextManager[Any]:
    """Rank 0 takes it, for all. Raises UserError where another run has it, on every rank."""
    held, refusal = None, ""
    if ranks.rank == 0:
        try:
            held = _take(out)
        except UserError as error:
            refusal = str(error)
    if refusal := ranks.gather(refusal)[0]:
        leave_it_to_the_first(ranks, UserError.exit_code)
        raise UserError(refusal)
    return _held(*held, out) if held else contextlib.nullcontext()


@contextlib.contextmanager
def _held(file: TextIOWrapper, new: bool, out: Path) -> Iterator[None]:
    with file:
        try:
            yield
        except UserError:
            if new and [path.name for path in out.iterdir()] == [FILE]:
                (out / FILE).unlink()
                out.rmdir()
            raise


def _take(out: Path) -> tuple[TextIOWrapper, bool]:
    """The file, and whether its folder is new."""
    path, end, new = out / FILE, time.monotonic() + PATIENCE, not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(
            f"out={out} cannot be written to: {path}: {error.strerror}. Choose another out, or "
            "mend it."
        ) from None
    file = os.fdopen(number, "r+")
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forks would hold it too
            break
        except OSError as error:
            if error.errno in MISSING:
                print(f"{out} is on a file system without locks ({error.strerror}): see to it "
                      "that no other run writes there", flush=True)  # fmt: skip
                break
            if error.errno not in HELD:
                raise
        if time.monotonic() > end:
            holder = _holder(file)
            file.close()
            raise UserError(
                f"another run is writing into out={out} ({holder}). Wait until it has ended, or "
                "choose another out."
            )
        time.sleep(LOOK)
    if not (path.exists() and os.path.samestat(os.fstat(number), path.stat())):
        file.close()  # its holder was refused, and has removed it
        return _take(out)
    file.truncate(0)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
    file.flush()
    return file, new


def _holder(file: TextIOWrapper) -> str:
    try:
        found = json.loads(file.read())
        return f"{found['host']}, process {found['pid']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said who it is"
