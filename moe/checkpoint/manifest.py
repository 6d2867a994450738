"""What a checkpoint folder holds: where each tensor's pieces lie, and a hash of every byte.

`files` has the hash of each file's header (of a file without tensors: of all of it), and every
piece has its own, so that damage has a file's name and a tensor's. The manifest is written last and
begins with the hash of what follows. Nothing in it is trusted: names stay inside the folder, pieces
tile their tensor and their file, and `moe.checkpoint.progress` says what the rest must look like.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import xxhash

from moe.checkpoint.disk import write_file
from moe.checkpoint.progress import Progress, read_progress
from moe.errors import Corrupt, UserError
from moe.upcycle.source import CODES

NAME = "manifest.json"
PARTIAL = ".partial"  # ends the name of a folder that is still being written
DELETED = ".deleted"  # and of one that is being deleted
FORMAT = 2
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
STATE = ("parameter", "exp_avg", "exp_avg_sq")  # of these a value is no whole number
KINDS = ("parameter", "buffer", "exp_avg", "exp_avg_sq", "rng")
STEP = re.compile(r"step-(\d+)(\.replaced)?")  # names of the folders of a run's checkpoints
_SEAL = re.compile(rb'\{"xxh3": "([0-9a-f]{32})", ')


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor: `shape` values from `offset`, row-major from byte `start` of `file`."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the state, by kind and global shape. Kind rng: a rank's random generator."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def size_of(self, piece: Piece) -> int:
        """Bytes of one of its pieces."""
        return math.prod(piece.shape) * DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of `bytes`; `xxh3` is of the first `header` of them, the rest are tensors' pieces."""

    bytes: int
    header: int
    xxh3: str


@dataclass(kw_only=True, slots=True)
class Manifest:
    """`tensors` maps `kind/name` to its record; `progress` is where the run stands."""

    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    progress: Progress
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"progress": self.progress.model_dump()}
        body = json.dumps(values)[1:].encode() + b"\n"
        seal = f'{{"xxh3": "{xxhash.xxh3_128_hexdigest(body)}", '.encode()
        write_file(folder / NAME, [seal, body])

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises Corrupt where it is missing, damaged or not what a writer of ours writes,
        UserError where another version of this program wrote it.
        """
        path = folder / NAME
        if folder.is_symlink() and STEP.fullmatch(folder.name):
            raise Corrupt(f"{path}: its folder is a symbolic link, which is not followed.")
        if not is_complete(folder):
            raise Corrupt(f"{folder} has no {NAME}, or is unfinished: no complete checkpoint.")
        values = _unseal(path)
        _check_version(folder, values.get("format"))
        try:
            tensors = {str(n): _tensor(n, r) for n, r in values["tensors"].items()}
            files = {_file_name(n): _file(r) for n, r in values["files"].items()}
            progress = read_progress(values["progress"])
            manifest = cls(tensors=tensors, files=files, progress=progress)
            _check_tiles(manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            raise Corrupt(f"{path}: not a manifest ({said}).") from error
        return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder was published as a checkpoint."""
    path = folder / NAME
    unfinished = folder.name.endswith((PARTIAL, DELETED))
    return path.is_file() and not path.is_symlink() and not unfinished


def inside(folder: Path, name: str) -> Path:
    """The file of that name. Raises Corrupt where a link leads somewhere else."""
    path = folder / name
    if path.is_symlink() or path.resolve() != folder.resolve() / name:
        raise Corrupt(f"{path}: a symbolic link, which is not followed out of a checkpoint.")
    return path


def _unseal(path: Path) -> dict[str, Any]:
    """What the JSON of a manifest says. Raises Corrupt where the seal is not its hash; format 1 had
    none.
    """
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except OSError as error:
        raise Corrupt(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: not a manifest ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(values, dict):
        raise Corrupt(f"{path}: not a manifest (a {type(values).__name__}).")
    seal = _SEAL.match(content)
    sealed = seal and xxhash.xxh3_128_hexdigest(content[seal.end() :]).encode() == seal[1]
    if not sealed and (seal or "xxh3" in values or values.get("format") != 1):
        raise Corrupt(f"{path}: not the bytes that were written.")
    return values


def _check_version(folder: Path, version: Any) -> None:
    if version == 1:
        raise UserError(
            f"{folder} was written by an earlier version (format 1; this one reads {FORMAT}). "
            "Export it with that version (moe export --to hf) and start from the model."
        )
    if version != FORMAT:
        raise UserError(
            f"{folder} was written by another version (format {version!r:.20}; this one reads "
            f"{FORMAT}). Go on with that version."
        )


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**60:
        raise ValueError(f"{value!r:.40} is no size")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 16:
        raise ValueError(f"{values!r:.40} is no list of sizes")
    return tuple(map(_whole, values))


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value):
        raise ValueError(f"{value!r:.40} is no hash")
    return value


def _file_name(name: Any) -> str:
    """A name of a file below the folder, whatever a path may do elsewhere."""
    path = PurePosixPath(str(name))
    plain = isinstance(name, str) and name.isprintable() and "\\" not in name
    if not plain or path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise ValueError(f"{name!r:.80} lies outside the folder")
    if name == NAME:
        raise ValueError(f"{NAME} cannot hold its own hash")
    return name


def _file(values: dict[str, Any]) -> FileRecord:
    return FileRecord(_whole(values["bytes"]), _whole(values["header"]), _hash(values["xxh3"]))


def _tensor(name: Any, values: dict[str, Any]) -> TensorRecord:
    kind, dtype, shape = values["kind"], values["dtype"], _numbers(values["shape"])
    if kind not in KINDS or not name.isprintable() or not name.startswith(f"{kind}/"):
        raise ValueError(f"{name!r:.80} is no tensor of kind {kind!r:.20}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r:.20}")
    if kind in STATE and not DTYPES[dtype].is_floating_point:
        raise ValueError(f"{name}: dtype {dtype}, which is none of a {kind}")
    if kind == "rng" and (dtype != "uint8" or len(shape) != 1):
        raise ValueError(f"{name}: {dtype} {shape} is no state of a generator")
    if not isinstance(values["pieces"], list):
        raise ValueError(f"{name}: pieces are no list")
    pieces = tuple(
        Piece(
            _file_name(p["file"]),
            _numbers(p["offset"]),
            _numbers(p["shape"]),
            _whole(p["start"]),
            _hash(p["xxh3"]),
        )
        for p in values["pieces"]
    )
    record = TensorRecord(kind, dtype, shape, pieces)
    _check_cover(name, record)
    return record


def _check_cover(name: str, record: TensorRecord) -> None:
    """Raise ValueError unless the pieces are a grid that covers the tensor exactly once."""
    pieces, shape = record.pieces, record.shape
    covered = sum(math.prod(p.shape) for p in pieces)
    if covered != math.prod(shape):
        raise ValueError(f"the pieces of {name} hold {covered} of {math.prod(shape)} values")
    if any(len(p.offset) != len(shape) or len(p.shape) != len(shape) for p in pieces):
        raise ValueError(f"{name}: pieces of another number of dimensions")
    if any(0 in p.shape for p in pieces):
        raise ValueError(f"{name}: a piece holds nothing")
    for axis, size in enumerate(shape if pieces else ()):
        cuts = sorted({p.offset[axis] for p in pieces})
        ends = dict(zip(cuts, [*cuts[1:], size], strict=True))
        if any(p.offset[axis] + p.shape[axis] != ends[p.offset[axis]] for p in pieces):
            raise ValueError(f"the pieces of {name} overlap, or leave gaps")
    if len({p.offset for p in pieces}) != len(pieces):
        raise ValueError(f"the pieces of {name} overlap")


def _check_tiles(manifest: Manifest) -> None:
    """Raise ValueError unless header and pieces cover every byte of every file once."""
    tiles: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.files}
    for name, record in manifest.tensors.items():
        for piece in record.pieces:
            if piece.file not in tiles:
                raise ValueError(f"{name} lies in {piece.file!r}, which is not in the checkpoint")
            if piece.start % record.torch_dtype.itemsize:
                raise ValueError(f"{name} begins at byte {piece.start}, between two values")
            tiles[piece.file].append((piece.start, record.size_of(piece)))
    for name, entry in manifest.files.items():
        if _end(entry.header, tiles[name]) != entry.bytes:
            raise ValueError(f"the pieces in {name} do not make up its {entry.bytes} bytes")


def _end(start: int, tiles: Iterable[tuple[int, int]]) -> int:
    """Where tiles end that follow each other from `start`; -1 where they do not."""
    for begin, size in sorted(tiles):
        if begin != start:
            return -1
        start += size
    return start
