"""A training checkpoint, or a model folder, as a Hugging Face folder of safetensors.

export(Path("runs/a/checkpoints/step-500"), Path("tuned"), dtype=torch.bfloat16)
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import moe.model  # noqa: F401  (registers RoutedLlama)
from moe.checkpoint import store
from moe.checkpoint.manifest import NAME, Manifest, TensorRecord
from moe.errors import Corrupt, UserError
from moe.hf.importing import write_both_ropes
from moe.hf.inspect import checkpoint_steps
from moe.upcycle import writer
from moe.upcycle.expression import Concat, Expression, Read
from moe.upcycle.receipt import Receipt, seal, versions
from moe.upcycle.source import Source, StoredTensor, hash_file, read_header


def export(path: Path, out: Path, dtype: torch.dtype | None = None) -> Receipt:
    """Write the weights of `path` to `out`, in their own dtype unless told otherwise.

    Raises UserError where `path` is neither a checkpoint nor a model folder or `out` exists,
    Corrupt where a file is damaged or missing.
    """
    if store.is_checkpoint(path):
        return _export_checkpoint(path, out, dtype)
    source = Source.open(path)
    earlier = Receipt.read(path)
    plan: writer.Plan = {name: Read(tensor) for name, tensor in source.tensors.items()}
    hashes = {name: hash_file(path / name) for name in source.files}
    steps = earlier.steps if earlier else []
    return _write(path, out, plan, [source], [*steps, _step(path, hashes, dtype)], dtype)


def _export_checkpoint(path: Path, out: Path, dtype: torch.dtype | None) -> Receipt:
    if problems := store.check(path):
        raise Corrupt("\n".join(problems))
    manifest = Manifest.read(path)
    pieces = {
        (name, key): tensor
        for name in manifest.files
        if name.endswith(".safetensors")
        for key, tensor in read_header(path / name).items()
    }
    plan = {
        key.split("/", 1)[1]: _whole(record, pieces)
        for key, record in manifest.tensors.items()
        if record.kind in ("parameter", "buffer")
    }
    steps = [*checkpoint_steps(manifest), _step(path, {NAME: hash_file(path / NAME)}, dtype)]
    return _write(path, out, plan, [], steps, dtype)


def _whole(record: TensorRecord, pieces: dict[tuple[str, str], StoredTensor]) -> Expression:
    """A tensor from the blocks that ranks stored: engines divide along the first dimension."""
    parts = sorted(record.pieces, key=lambda piece: piece.offset)
    assert all(p.shape[1:] == record.shape[1:] for p in parts), record
    reads = tuple(Read(pieces[p.file, p.key]) for p in parts)
    return reads[0] if len(reads) == 1 else Concat(reads)


def _step(path: Path, hashes: dict[str, str], dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        "recipe": "export",
        "options": {"to": "hf", "dtype": str(dtype).removeprefix("torch.") if dtype else None},
        "versions": versions(),
        "sources": [{"path": str(path), "files": {n: {"xxh3": h} for n, h in hashes.items()}}],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _write(
    path: Path,
    out: Path,
    plan: writer.Plan,
    sources: list[Source],
    steps: list[dict[str, Any]],
    dtype: torch.dtype | None,
) -> Receipt:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: config.json cannot be read: {error}") from error
    identity = {**steps[-1], "created": None}
    staging = writer.Staging(out, writer.fingerprint(identity))
    staging.open()
    plan = writer.cast(plan, dtype)
    written = writer.write_weights(plan, sources, staging)
    with writer.building(staging):
        writer.copy_side_files(path, staging.folder)
        (staging.folder / NAME).unlink(missing_ok=True)  # the checkpoint's, which this is not
        config.dtype = next(e.dtype for e in plan.values() if e.dtype.is_floating_point)
        config.save_pretrained(staging.folder)
        write_both_ropes(staging.folder / "config.json")
        receipt = Receipt(steps=steps, files=written.files, tensors=written.tensors)
        seal(staging.folder, receipt)
        staging.publish()
    return receipt
