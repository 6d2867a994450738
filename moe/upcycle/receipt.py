"""The receipt: what a folder was made from, how, and what was measured; a hash of all it holds.

`receipt.json` lies beside the weights. `check(folder)` finds what no longer is as it was written.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from moe.errors import Corrupt
from moe.jsonfile import read_json
from moe.upcycle.expression import num_columns, num_rows
from moe.upcycle.source import (
    JOURNAL,
    StoredTensor,
    blocks,
    bytes_of,
    hash_file,
    read_header,
    read_rows,
    weight_files,
)

NAME = "receipt.json"


@dataclass(kw_only=True, slots=True)
class Receipt:
    """`steps` grows by one entry with every conversion in a chain, oldest first."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> xxh3, bytes
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> xxh3, dtype, shape
    verification: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Receipt | None":
        """The folder's receipt, None where it has none. Raises Corrupt where it is unreadable."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            receipt = cls(**read_json(path))
            _check_form(receipt)
        except (ValueError, TypeError) as error:
            raise Corrupt(f"{path}: not a receipt ({error}).") from error
        return receipt


def _check_form(receipt: Receipt) -> None:
    """Raise ValueError where an entry is not what a writer of ours writes."""
    check_steps(receipt.steps)
    for kind, keys in (("files", {"xxh3", "bytes"}), ("tensors", {"xxh3", "dtype", "shape"})):
        entries = getattr(receipt, kind)
        if not isinstance(entries, dict):
            raise ValueError(f"{kind} is not a table")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or not keys <= entry.keys():
                raise ValueError(f"{kind} lacks {sorted(keys)} of {name}")


def check_steps(steps: Any) -> None:
    """Raise ValueError where a history is no list of conversions."""
    for step in steps if isinstance(steps, list) else [steps]:
        named = isinstance(step, dict) and isinstance(step.get("recipe"), str)
        if not named or not isinstance(step.get("options", {}), dict):
            raise ValueError("steps is not a list of conversions")


def versions() -> dict[str, str]:
    """Versions of everything that can change the bytes of a conversion."""
    import platform

    import transformers

    from moe import __version__

    return {
        "moe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe(tensor: StoredTensor, digest: str) -> dict[str, Any]:
    """A receipt's entry for one tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"xxh3": digest, "dtype": dtype, "shape": list(tensor.shape)}


def hash_tensor(tensor: StoredTensor) -> str:
    """xxh3-128 of a stored tensor's bytes. Raises Corrupt where its values are not finite."""
    digest = xxhash.xxh3_128()
    columns = num_columns(tensor.shape)
    for start, stop in blocks(num_rows(tensor.shape), columns, tensor.dtype):
        digest.update(bytes_of(read_rows(tensor, start, stop)))
    return digest.hexdigest()


def seal(folder: Path, receipt: Receipt) -> None:
    """Fill in the hash of every file and tensor not yet in the receipt, and write it."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in receipt.files and name not in (NAME, JOURNAL):
            receipt.files[name] = {"xxh3": hash_file(path), "bytes": path.stat().st_size}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if name not in receipt.tensors:
                receipt.tensors[name] = describe(tensor, hash_tensor(tensor))
    receipt.write(folder)


def unknown(folder: Path) -> list[str]:
    """Names of the files in a folder that its receipt does not know: added later, unchecked."""
    receipt = Receipt.read(folder)
    known = {NAME, *(receipt.files if receipt else ())}
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(set(names) - known) if receipt else []


def check(folder: Path) -> list[str]:
    """What is wrong with a folder, one sentence each, naming file and tensor; empty where sound."""
    receipt = Receipt.read(folder)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        try:
            tensors.update(read_header(file))
        except Corrupt as error:
            problems.append(str(error))
    recorded = receipt.tensors if receipt else {}
    damaged = {t.file.name for t in tensors.values() if _damage(t, recorded, problems)}
    if receipt is None:
        return problems
    for name in recorded:
        if name not in tensors:
            problems.append(f"{folder}: tensor {name} is in the receipt but in no file.")
    for name, entry in receipt.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{folder / NAME}: {name!r} lies outside the folder.")
        elif not path.is_file():
            problems.append(f"{path}: missing.")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, written {entry['bytes']}.")
        elif name not in damaged and hash_file(path) != entry["xxh3"]:
            problems.append(f"{path}: hash differs from the one written.")
    return problems


def _damage(tensor: StoredTensor, recorded: dict[str, Any], problems: list[str]) -> bool:
    """Whether a tensor's bytes are not what the receipt says; the reason goes to `problems`."""
    try:
        digest = hash_tensor(tensor)
    except Corrupt as error:
        problems.append(str(error))
        return True
    if not recorded:
        return False
    if tensor.name not in recorded:
        problems.append(f"{tensor.file}: {tensor.name} is not in the receipt.")
        return True
    entry = recorded[tensor.name]
    if math.prod(entry["shape"]) != math.prod(tensor.shape) or entry["xxh3"] != digest:
        problems.append(f"{tensor.file}: {tensor.name} hash differs from the one written.")
        return True
    return False
