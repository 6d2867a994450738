"""What a checkpoint folder holds: every tensor, in which file its pieces are, and a hash per file.

The manifest is written last, so a folder that has one was complete.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe.errors import Corrupt

NAME = "manifest.json"
PARTIAL = ".partial"  # ends the name of a folder that is still being written
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor: `shape` elements from `offset`, stored under `key` in `file`."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the state, by kind (parameter, buffer, exp_avg, exp_avg_sq) and global shape."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(kw_only=True, slots=True)
class Manifest:
    """`tensors` maps `kind/name` to its record; `progress` is where the run stands."""

    tensors: dict[str, TensorRecord]
    files: dict[str, dict[str, Any]]  # name -> xxh3, bytes
    progress: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises Corrupt where it is missing, unreadable or does not cover its tensors."""
        path = folder / NAME
        if not is_complete(folder):
            raise Corrupt(f"{folder} has no {NAME}, or is {PARTIAL}: no complete checkpoint.")
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise Corrupt(f"{path}: format {values['format']}, this version reads {FORMAT}.")
            tensors = {n: _record(r) for n, r in values.pop("tensors").items()}
            manifest = cls(tensors=tensors, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{path}: not a manifest ({error}).") from error
        for name, record in manifest.tensors.items():
            _check_cover(path, name, record, manifest.files)
        return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder was published as a checkpoint."""
    return (folder / NAME).is_file() and not folder.name.endswith(PARTIAL)


def _record(values: dict[str, Any]) -> TensorRecord:
    pieces = tuple(
        Piece(p["file"], p["key"], tuple(p["offset"]), tuple(p["shape"])) for p in values["pieces"]
    )
    return TensorRecord(values["kind"], values["dtype"], tuple(values["shape"]), pieces)


def _check_cover(path: Path, name: str, record: TensorRecord, files: dict[str, Any]) -> None:
    covered = sum(math.prod(p.shape) for p in record.pieces)
    if covered != math.prod(record.shape):
        raise Corrupt(
            f"{path}: the pieces of {name} hold {covered} of {math.prod(record.shape)} values."
        )
    for piece in record.pieces:
        if piece.file not in files or Path(piece.file).name != piece.file:
            raise Corrupt(f"{path}: {name} lies in {piece.file!r}, which is not in the checkpoint.")
