"""The ranks of a run: who we are, on which device, and the few collectives that training needs.

with world() as ranks:        # torchrun's environment, or a single process
    total = ranks.sum(count)
"""

import atexit
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import MoeError, SaidElsewhere, UserError

# what torch says where a peer is gone or silent: gloo and NCCL have no error type for it
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out|Broken pipe")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers.

    `tensor` neighbours each see the same batch: what depends on a batch goes by `data_rank`.
    """

    rank: int
    size: int
    device: torch.device
    tensor: int = 1

    def split(self, tensor: int) -> "Ranks":
        """The same ranks, `tensor` neighbours sharing a batch."""
        return replace(self, tensor=tensor)

    @property
    def data_rank(self) -> int:
        """Which share of each global batch is ours."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    def sum(self, tensor: Tensor, every: int = 0) -> Tensor:
        """Sum over all batches, in place: of ranks that share one, the first counts. The last
        `every` values of a vector are summed over all ranks.
        """
        if self.rank % self.tensor:
            (tensor[:-every] if every else tensor).zero_()
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device), every=1).item())

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def mesh(self, replicate: int, tensor: int = 1) -> DeviceMesh:
        """Ranks as [replicate, shard, tensor]: copies of the model, ranks that share one, and those
        that compute a part of each layer. The last talk most, so they are neighbours.
        """
        shape = (replicate, self.size // replicate // tensor, tensor)
        names = ("replicate", "shard", "tensor")
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def expert_mesh(self, expert: int) -> DeviceMesh:
        """Ranks as [shard, expert]: those that hold the same experts, and those that share a set.

        Neighbours share a set, for they are likely to be on one node.
        """
        shape = (self.size // expert, expert)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("shard", "expert"))


def launched(name: str, alone: int) -> int:
    """What a launcher says in the environment, else `alone`. Raises UserError over no number."""
    text = os.environ.get(name, str(alone))
    if not text.isdecimal():
        raise UserError(
            f"{name}={text!r} is no whole number: torchrun sets it. Unset it to run one process."
        )
    return int(text)


@contextlib.contextmanager
def world(timeout: float = 1800.0, again: str = "start the same command again") -> Iterator[Ranks]:
    """Join the process group that torchrun describes; alone, make a group of one. No rank waits
    for another longer than `timeout` seconds; `again` says what to do where one is lost.

    NCCL on GPUs, gloo on CPUs. The group of one lets a single process shard over itself, so that
    one code path serves one process and many.
    """
    size, rank = launched("WORLD_SIZE", 1), launched("RANK", 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launched("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    joined = distributed.is_initialized()  # by a test harness, or an engine's own launcher
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if joined:
            size, rank = distributed.get_world_size(), distributed.get_rank()
        elif size > 1:
            distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        else:
            store = distributed.HashStore()
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        yield Ranks(rank, size, device)
    except RuntimeError as error:
        if size == 1 or not LOST.search(str(error)):
            raise
        raise MoeError(
            f"another of the {size} ranks is gone, or was silent for {timeout:g} s: "
            f"{str(error).strip().splitlines()[0]}. What ended it is in its own output; {again}."
        ) from error
    finally:
        if not joined and distributed.is_initialized():
            distributed.destroy_process_group()


def say_once(ranks: Ranks, check: Callable[..., Any], *arguments: Any) -> Any:
    """What `check` returns. What it refuses is refused alike on every rank, and rank 0 says it."""
    try:
        return check(*arguments)
    except MoeError as error:
        leave_it_to_the_first(ranks, error.exit_code)
        raise


def by_first(ranks: Ranks, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` returns on rank 0, None on others. What it refuses there ends all of them."""
    made, refused = None, None
    if ranks.rank == 0:
        try:
            made = make(*arguments)
        except UserError as error:
            refused = error
    if ranks.any(refused is not None):
        leave_it_to_the_first(ranks, UserError.exit_code)
        assert refused is not None
        raise refused
    return made


def leave_it_to_the_first(ranks: Ranks, exit_code: int) -> None:
    """End this rank in silence, unless it is the first: that one goes on to say why."""
    if ranks.rank:
        time.sleep(1.0)  # a launcher ends all ranks with the first: rank 0 has its say before
        raise SaidElsewhere(exit_code)


def end(code: int) -> NoReturn:
    """End this process with everything written, and without taking the interpreter down.

    gloo's threads outlive their group (torch 2.13), and one that drops the last reference to a
    Python object meanwhile aborts the process; seen, rarely, on busy machines.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or the reader has gone
            stream.flush()
    os._exit(code)
