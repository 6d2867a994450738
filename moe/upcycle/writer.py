"""Executes a plan: a model folder written in bounded memory, resumable, published by rename.

Everything goes to `OUT.partial` beside OUT. A shard of the source that the plan leaves as it is
gets linked, not copied. Each finished shard is noted in a journal with its hash, so that a killed
run goes on where it was; OUT appears only when it is complete.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError

from moe.errors import Corrupt, UserError
from moe.progress import Progress
from moe.upcycle.expression import Expression, Read, num_columns, num_rows, pieces
from moe.upcycle.receipt import describe, hash_tensor
from moe.upcycle.source import (
    CODES,
    INDEX,
    JOURNAL,
    PARTIAL,
    PICKLES,
    Source,
    blocks,
    bytes_of,
    hash_file,
    read_header,
    sync,
)

SHARD_BYTES = 4 * 2**30
FLUSH_BYTES = 128 * 2**20  # the disk starts on what is written while more comes
NOT_COPIED = {*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".py"}
OWN_FILES = {"config.json", "receipt.json", "manifest.json", "calibration.png", JOURNAL}
NEW_JOURNAL = JOURNAL + ".new"
TEMPLATES = "additional_chat_templates"  # where transformers keeps all but the first

Plan = dict[str, Expression]


class Overflow(UserError):
    """What was asked for (noise, a narrower dtype) does not fit the numbers of the result."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be: linked to a source's file, or written from expressions."""

    tensors: dict[str, Expression]
    linked: Path | None

    @property
    def size(self) -> int:
        return sum(size_of(e) for e in self.tensors.values())


def size_of(expression: Expression) -> int:
    """Bytes of a tensor to be."""
    return math.prod(expression.shape) * expression.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Cast:
    """An expression in another floating dtype."""

    base: Expression
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.base.rows(start, stop).to(self.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}({self.base})"


def cast(plan: Plan, dtype: torch.dtype | None) -> Plan:
    """The plan with every floating tensor in `dtype`, where that changes anything.

    Selection biases stay in float32, as the model keeps them.
    """
    if dtype is None:
        return plan
    return {
        name: Cast(e, dtype)
        if e.dtype.is_floating_point and e.dtype != dtype and not name.endswith("selection_bias")
        else e
        for name, e in plan.items()
    }


def shards(plan: Plan, sources: list[Source]) -> list[Shard]:
    """Group the plan into files: source files left as they are first, then the rest in order."""
    untouched = {name for name, e in plan.items() if isinstance(e, Read) and e.tensor.name == name}
    result, rest = [], dict(plan)
    for source in sources:
        for tensors in source.files.values():
            if all(
                t.name in untouched and plan[t.name] == Read(t) and t.name in rest for t in tensors
            ):
                kept = {t.name: rest.pop(t.name) for t in tensors}
                result.append(Shard(kept, tensors[0].file))
    current: dict[str, Expression] = {}
    filled = 0
    for name, expression in rest.items():
        if current and filled + size_of(expression) > SHARD_BYTES:
            result.append(Shard(current, None))
            current, filled = {}, 0
        current[name] = expression
        filled += size_of(expression)
    if current:
        result.append(Shard(current, None))
    return result


def file_names(count: int) -> list[str]:
    """The customary names of `count` weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


@dataclass(slots=True)
class Written:
    """Hashes of what the writer produced: for the receipt."""

    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]


class Staging:
    """`OUT.partial`: a folder under construction, with the journal of what is finished in it."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.out = out
        self.folder = out.with_name(out.name + PARTIAL)
        self.journal: dict[str, Any] = {"fingerprint": fingerprint, "files": {}, "tensors": {}}

    def open(self) -> bool:
        """Prepare the folder; returns whether an earlier run of the same plan is continued.

        Another plan's unfinished folder is started over; one that no writer left is refused.
        """
        if self.out.exists():
            raise UserError(f"{self.out} exists. Choose another --out, or remove it.")
        with building(self):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.exists():
                if self._continues():
                    return True
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.note()
        return False

    def _continues(self) -> bool:
        """Whether the folder that is there holds the beginning of this very plan."""
        if all(p.name == NEW_JOURNAL for p in self.folder.iterdir()):
            return False  # killed before the first note
        try:
            earlier = json.loads((self.folder / JOURNAL).read_text())
            begun = earlier["fingerprint"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.folder} is in the way: the result would be built there, and it is not an "
                "unfinished result. Choose another --out, or move it."
            ) from error
        if begun != self.journal["fingerprint"]:
            print(f"{self.folder} was begun for something else: starting over", file=sys.stderr)
            return False
        self.journal = earlier
        return True

    def note(self) -> None:
        """Save the journal, all of it or none."""
        temporary = self.folder / NEW_JOURNAL
        temporary.write_text(json.dumps(self.journal))
        sync(temporary)
        temporary.replace(self.folder / JOURNAL)

    def finished(self, name: str) -> bool:
        """Whether a file was finished by an earlier run and is still what it was."""
        entry = self.journal["files"].get(name)
        path = self.folder / name
        if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        return hash_file(path) == entry["xxh3"]

    def discard(self) -> None:
        """Remove the folder under construction."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Make the finished folder appear under its name, safely on disk."""
        for path in self.folder.rglob("*"):
            sync(path)
        sync(self.folder)
        if self.out.exists():
            raise UserError(f"{self.out} appeared meanwhile; the result is in {self.folder}.")
        self.folder.rename(self.out)
        (self.out / JOURNAL).unlink()  # last: until here it says whose folder this is
        sync(self.out.parent)


def write_weights(
    plan: Plan, sources: list[Source], staging: Staging, quiet: bool = False
) -> Written:
    """Write every shard and the index into the staging folder.

    Raises UserError where the disk is full, Corrupt where a source is damaged; what is finished
    stays in the staging folder for the next run.
    """
    files = shards(plan, sources)
    names = file_names(len(files))
    todo = [(n, s) for n, s in zip(names, files, strict=True) if not staging.finished(n)]
    with building(staging):
        for name, _ in todo:  # half a file is of no use, and takes room
            (staging.folder / name).unlink(missing_ok=True)
    new_bytes = sum(s.size for _, s in todo if s.linked is None or not _same_disk(s, staging))
    free = shutil.disk_usage(staging.folder).free
    if new_bytes > free:
        if len(todo) == len(files):
            staging.discard()  # nothing in it yet
        raise UserError(
            f"{staging.out.parent} has {free / 1e9:.1f} GB free, the result needs "
            f"{new_bytes / 1e9:.1f} GB. Free some space, or choose another --out."
        )
    with (
        building(staging),
        Progress("write", sum(s.size for _, s in todo), "B", quiet) as progress,
    ):
        for name, shard in todo:
            path = staging.folder / name
            if shard.linked is None:
                entry, tensors = write_shard(path, shard.tensors, progress)
            else:
                entry, tensors = _link(path, shard.linked, progress)
            staging.journal["files"][name] = entry
            staging.journal["tensors"].update(tensors)
            staging.note()
        if len(files) > 1:
            _write_index(staging.folder / INDEX, files, names)
    return Written(
        {n: staging.journal["files"][n] for n in names},
        {n: staging.journal["tensors"][n] for n in plan},
    )


@contextlib.contextmanager
def building(staging: Staging) -> Iterator[None]:
    """A full or read-only disk in one line; nothing is kept of what can never be finished."""
    try:
        yield
    except (Corrupt, Overflow):
        staging.discard()
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{staging.out}: {error.filename} is not a folder.") from error
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise UserError(
                f"{staging.folder}: {os.strerror(code).lower()}. Nothing was published; run "
                "the same command again when there is room, and it goes on with the next file."
            ) from error
        raise


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors keeps it in its text
    return int(found[1]) if found else None


def write_shard(
    path: Path, tensors: dict[str, Expression], progress: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """One safetensors file from expressions, block by block; returns its hash and its tensors'."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, e in tensors.items():
        size = size_of(e)
        header[name] = {
            "dtype": CODES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, entries = xxhash.xxh3_128(), {}
    with path.open("wb") as file, ThreadPoolExecutor(2) as pool:
        start = len(text).to_bytes(8, "little") + text
        digest.update(start)
        pending = pool.submit(file.write, start)
        flushing, flushed = pool.submit(os.fdatasync, file.fileno()), 0
        for name, e in tensors.items():
            own = xxhash.xxh3_128()
            for first, last in blocks(num_rows(e.shape), num_columns(e.shape), e.dtype):
                for piece in pieces(e, first, last):
                    _require_finite(name, piece)
                    data = bytes_of(piece)
                    pending.result()  # one block is written while the next is read and hashed
                    if flushing.done() and file.tell() - flushed > FLUSH_BYTES:
                        flushing, flushed = pool.submit(os.fdatasync, file.fileno()), file.tell()
                    pending = pool.submit(file.write, data)
                    digest.update(data)
                    own.update(data)
                    progress.advance(data.nbytes)
            dtype = str(e.dtype).removeprefix("torch.")
            entries[name] = {"xxh3": own.hexdigest(), "dtype": dtype, "shape": list(e.shape)}
        pending.result()
        file.flush()
        os.fsync(file.fileno())
    return {"xxh3": digest.hexdigest(), "bytes": path.stat().st_size}, entries


def _require_finite(name: str, block: torch.Tensor) -> None:
    if block.is_floating_point() and not block.sum().isfinite() and not block.isfinite().all():
        raise Overflow(
            f"{name} would hold values that are not finite. Use a smaller --diversify noise, or "
            "--dtype float32."
        )


def _same_disk(shard: Shard, staging: Staging) -> bool:
    assert shard.linked is not None
    return shard.linked.stat().st_dev == staging.folder.stat().st_dev


def _link(
    path: Path, source: Path, progress: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The source's file under another name; a copy where the file systems differ."""
    real = source.resolve()  # hub caches hold links to blobs
    try:
        os.link(real, path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(real, path)
    entries = {}
    for name, tensor in read_header(source).items():  # an error in it is to name the source
        entries[name] = describe(tensor, hash_tensor(tensor))
        progress.advance(tensor.size)
    return {"xxh3": hash_file(path), "bytes": path.stat().st_size}, entries


def _write_index(path: Path, files: list[Shard], names: list[str]) -> None:
    places = zip(names, files, strict=True)
    index = {
        "metadata": {"total_size": sum(s.size for s in files)},
        "weight_map": {tensor: name for name, s in places for tensor in sorted(s.tensors)},
    }
    path.write_text(json.dumps(index, indent=1) + "\n")


def copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer, chat templates, generation config, licence: all that is not weights or ours."""
    for path in sorted([*source.iterdir(), *source.glob(f"{TEMPLATES}/*.jinja")]):
        if path.is_file() and path.suffix not in NOT_COPIED and path.name not in OWN_FILES:
            if path.name.endswith(".index.json"):  # of weights in another format
                continue
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def fingerprint(value: Any) -> str:
    """A hash of anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
