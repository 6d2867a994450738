"""Runs a function on N gloo ranks, each a fresh process, and brings back what every rank returned.

    losses = run_ranks(train_two_steps, 2, tmp_path)   # [rank 0's result, rank 1's result]

`train_two_steps` is a top-level function of an importable module: the ranks import it by name.
"""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} {reason}")
        self.rank = rank


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; return the results in rank order.

    Arguments and results travel by pickle. Rendezvous is a file, so tests never share a port.
    Raises RankFailed with the first rank that raised or died, or that is late after `timeout`
    seconds; the other ranks are killed.
    """
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, ranks = {}, []
        try:
            for rank in range(world_size):
                receiver, sender = spawn.Pipe(duplex=False)
                place = (rank, world_size, Path(folder) / "rendezvous", timeout)
                process = spawn.Process(target=_rank, args=(sender, place, function, args))
                process.start()
                sender.close()  # ours: a rank that dies must close its pipe
                pipes[receiver] = rank
                ranks.append(process)
            return _collect(pipes, ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(pipes: dict[Any, int], ranks: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(waiting.values())
            raise RankFailed(late[0], f"has not returned in time; late ranks: {late}")
        failures = []
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                failed_at, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(timeout=10)
                failed_at, value = time.monotonic(), f"died, exit code {ranks[rank].exitcode}"
            if failed_at is None:
                results[rank] = value
            else:
                failures.append((failed_at, rank, value))
        if failures:  # a rank that fails takes its peers' connections down: the first is the cause
            _, rank, reason = min(failures)
            raise RankFailed(rank, reason)
    return [results[rank] for rank in range(len(ranks))]


def _rank(
    sender: Any, place: tuple[int, int, Path, float], function: Callable[..., Any], args: Any
) -> None:
    rank, world_size, rendezvous, timeout = place
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        sender.send_bytes(pickle.dumps((None, function(*args))))
    except BaseException:
        sender.send_bytes(pickle.dumps((time.monotonic(), f"raised:\n{traceback.format_exc()}")))
    else:
        distributed.barrier()  # peers may still be talking to this rank
        distributed.destroy_process_group()
