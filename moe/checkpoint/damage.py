"""Whether the bytes of a checkpoint are those that were written: which file, which tensors.

for damage in check(folder): print(damage)
found = newest_sound(out)                     # a folder, and what is wrong with newer ones
"""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moe.checkpoint.folders import steps
from moe.checkpoint.manifest import NAME, Manifest, inside
from moe.errors import Corrupt, UserError

SHOWN = 3  # names of tensors in a line
CHANGED = "not the bytes that were written"
BLOCK_BYTES = 16 * 2**20
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a file of a checkpoint, and which tensors it hurts."""

    file: Path
    what: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.tensors[:SHOWN])
        more = len(self.tensors) - SHOWN
        shown += f" and {more} more tensors" if more > 0 else ""
        return f"{self.file}: {self.what}" + (f": {shown}" if shown else "")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file with a hash of their own: a tensor's piece, or (None) what stands before."""

    file: str
    tensor: str | None
    start: int
    size: int
    xxh3: str


def stretches(manifest: Manifest) -> list[Stretch]:
    """Every byte of a checkpoint but the manifest's, once, in an order that all ranks share."""
    found = [Stretch(n, None, 0, f.header, f.xxh3) for n, f in manifest.files.items()]
    found += [
        Stretch(p.file, key, p.start, record.size_of(p), p.xxh3)
        for key, record in manifest.tensors.items()
        for p in record.pieces
    ]
    return found


def share(found: list[Stretch], rank: int, size: int) -> list[Stretch]:
    """The part that one of `size` ranks looks at: each gets about as many bytes."""
    loads, mine = [0] * size, []
    for stretch in sorted(found, key=lambda s: -s.size):
        least = loads.index(min(loads))
        loads[least] += stretch.size + 1  # empty files count too
        if least == rank:
            mine.append(stretch)
    return mine


def check(folder: Path) -> list[Damage]:
    """What is wrong with a checkpoint, by file. Raises UserError where another version wrote it."""
    return check_together(folder, 0, 1, lambda value: [value])


def check_together(folder: Path, rank: int, size: int, gather: Gather) -> list[Damage]:
    """The same, the bytes shared out among all ranks, and the same answer on each."""
    found: list[Damage] = []
    refused = ""
    try:
        manifest = Manifest.read(folder)
        found = examine(folder, manifest, share(stretches(manifest), rank, size))
    except Corrupt as error:
        found = [Damage(folder / NAME, str(error).removeprefix(f"{folder / NAME}: "))]
    except UserError as error:
        refused = str(error)
    told = gather((found, refused))
    if refusals := [text for _, text in told if text]:
        raise UserError(refusals[0])
    return _by_file(damage for damages, _ in told for damage in damages)


def check_side_files(folder: Path) -> list[Damage]:
    """What is wrong with the files that hold no tensors: config, tokenizer, templates."""
    manifest = Manifest.read(folder)
    whole = [Stretch(n, None, 0, f.bytes, f.xxh3) for n, f in manifest.files.items()
             if f.header == f.bytes]  # fmt: skip
    return _by_file(examine(folder, manifest, whole))


def _by_file(found: Iterable[Damage]) -> list[Damage]:
    """One entry for each file and kind of damage."""
    merged: dict[tuple[Path, str], set[str]] = {}
    for damage in found:
        merged.setdefault((damage.file, damage.what), set()).update(damage.tensors)
    return [Damage(f, w, tuple(sorted(t))) for (f, w), t in sorted(merged.items())]


def unknown(folder: Path) -> list[str]:
    """Names of the files in a sound checkpoint that its manifest does not know."""
    known = {NAME, *Manifest.read(folder).files}
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return sorted(set(names) - known)


def examine(folder: Path, manifest: Manifest, parts: Iterable[Stretch]) -> list[Damage]:
    """Damage in some stretches of a checkpoint, one entry each."""
    files: dict[str, list[Stretch]] = {}
    for part in parts:
        files.setdefault(part.file, []).append(part)
    found = []
    for name, inner in files.items():
        held = tuple(p.tensor for p in inner if p.tensor is not None)
        try:
            found += _examine_file(inside(folder, name), manifest.files[name].bytes, inner)
        except Corrupt as error:
            found.append(Damage(folder / name, str(error).removeprefix(f"{folder / name}: "), held))
        except FileNotFoundError:
            found.append(Damage(folder / name, "missing", held))
        except OSError as error:
            found.append(Damage(folder / name, f"cannot be read ({error.strerror})", held))
    return found


def _examine_file(path: Path, written: int, parts: list[Stretch]) -> list[Damage]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Corrupt(f"{path}: not a file.")
        found = []
        if status.st_size != written:
            found.append(Damage(path, f"{status.st_size} bytes, {written} were written"))
        for part in sorted(parts, key=lambda p: p.start):
            tensors = (part.tensor,) if part.tensor is not None else ()
            if part.start + part.size > status.st_size:
                what = "cut off" if tensors else f"its header is {CHANGED}"
                found.append(Damage(path, what, tensors))
            elif hash_range(file, part.start, part.size) != part.xxh3:
                what = f"its header is {CHANGED}" if part.size < written else CHANGED
                found.append(Damage(path, CHANGED if tensors else what, tensors))
    return found


def hash_range(file: Any, start: int, size: int) -> str:
    """xxh3-128 of `size` bytes of an open file."""
    digest, left = xxhash.xxh3_128(), size
    file.seek(start)
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def newest_sound(out: Path, other_than: Path | None = None) -> Path | None:
    """The newest checkpoint of a run of which every byte is as it was written."""
    for _, folder in reversed(steps(out)):
        if other_than is not None and folder.resolve() == other_than.resolve():
            continue
        try:
            if not check(folder):
                return folder
        except UserError:
            continue
    return None
