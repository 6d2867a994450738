"""A folder of safetensors, read in slices: headers are parsed here, bytes come by `pread`.

No mapping: mapped pages count as this process's memory, and a conversion must stay small whatever
the checkpoint's size. Nothing is trusted: sizes, offsets and names are checked before use.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

import moe.model  # noqa: F401  (registers RoutedLlama with AutoConfig)
from moe.errors import Corrupt, UserError
from moe.jsonfile import parse_json, read_json

BLOCK_BYTES = 32 * 2**20  # a sum or a draw in double precision takes up to 16 times as much
MAX_HEADER_BYTES = 100 * 2**20
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip
LARGEST = 2**24  # of any size; the largest vocabularies and contexts have some ten million
MOST_LAYERS = 10_000
NO_SIZES = ("theta", "base", "position_embeddings")  # which may well be larger
INDEX = "model.safetensors.index.json"
PICKLED = (
    "file of safetensors: pickled weights can run code when loaded. Only safetensors and GGUF are "
    "read: convert it where you trust it, with save_pretrained."
)
ADAPTER = "adapter_config.json"
JOURNAL = "journal.json"  # of a folder under construction
PARTIAL = ".partial"  # ends its name
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# what transformers may compute with: any other name is code that it would fetch from the hub
IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm", "moe"),
}

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `size` bytes from byte `start` of `file`, row-major."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises Corrupt where the file is not what it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise Corrupt(f"{path}: truncated or not safetensors ({size} bytes, header {length}).")
        try:
            header = parse_json(file.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            for name, e in header.items():
                if e["dtype"] not in DTYPES:
                    raise UserError(
                        f"{path}: {name} is stored as {e['dtype']}, which is not read: quantised "
                        "weights have to be saved in a floating-point dtype first."
                    )
            entries = [
                (
                    name,
                    DTYPES[e["dtype"]],
                    tuple(map(_whole, e["shape"])),
                    _range(e["data_offsets"]),
                )
                for name, e in header.items()
            ]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise Corrupt(f"{path}: unreadable safetensors header ({error}).") from error
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, shape, (start, stop) in entries:
        expected = math.prod(shape) * dtype.itemsize
        if not 0 <= start <= stop or stop - start != expected or min(shape, default=0) < 0:
            raise Corrupt(f"{path}: {name} {shape} needs {expected} bytes, has {stop - start}.")
        if 8 + length + stop > size:
            raise Corrupt(
                f"{path}: truncated inside {name}: it ends at byte {8 + length + stop} of {size}. "
                "Download the file again."
            )
        tensors[name] = StoredTensor(name, path, dtype, shape, 8 + length + start, stop - start)
    placed = sorted((t for t in tensors.values() if t.size), key=lambda t: t.start)
    for left, right in itertools.pairwise(placed):
        if left.start + left.size > right.start:
            raise Corrupt(f"{path}: {left.name} and {right.name} overlap.")
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all there once: readers disagree on which of two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r:.40} is not a whole number")
    return value


def _range(value: Any) -> tuple[int, int]:
    start, stop = map(_whole, value)  # ValueError where there are not two
    return start, stop


def require_finished(folder: Path) -> None:
    """Raises UserError where a folder is still under construction, however much is in it."""
    if folder.resolve().name.endswith(PARTIAL) and (folder / JOURNAL).is_file():
        raise UserError(
            f"{folder} is unfinished: the command that wrote it was stopped. Run the same command "
            "again, and it goes on."
        )


def read_config(folder: Path) -> PreTrainedConfig:
    """A model folder's config. Raises UserError where there is none or it cannot be read."""
    require_finished(folder)
    if not (folder / "config.json").is_file():
        what = "is not a folder" if not folder.is_dir() else "has no config.json"
        if (folder / "checkpoints").is_dir():
            raise UserError(f"{folder} is a run: give one of its checkpoints/step-N folders.")
        raise UserError(f"{folder} {what}. Give a model folder; a GGUF file or hub id needs "
                        "`moe import` first.")  # fmt: skip
    _check_links(folder)
    _check_written(folder)
    _check_fields(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # transformers raises what it likes over a bad config
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/config.json cannot be read: {reason[:400]}") from error


def _check_links(folder: Path) -> None:
    """Raise UserError naming every link of a folder that leads out of it: what it points to would
    be read as the model's and copied along with it. A hub cache's snapshots are links to its blobs.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    wrong = [
        path
        for path in sorted([*folder.iterdir(), *folder.glob("*/*")])
        if path.is_symlink() and not any(path.resolve().is_relative_to(h) for h in homes)
    ]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} links lead out of it, first {wrong[0].name} to "
            f"{wrong[0].resolve()}. If it is yours, make it whole: cp -rL {folder} NEW."
        )


def _check_written(folder: Path) -> None:
    """Raise Corrupt where config or tokenizer of a training checkpoint are not as it wrote them."""
    from moe.checkpoint import damage, manifest  # which need this module

    if manifest.is_complete(folder) and (found := damage.check_side_files(folder)):
        raise Corrupt("\n".join(map(str, found)))


def _check_fields(path: Path) -> None:
    """Raise UserError naming what transformers would stumble over, or do harm by."""
    try:
        fields = read_json(path)
    except ValueError:
        return  # what is wrong with it is said by who reads it all
    fields = fields if isinstance(fields, dict) else {}
    _check_sizes(path, fields)
    _check_code(path, fields)


def _check_sizes(path: Path, fields: dict[str, Any]) -> None:
    """Raise UserError naming every size that is none: transformers divides by them."""
    wrong = [
        f"{name}={fields[name]!r:.40}"
        for name in SIZES
        if fields.get(name) is not None
        if not (type(fields[name]) is int and fields[name] > 0)
    ]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}: sizes are positive whole numbers.")
    layers = fields.get("num_hidden_layers") or 0
    wrong = [f"num_hidden_layers={layers} exceeds {MOST_LAYERS}"] if layers > MOST_LAYERS else []
    wrong += [
        f"{name}={n!r:.40} exceeds {LARGEST}"
        for name, n in _entries(fields)
        if type(n) is int and n > LARGEST and not name.endswith(NO_SIZES)
    ]
    if wrong:  # they would be allocated, or gone through, before anything else is looked at
        raise UserError(f"{path}: {', '.join(wrong[:3])}: no model is that large.")


def _check_code(path: Path, fields: dict[str, Any]) -> None:
    """Raise UserError where a config has transformers fetch kernels, or read other weights."""
    for name, value in _entries(fields):
        if name == "transformers_weights" and value is not None:
            raise UserError(
                f"{path}: {name}={value!r:.60}: weights are read from model.safetensors or {INDEX} "
                "alone. Give the file that name, and remove the key."
            )
        for key, known in IMPLEMENTATIONS.items():
            if key in name and value is not None and value not in known:
                raise UserError(
                    f"{path}: {name}={value!r:.60} is none of {', '.join(known)}, and could be "
                    "code to be fetched. Remove the key."
                )


def _entries(fields: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a config, however deep, by the nearest name."""
    waiting = [("", fields)]
    while waiting:
        name, value = waiting.pop()
        yield name, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, v) for v in value)


@dataclass(frozen=True)
class Source:
    """A model folder: its config and its tensors, none of them loaded."""

    folder: Path
    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Read the config and every header. Raises UserError or Corrupt, naming the file."""
        config = read_config(folder)
        tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            tensors.update(read_header(path))
        return cls(folder, config, tensors)

    @cached_property
    def files(self) -> dict[str, list[StoredTensor]]:
        """Tensors by file name, in the order of their bytes."""
        files: dict[str, list[StoredTensor]] = {}
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.file.name, t.start)):
            files.setdefault(tensor.file.name, []).append(tensor)
        return files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by index where there is one."""
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} has an adapter ({ADAPTER}), which is not read. Merge it into the model, and "
            "save that with save_pretrained."
        )
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(read_json(folder / INDEX)["weight_map"].values()), key=str)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise Corrupt(f"{folder / INDEX}: not an index of weights ({error}).") from error
        if outside := [n for n in names if not _plain_name(n)]:
            raise Corrupt(f"{folder / INDEX}: {outside[0]!r:.80} lies outside the folder.")
        if others := [n for n in names if not n.endswith(".safetensors")]:
            raise UserError(f"{folder / INDEX} names {others[0]!r:.80}, which is no {PICKLED}")
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise UserError(
                f"{folder}: {len(missing)} of {len(names)} shards are missing: "
                f"{', '.join(missing[:3])}. Download them again."
            )
        listed = [folder / n for n in names]
        if strays := sorted(set(folder.glob("model*.safetensors")) - set(listed)):
            raise UserError(
                f"{strays[0]} is not in {INDEX}: readers disagree on which weights count. Remove "
                "the one or the other."
            )
        return listed
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if shards := sorted(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has {len(shards)} safetensors files but no {INDEX}. Restore the index."
        )
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if pickles:
        raise UserError(f"{folder} holds {pickles[0]}, which is no {PICKLED}")
    raise UserError(f"{folder} holds no weights: expected model.safetensors or {INDEX}.")


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name != ".." and "\0" not in name


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of a tensor seen as [rows, columns], columns its last dimension.

    Raises Corrupt where the values are not finite.
    """
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    block = torch.empty(stop - start, columns, dtype=tensor.dtype)
    view, filled = bytes_of(block), 0
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start + start * columns * tensor.dtype.itemsize)
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise Corrupt(f"{tensor.file}: ends inside {tensor.name}.")
            filled += count
    # a finite sum has only finite terms, and summing is several times faster than looking; in the
    # tensor's own dtype, for another one would copy the block. An overflow only means to look
    if tensor.dtype.is_floating_point and not block.sum().isfinite():
        bad = int((~block.isfinite()).sum())
        if bad:
            raise Corrupt(f"{tensor.file}: {tensor.name} holds {bad} values that are not finite.")
    return block


def require_finite(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise Corrupt where a loaded tensor holds values that are not finite."""
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise Corrupt(f"{folder}: {name} holds values that are not finite.")


def bytes_of(block: Tensor) -> memoryview:
    """The bytes of a block as they are stored."""
    return memoryview(block.contiguous().view(torch.uint8).flatten().numpy().data)


def block_rows(columns: int, dtype: torch.dtype) -> int:
    """Rows of one block: as many as fit BLOCK_BYTES, at least one."""
    return max(1, BLOCK_BYTES // max(1, columns * dtype.itemsize))


def blocks(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Row ranges of at most BLOCK_BYTES that cover `rows`."""
    step = block_rows(columns, dtype)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(16 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
