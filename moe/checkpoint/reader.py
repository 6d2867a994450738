"""Reading a checkpoint back, in whichever division of its tensors.

with Reader(folder) as checkpoint: checkpoint.load(entries)
for name, tensor in weights(folder): ...                     # no process group needed
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moe.checkpoint.damage import Stretch, examine
from moe.checkpoint.manifest import Manifest, Piece, TensorRecord, inside
from moe.checkpoint.pieces import Entry, block_of, random_key
from moe.checkpoint.progress import Progress
from moe.errors import Corrupt, UserError


class Reader:
    """An open checkpoint. Raises Corrupt where what it reads is not what was written; `checked` is
    for those who have looked at every byte already.
    """

    def __init__(self, folder: Path, checked: bool = False) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._checked = checked
        self._mapped: dict[str, Tensor] = {}
        self._sound: set[tuple[str, int]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._mapped.clear()

    def _piece(self, key: str, record: TensorRecord, piece: Piece) -> Tensor:
        """A piece as it lies in its file, mapped; hashed when it is first asked for."""
        size, place = record.size_of(piece), (piece.file, piece.start)
        if not self._checked and place not in self._sound:
            stretch = Stretch(piece.file, key, piece.start, size, piece.xxh3)
            if damage := examine(self.folder, self.manifest, [stretch]):
                raise Corrupt("\n".join(map(str, damage)) + ". Resume from another checkpoint.")
            self._sound.add(place)
        if piece.file not in self._mapped:
            path, entry = inside(self.folder, piece.file), self.manifest.files[piece.file]
            try:
                self._mapped[piece.file] = torch.from_file(
                    str(path), shared=False, size=entry.bytes, dtype=torch.uint8
                )
            except RuntimeError as error:
                raise Corrupt(f"{path}: cannot be read ({error}).") from error
        stored = self._mapped[piece.file][piece.start : piece.start + size]
        return stored.view(record.torch_dtype).view(piece.shape)

    def block(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """`shape` values from `offset` of a tensor, put together from the pieces they lie in."""
        record = self.manifest.tensors[key]
        parts: list[tuple[tuple[slice, ...], Tensor]] = []
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
            parts.append((target, self._piece(key, record, piece)[source]))
        # only now: that many values are there, whatever the manifest says of their number
        result = torch.empty(shape, dtype=record.torch_dtype)
        for target, part in parts:
            result[target] = part
        return result

    def whole(self, key: str) -> Tensor:
        """All of a tensor."""
        shape = self.manifest.tensors[key].shape
        return self.block(key, (0,) * len(shape), shape)

    def load(self, entries: Iterable[Entry]) -> None:
        """Fill every tensor of a state, whatever its division. Raises UserError where the
        checkpoint and the state do not hold the same tensors.
        """
        wanted = {f"{e.kind}/{e.name}": e for e in entries}
        stored = {k: r for k, r in self.manifest.tensors.items() if r.kind != "rng"}
        if wanted.keys() != stored.keys():
            missing, extra = sorted(wanted.keys() - stored), sorted(stored.keys() - wanted.keys())
            raise UserError(
                f"{self.folder} and the model differ: {len(missing)} tensors are not in the "
                f"checkpoint {missing[:2]}, {len(extra)} are not in the model {extra[:2]}. Was "
                "train.trainable or the model changed? Start over in another out, with "
                "model= this checkpoint to keep its weights."
            )
        for key, entry in wanted.items():
            tensor, record = entry.tensor, stored[key]
            if tuple(tensor.shape) != record.shape or tensor.dtype != record.torch_dtype:
                raise UserError(
                    f"{self.folder}: {key} is {record.shape} of {record.torch_dtype}, the model's "
                    f"{tuple(tensor.shape)} of {tensor.dtype}."
                )
            local, offset, _ = block_of(tensor, 0)
            if local.numel():
                with torch.no_grad():
                    local.copy_(self.block(key, offset, tuple(local.shape)))
            entry.put(tensor)

    def random_state(self, rank: int, device: str = "cpu") -> Tensor | None:
        """The generator state that this rank saved; None where it did not exist then."""
        key = random_key(rank, device)
        return self.whole(key) if key in self.manifest.tensors else None


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a checkpoint under the model's names, whole, one at a time."""
    with Reader(folder) as checkpoint:
        for key, record in checkpoint.manifest.tensors.items():
            if record.kind in ("parameter", "buffer"):
                yield key.split("/", 1)[1], checkpoint.whole(key)


def progress_of(folder: Path) -> Progress:
    """Where the run stood that wrote a checkpoint."""
    return Manifest.read(folder).progress
