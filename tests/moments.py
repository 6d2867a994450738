"""Real ranks that wait at a chosen moment of a run until they are let go, or die there.

    with Ranks(config_file, folder, moment="step", size=2) as ranks:
        ranks.wait_until_there()
        ranks.signal([1], signal.SIGTERM)
        ranks.let_go()
        ends = ranks.finish()          # [(exit code, stdout, stderr), ...]

They come out of one process that has everything imported, since that is most of a start; and they
run what `python -m moe.train` runs.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self
from unittest import mock

TESTS = Path(__file__).parent
PRELOADED = ["moments", "moe.train.command", "moe.train.loop", "moe.data.packed"]
LET_GO = "let go"


def rank(arguments: list[str], folder: Path, moment: str, place: dict[str, str]) -> None:
    """One rank, from its first line on: the target of a process."""
    os.environ.update(place)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name} {place['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv = ["moe.train", *arguments]
    import torch

    from moe.train.__main__ import main

    torch.set_num_threads(1)
    if moment:
        arrange(moment, folder, int(place["RANK"]))
    main()


def arrange(moment: str, folder: Path, number: int) -> None:
    """Have this process wait at the moment; with `kill` before its name, die there."""
    *how, name = moment.split(" ", 1)

    def reached() -> None:
        if how == ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / f"at {number}").touch()
        while not (folder / LET_GO).exists():
            time.sleep(0.01)

    patch(name, reached)


def patch(name: str, reached: Any) -> None:
    """Call `reached` where a run comes to the moment of this name for the first time."""
    import torch

    from moe import engines
    from moe.train import command, loop, preempt

    losses, calls = loop.token_losses, {True: 0, False: 0}

    def token_losses(*given: Any) -> Any:
        training = torch.is_grad_enabled()
        calls[training] += 1
        if (training and name == "step" and calls[True] == 3) or (
            not training and name == "validation" and calls[False] == 2
        ):
            reached()
        return losses(*given)

    def first(place: Any, attribute: str, number: int = 1) -> None:
        right, called = getattr(place, attribute), []

        def wrapped(*given: Any, **named: Any) -> Any:
            called.append(1)
            if len(called) == number:
                reached()
            return right(*given, **named)

        mock.patch.object(place, attribute, wrapped).start()

    match name:
        case "import":
            first(command, "load")
        case "build":
            first(engines, "build")
        case "data":
            first(loop.Batches, "__next__", number=3)
        case "save":
            first(loop.Run, "_side_files")
        case "unwatched":
            mock.patch.object(preempt, "watch").start()
            first(engines, "build")
        case "step 3":
            first(loop.Run, "train_step", number=3)
        case "evaluation":
            from moe.evals import live

            first(live.Live, "__call__", number=3)
        case "step" | "validation":
            mock.patch.object(loop, "token_losses", token_losses).start()
        case _:
            raise ValueError(name)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """Processes of one run. Leaving the block kills those that are left."""

    def __init__(
        self, config: Path, folder: Path, *overrides: str, moment: str = "", size: int = 2
    ) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True)
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        given = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(size),
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
        }
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
            self.processes = []
            for number in range(size):
                place = {**given, "RANK": str(number), "LOCAL_RANK": str(number)}
                arguments = [str(config), *overrides]
                process = context.Process(target=rank, args=(arguments, folder, moment, place))
                process.start()
                self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait_until_there(self, *ranks: int, timeout: float = 60.0) -> None:
        """Until these ranks (all) have reached their moment."""
        wanted = [self.folder / f"at {r}" for r in ranks or range(self.size)]
        deadline = time.monotonic() + timeout
        while not all(path.exists() for path in wanted):
            ended = [p.exitcode for p in self.processes if p.exitcode is not None]
            assert not ended, (ended, self.said())
            assert time.monotonic() < deadline, "the moment has not come"
            time.sleep(0.01)

    def signal(self, ranks: list[int], number: signal.Signals) -> None:
        """To those of these ranks that have not ended."""
        for index in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[index].pid, number)

    def let_go(self) -> None:
        (self.folder / LET_GO).touch()

    def said(self) -> list[tuple[str, str]]:
        """Standard output and error of each rank so far; it may be killed before it has any."""
        paths = [[self.folder / f"{name} {r}" for name in ("out", "err")] for r in range(self.size)]
        return [tuple(p.read_text() if p.exists() else "" for p in pair) for pair in paths]

    def finish(self, timeout: float = 60.0) -> list[tuple[int, str, str]]:
        """How each rank has ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, ("late", self.said())
        return [
            (process.exitcode, *said)
            for process, said in zip(self.processes, self.said(), strict=True)
        ]
