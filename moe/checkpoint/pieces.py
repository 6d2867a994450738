"""What one rank holds of a state: copied at one moment, written into one safetensors file.

snapshot = take(entries, rank, buffers)          # in the step
records = write(folder / file_name(rank), snapshot)      # later, while training goes on
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe.checkpoint.disk import CHUNK_BYTES, write_file
from moe.checkpoint.manifest import FileRecord, Piece, TensorRecord
from moe.upcycle.source import CODES, bytes_of

Buffers = dict[str, Tensor]


class Entry(Protocol):
    """One tensor of an engine's state (moe.engines.base.Entry)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Any: ...
    @property
    def tensor(self) -> Tensor: ...
    def put(self, tensor: Tensor) -> None: ...


@dataclass(slots=True)
class Held:
    """A tensor of the state: of which this rank has `block` from `offset`, or nothing to write."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    block: Tensor | None


@dataclass(slots=True)
class Snapshot:
    """The tensors of one rank by `kind/name`; on a GPU the copies are there when `copied` is."""

    held: dict[str, Held]
    copied: Any = None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def file_name(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def take(entries: Iterable[Entry], rank: int, buffers: Buffers) -> Snapshot:
    """Copy what this rank is to write into `buffers`, which grow as needed and are used again.

    On a GPU the copies follow the kernels that are under way, and whatever is queued later follows
    them: the step does not wait.
    """
    snapshot = Snapshot({})
    for entry in entries:
        tensor = entry.tensor  # an engine may have to put it together
        local, offset, ours = block_of(tensor, rank)
        key, shape = f"{entry.kind}/{entry.name}", tuple(tensor.shape)
        copy = _copy(key, local.detach(), buffers) if ours and local.numel() else None
        snapshot.held[key] = Held(entry.kind, tensor.dtype, shape, offset, copy)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
        snapshot.copied = torch.cuda.Event()
        snapshot.copied.record()
    for device, state in generators.items():
        key = random_key(rank, device)
        snapshot.held[key] = Held("rng", state.dtype, tuple(state.shape), (0,), state)
    return snapshot


def random_key(rank: int, device: str) -> str:
    """Under which name the state of a rank's random generator is kept."""
    return f"rng/{device}-{rank:05}"


def _copy(key: str, local: Tensor, buffers: Buffers) -> Tensor:
    buffer = buffers.get(key)
    if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
        pinned = local.device.type == "cuda"
        buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
        buffers[key] = buffer
    return buffer.copy_(local, non_blocking=True)


def block_of(tensor: Tensor, rank: int) -> tuple[Tensor, tuple[int, ...], bool]:
    """This rank's part of a tensor, where it begins, and whether this rank is to write it.

    Of equal replicas only the first writes.
    """
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim, rank == 0
    mesh, placements = tensor.device_mesh, tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    first = all(
        c == 0 for c, p in zip(coordinate, placements, strict=True) if isinstance(p, Replicate)
    )
    return tensor.to_local(), tuple(offset), first


def write(
    path: Path, snapshot: Snapshot, proceed: Callable[[], None] = lambda: None
) -> tuple[dict[str, TensorRecord], FileRecord]:
    """One safetensors file, on disk when this returns, each byte hashed on its way there.

    `proceed` is called between blocks, and may raise. Returns the records of this rank.
    """
    held = snapshot.held
    # widest values first, so that all begin where their dtype may
    order = sorted(
        (k for k, h in held.items() if h.block is not None), key=lambda k: -held[k].dtype.itemsize
    )
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for key in order:
        block = held[key].block
        assert block is not None
        header[key] = {
            "dtype": CODES[block.dtype],
            "shape": list(block.shape),
            "data_offsets": [offset, offset + block.nbytes],
        }
        offset += block.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    digests: dict[str, str] = {}

    def parts(pool: Executor) -> Iterator[bytes | memoryview]:
        yield start
        for key in order:
            block, digest = held[key].block, xxhash.xxh3_128()
            assert block is not None
            view = bytes_of(block.flatten())
            for at in range(0, len(view), CHUNK_BYTES):
                proceed()
                hashed = pool.submit(digest.update, view[at : at + CHUNK_BYTES])
                yield view[at : at + CHUNK_BYTES]  # which is written meanwhile
                hashed.result()
            digests[key] = digest.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        write_file(path, parts(pool))
    records = {}
    for key, h in held.items():
        pieces: tuple[Piece, ...] = ()
        if h.block is not None:
            at = len(start) + header[key]["data_offsets"][0]
            pieces = (Piece(path.name, h.offset, tuple(h.block.shape), at, digests[key]),)
        dtype = str(h.dtype).removeprefix("torch.")
        records[key] = TensorRecord(h.kind, dtype, h.shape, pieces)
    entry = FileRecord(len(start) + offset, len(start), xxhash.xxh3_128_hexdigest(start))
    return records, entry


def merge(ranks: list[dict[str, TensorRecord]]) -> dict[str, TensorRecord]:
    """The records of every rank as those of the whole."""
    merged: dict[str, TensorRecord] = {}
    for records in ranks:
        for key, record in records.items():
            earlier = merged[key].pieces if key in merged else ()
            merged[key] = TensorRecord(
                record.kind, record.dtype, record.shape, (*earlier, *record.pieces)
            )
    return merged
