"""Saving, finding and reading checkpoints: safetensors pieces, published by rename, never pickled.

    save(out, 100, entries, progress, gather, side_files)    # every rank calls it
    with Reader(latest(out)) as checkpoint: checkpoint.load(entries)
    for name, tensor in weights(folder): ...                 # no process group needed

Each rank writes the blocks it holds into one safetensors file. A tensor can be read back in any
other division, so ranks may come and go between runs. A file is read only where its hash is what
the manifest says. (torch's own distributed checkpoint keeps its
metadata in a pickle, which is never loaded here.)
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe.checkpoint.manifest import NAME, PARTIAL, Manifest, Piece, TensorRecord, is_complete
from moe.errors import Corrupt, UserError
from moe.upcycle.source import hash_file, sync

FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d+)")
Gather = Callable[[Any], list[Any]]


class Entry(Protocol):
    """One tensor of an engine's state (moe.engines.base.Entry)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Any: ...
    @property
    def tensor(self) -> Tensor: ...
    def put(self, tensor: Tensor) -> None: ...


def save(
    out: Path,
    step: int,
    entries: Iterable[Entry],
    progress: dict[str, Any],
    rank: int,
    gather: Gather,
    side_files: Callable[[Path], None],
) -> Path:
    """Write `out/checkpoints/step-N`, complete or not at all; called by every rank.

    `progress` of rank 0 is what the run resumes from; `side_files` puts config and tokenizer into
    the folder; `gather` brings every rank's value to every rank. Raises UserError where the disk
    does not take it.
    """
    target = out / FOLDER / f"step-{step}"
    partial = target.with_name(target.name + PARTIAL)
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        gather(None)  # the folder is there
        records, file = _write_pieces(partial, rank, entries)
        gathered = gather((records, {file.name: _describe(file)}))
        if rank == 0:
            side_files(partial)
            tensors = _merge([records for records, _ in gathered])
            files = {name: d for _, described in gathered for name, d in described.items()}
            _publish(partial, target, Manifest(tensors=tensors, files=files, progress=progress))
        gather(None)  # it is published
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target} cannot be written: {error}. Start the run again once that is mended."
        ) from error
    return target


def _publish(partial: Path, target: Path, manifest: Manifest) -> None:
    """Describe what else is in the folder, force everything to disk, give it its name."""
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        name = str(path.relative_to(partial))
        if name not in manifest.files:
            manifest.files[name] = _describe(path)
    manifest.write(partial)
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    _remove(target)  # the same step, of a run that went on from an older one
    partial.rename(target)
    sync(target.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, or what is left of one: invisible before it is incomplete."""
    if folder.exists():
        (folder / NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _describe(path: Path) -> dict[str, Any]:
    return {"xxh3": hash_file(path), "bytes": path.stat().st_size}


def _write_pieces(
    folder: Path, rank: int, entries: Iterable[Entry]
) -> tuple[dict[str, TensorRecord], Path]:
    file = folder / f"rank-{rank:05}.safetensors"
    tensors, records = {}, {}
    for entry in entries:
        key = f"{entry.kind}/{entry.name}"
        tensor = entry.tensor  # an engine may have to put it together
        local, offset, ours = _block(tensor, rank)
        pieces: tuple[Piece, ...] = ()
        if ours and local.numel():
            # a copy, so that tied or viewed storage is written once per name and contiguous
            tensors[key] = local.detach().cpu().clone(memory_format=torch.contiguous_format)
            pieces = (Piece(file.name, key, offset, tuple(local.shape)),)
        dtype = str(tensor.dtype).removeprefix("torch.")
        records[key] = TensorRecord(entry.kind, dtype, tuple(tensor.shape), pieces)
    tensors["rng"] = torch.get_rng_state()
    save_file(tensors, file)
    file.chmod(0o666 & ~_umask())
    return records, file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _block(tensor: Tensor, rank: int) -> tuple[Tensor, tuple[int, ...], bool]:
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


def _merge(ranks: list[dict[str, TensorRecord]]) -> dict[str, TensorRecord]:
    merged = {}
    for key, record in ranks[0].items():
        pieces = tuple(piece for records in ranks for piece in records[key].pieces)
        merged[key] = TensorRecord(record.kind, record.dtype, record.shape, pieces)
    return merged


def steps(out: Path) -> list[tuple[int, Path]]:
    """Published checkpoints of a run, oldest first."""
    found = []
    for path in (out / FOLDER).glob("step-*"):
        match = _STEP.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match[1]), path))
    return sorted(found)


def latest(out: Path) -> Path | None:
    """The newest published checkpoint of a run."""
    found = steps(out)
    return found[-1][1] if found else None


def retain(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed runs have left."""
    kept = {path for _, path in steps(out)[-keep:]}
    for path in (out / FOLDER).glob("step-*"):
        if _STEP.fullmatch(path.name.removesuffix(PARTIAL)) and path not in kept:
            _remove(path)


class Reader:
    """An open checkpoint. Raises Corrupt where a file it reads is not what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            if problem := _damage(self.folder, name, self.manifest):
                raise Corrupt(f"{problem} Resume from another checkpoint.")
            file = safe_open(self.folder / name, framework="pt")
            self._files[name] = self._stack.enter_context(file)
        return self._files[name]

    def block(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """`shape` values from `offset` of a tensor, put together from the pieces they lie in."""
        record = self.manifest.tensors[key]
        result = torch.empty(shape, dtype=getattr(torch, record.dtype))
        if not shape:
            (piece,) = record.pieces
            return self._open(piece.file).get_tensor(piece.key)
        for piece in record.pieces:
            low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, piece.offset, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(
                slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset, strict=True)
            )
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            result[target] = self._open(piece.file).get_slice(piece.key)[source]
        return result

    def load(self, entries: Iterable[Entry]) -> None:
        """Fill every tensor of a state, whatever its division. Raises UserError where the
        checkpoint and the state do not hold the same tensors.
        """
        wanted = {f"{e.kind}/{e.name}": e for e in entries}
        stored = self.manifest.tensors
        if wanted.keys() != stored.keys():
            missing, extra = sorted(wanted.keys() - stored), sorted(stored.keys() - wanted.keys())
            raise UserError(
                f"{self.folder} and the model differ: {len(missing)} tensors are not in the "
                f"checkpoint {missing[:2]}, {len(extra)} are not in the model {extra[:2]}. Was "
                "train.trainable or the model changed? Use train.resume=never to start over."
            )
        for key, entry in wanted.items():
            tensor = entry.tensor
            if tuple(tensor.shape) != stored[key].shape:
                raise UserError(
                    f"{self.folder}: {key} is {stored[key].shape}, "
                    f"the model's {tuple(tensor.shape)}."
                )
            local, offset, _ = _block(tensor, 0)
            if local.numel():
                with torch.no_grad():
                    local.copy_(self.block(key, offset, tuple(local.shape)))
            entry.put(tensor)

    def random_state(self, rank: int) -> Tensor | None:
        """The generator state that this rank saved; None where it did not exist then."""
        name = f"rank-{rank:05}.safetensors"
        return self._open(name).get_tensor("rng") if name in self.manifest.files else None


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a checkpoint under the model's names, whole, one at a time."""
    with Reader(folder) as checkpoint:
        for key, record in checkpoint.manifest.tensors.items():
            if record.kind in ("parameter", "buffer"):
                start = (0,) * len(record.shape)
                yield key.split("/", 1)[1], checkpoint.block(key, start, record.shape)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a published training checkpoint."""
    return is_complete(folder)


def check(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence each, naming the file and its tensors."""
    try:
        manifest = Manifest.read(folder)
    except Corrupt as error:
        return [str(error)]
    return [p for p in (_damage(folder, name, manifest) for name in manifest.files) if p]


def _damage(folder: Path, name: str, manifest: Manifest) -> str | None:
    path, entry = folder / name, manifest.files[name]
    held = [k for k, r in manifest.tensors.items() if any(p.file == name for p in r.pieces)]
    tensors = f", which holds {len(held)} tensors such as {held[0]}" if held else ""
    if not path.is_file():
        return f"{path}{tensors}: missing."
    if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["xxh3"]:
        return f"{path}{tensors}: not the bytes that were written."
    return None


def progress_of(folder: Path) -> dict[str, Any]:
    """Where the run stood that wrote a checkpoint."""
    return Manifest.read(folder).progress
