"""What an export starts from: a model folder, or a training checkpoint of however many ranks.

origin = Origin.open(Path("runs/a/checkpoints/step-500"))
origin.config, origin.plan, origin.steps
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe.checkpoint import store
from moe.checkpoint.manifest import NAME, Manifest, TensorRecord
from moe.errors import Corrupt
from moe.hf.inspect import checkpoint_steps
from moe.hf.loading import check_shapes
from moe.upcycle.expression import Concat, Expression, Read
from moe.upcycle.rearrange import Tiles
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import Source, StoredTensor, hash_file, read_config

Plan = dict[str, Expression]


@dataclass(frozen=True, slots=True)
class Origin:
    """Config, tensors and history of what is exported; `files` are hashes of what was read."""

    path: Path
    config: PreTrainedConfig
    plan: Plan
    sources: list[Source]  # folders whose files may be linked
    steps: list[dict[str, Any]]
    files: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> "Origin":
        """Raises UserError where `path` is neither a checkpoint nor a model folder, Corrupt where a
        file is damaged or missing.
        """
        if store.is_checkpoint(path):
            return _checkpoint(path)
        source = Source.open(path)
        earlier = Receipt.read(path)
        plan: Plan = {name: Read(tensor) for name, tensor in source.tensors.items()}
        files = {name: hash_file(path / name) for name in source.files}
        return cls(path, source.config, plan, [source], earlier.steps if earlier else [], files)


def _checkpoint(path: Path) -> Origin:
    if damage := store.check(path):
        raise Corrupt("\n".join(map(str, damage)))
    manifest = Manifest.read(path)
    plan = {
        key.split("/", 1)[1]: _whole(path, key, record)
        for key, record in manifest.tensors.items()
        if record.kind in ("parameter", "buffer")
    }
    config = read_config(path)
    with torch.device("meta"):
        check_shapes(manifest, path, AutoModelForCausalLM.from_config(config).state_dict())
    files = {NAME: hash_file(path / NAME)}
    return Origin(path, config, plan, [], checkpoint_steps(manifest), files)


def _whole(folder: Path, key: str, record: TensorRecord) -> Expression:
    """A tensor from the blocks that ranks stored, in whichever way they divide it."""
    parts = sorted(record.pieces, key=lambda piece: piece.offset)
    reads = tuple(
        Read(
            StoredTensor(
                key, folder / p.file, record.torch_dtype, p.shape, p.start, record.size_of(p)
            )
        )
        for p in parts
    )
    if len(reads) == 1:
        return reads[0]
    if all(p.shape[1:] == record.shape[1:] for p in parts):
        return Concat(reads)
    return Tiles(record.shape, tuple(p.offset for p in parts), reads)
