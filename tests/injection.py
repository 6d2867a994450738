"""Faults at the n-th call that changes a folder, by wrapping os: the product knows nothing of it.

with inject(folder, kill_at(7)): ...             # in a child
with inject(folder, calls.append): ...           # only looks
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import dill

from moe.parallel import world

WRAPPED = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True)
class Call:
    """The n-th call: which function, of which file below the folder, how many bytes."""

    number: int
    function: str
    path: str
    size: int = 0


class Half(Exception):
    """Of a write: do the first half of it, then die."""


@contextlib.contextmanager
def inject(folder: Path, act: Callable[[Call], Any]) -> Iterator[None]:
    """Call `act` before each call that changes something below `folder`; what it raises is what the
    call raises.
    """
    count, lock, root = 0, threading.Lock(), str(folder.resolve())

    def place(arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
        first = arguments[0]
        if isinstance(first, int):
            return os.readlink(f"/proc/self/fd/{first}")
        path = os.fspath(first)
        if options.get("dir_fd") is not None:
            return os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
        return os.path.abspath(path)

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            path = place(arguments, options)
            looks = name == "open" and not arguments[1] & os.O_CREAT
            if looks or not path.startswith(root):
                return real(*arguments, **options)
            size = len(arguments[1]) if name == "write" else 0
            with lock:
                call = Call(count, name, os.path.relpath(path, root), size)
                count += 1
                try:
                    act(call)
                except Half:
                    if name == "write":
                        real(arguments[0], arguments[1][: size // 2])
                    die()
            return real(*arguments, **options)

        return wrapped

    with contextlib.ExitStack() as stack:
        for name in WRAPPED:
            wrapped = wrap(name, getattr(os, name))
            stack.enter_context(mock.patch.object(os, name, wrapped))
        yield


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def kill_at(number: int, half: bool = False) -> Callable[[Call], None]:
    """Die by SIGKILL before the n-th call, or in the middle of it."""

    def act(call: Call) -> None:
        if call.number == number:
            if half:
                raise Half
            die()

    return act


def fail_after(size: int, errno: int) -> Callable[[Call], None]:
    """A disk that takes so many bytes and no more."""
    left = size

    def act(call: Call) -> None:
        nonlocal left
        left -= call.size
        if left < 0 and (call.function == "write" or errno != 28):
            raise OSError(errno, os.strerror(errno), call.path)

    return act


def fork(children: list[Callable[[], Any]], timeout: float = 120.0) -> list[int]:
    """Run each function in a process of its own; the wait statuses, in order.

    As launchers do, all are killed when one is.
    """
    pids = []
    for child in children:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child()
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                code = getattr(error, "exit_code", 1)
            finally:
                os._exit(code)
        pids.append(pid)
    found: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(found) < len(pids):
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = status
        late = time.monotonic() > end
        if late or any(os.WIFSIGNALED(status) for status in found.values()):
            for pid in set(pids) - found.keys():
                os.kill(pid, signal.SIGKILL)
                found[pid] = os.waitpid(pid, 0)[1]
            assert not late, "processes have not ended in time"
        time.sleep(0.01)
    return [found[pid] for pid in pids]


def fresh(children: list[Callable[[], Any]], timeout: float = 180.0) -> list[int]:
    """As `fork`, in processes that know nothing of this one: torch keeps what it learnt of process
    groups that are gone, and a fork would go by that.
    """
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_call, args=(dill.dumps(c, recurse=True),)) for c in children]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + timeout
    while any(rank.is_alive() for rank in ranks):
        late = time.monotonic() > end
        if late or any((rank.exitcode or 0) < 0 for rank in ranks):
            for rank in ranks:
                rank.kill()
                rank.join()
            assert not late, "processes have not ended in time"
        time.sleep(0.02)
    return [-r.exitcode if (r.exitcode or 0) < 0 else (r.exitcode or 0) << 8 for r in ranks]


def _call(child: bytes) -> None:
    code = 0
    try:
        dill.loads(child)()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = getattr(error, "exit_code", 1)
    world.end(code)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def as_rank(rank: int, size: int, port: str) -> None:
    """Be one of several ranks: for world()."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
