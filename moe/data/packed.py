"""Packed documents: Megatron's GPTDataset cuts and shuffles them, this gives samples their masks.

    dataset = open_packed(Path("corpus"), manifest, sequence_length=1024, seed=0, cache=folder, ...)
    dataset[10_000]   # any index: after the last sample another pass begins, shuffled anew

Importing it imports megatron: do so inside functions.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import distributed
from torch.utils.data import Dataset

from moe.data.indexed import (
    BlendedDataset,
    GPTDataset,
    GPTDatasetConfig,
    IndexedDataset,
    Split,
)
from moe.data.manifest import Manifest
from moe.errors import UserError

if TYPE_CHECKING:
    from moe.data.dataset import Boundaries, Sample


class PackedDataset(GPTDataset):
    """One source: pass after pass over the same samples, each pass in an order of its own.

    Megatron's own way of repeating shuffles all passes together, so that the order of a run
    depends on how long it was meant to be; here a longer run only goes on.
    """

    def __init__(
        self,
        prefix: Path,
        manifest: Manifest,
        config: GPTDatasetConfig,
        document_boundaries: "Boundaries",
    ) -> None:
        documents = numpy.arange(manifest.documents, dtype=numpy.int32)
        # the name is part of the key under which indices are cached: content, not place
        name = manifest.fingerprint
        indexed = IndexedDataset(str(prefix))
        super().__init__(indexed, name, documents, None, Split.train, config)
        self.prefix, self.document_boundaries = prefix, document_boundaries
        self.samples_per_pass = len(self.shuffle_index)
        self._pass, self._order = 0, self.shuffle_index

    def __len__(self) -> int:
        return self.num_samples or self.samples_per_pass

    def __getitem__(self, index: int) -> "Sample":
        number, place = divmod(int(index), self.samples_per_pass)
        parts = self._read(int(self._order_of_pass(number)[place]))
        text = torch.from_numpy(numpy.concatenate(parts, dtype=numpy.int64))
        length = len(text) - 1
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }
        if self.document_boundaries == "none":
            return sample
        for start in numpy.cumsum([len(part) for part in parts])[:-1]:
            sample["loss_mask"][start - 1] = 0  # EOS does not tell what the next document is
            sample["position_ids"][start:] = torch.arange(length - start)
        if self.document_boundaries == "positions":
            sample["attention_mask"] = torch.ones(length, dtype=torch.int64)
        return sample

    def _order_of_pass(self, number: int) -> numpy.ndarray:
        if number == 0:
            return self.shuffle_index
        if number != self._pass:
            self._pass, self._order = number, self._draw_order(number)
        return self._order

    def _draw_order(self, number: int) -> numpy.ndarray:
        random = numpy.random.RandomState([self.config.random_seed, number])
        return random.permutation(self.samples_per_pass)

    def origin(self, index: int) -> dict[str, Any]:
        """Where a sample comes from: its source and the numbers of the documents in it."""
        number, place = divmod(int(index), self.samples_per_pass)
        # drawn again: the order that is kept belongs to the thread that reads ahead
        row = int((self._draw_order(number) if number else self.shuffle_index)[place])
        (first, _), (last, _) = self.sample_index[row], self.sample_index[row + 1]
        documents = self.document_index[first : last + 1]
        return {"source": str(self.prefix), "documents": [int(d) for d in documents]}

    def _read(self, row: int) -> list[numpy.ndarray]:
        """Tokens of one sample and the token after it, a part per document."""
        (first, begin), (last, end) = self.sample_index[row], self.sample_index[row + 1]
        parts = []
        for place in range(first, last + 1):
            offset = int(begin) if place == first else 0
            length = int(end) + 1 - offset if place == last else None
            parts.append(self.dataset.get(self.document_index[place], offset, length))
        return parts


class Blend(BlendedDataset):
    """Sources interleaved by weight: of the first n samples each has its share of n, within one."""

    def __getitem__(self, index: int) -> "Sample":
        sample = super().__getitem__(index)
        del sample["dataset_id"]
        return sample

    def origin(self, index: int) -> dict[str, Any]:
        """Where a sample comes from, as its source says it."""
        source, place = self.dataset_index[index], self.dataset_sample_index[index]
        return self.datasets[source].origin(place)


def open_packed(
    prefix: Path,
    manifest: Manifest,
    *,
    sequence_length: int,
    seed: int,
    cache: Path,
    document_boundaries: "Boundaries",
) -> PackedDataset:
    """Open one source; its indices are built once, by rank 0, and kept in `cache`."""
    folder = cache / f"{manifest.fingerprint}-{sequence_length}-{seed}"

    def open_with(indices: Path) -> PackedDataset:
        config = _config(sequence_length=sequence_length, seed=seed, cache=str(indices))
        return PackedDataset(prefix, manifest, config, document_boundaries)

    grouped = distributed.is_initialized()
    if (not grouped or distributed.get_rank() == 0) and not folder.is_dir():
        _build_indices(folder, open_with)
    if grouped:
        distributed.barrier()
    if not folder.is_dir():
        raise UserError(
            f"rank {distributed.get_rank()} does not see {folder}, which rank 0 has written. "
            "Put the run folder on a file system that all nodes share."
        )
    return open_with(folder)


def _build_indices(folder: Path, open_with: Any) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix="building-", ignore_cleanup_errors=True
        ) as building:
            open_with(Path(building))
            if not folder.is_dir():  # another run may have been faster
                Path(building).rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the data indices to {folder}: {error.strerror}.") from error


def _config(**settings: Any) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=settings["seed"],
        sequence_length=settings["sequence_length"],
        path_to_cache=settings["cache"],
        blend_per_split=[([""], None), None, None],
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}),
        reset_position_ids=False,  # PackedDataset knows where documents end; Megatron would
        reset_attention_mask=False,  # search for EOS, which chat turns contain too
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def blend(
    parts: Sequence[PackedDataset], weights: Sequence[float], num_samples: int | None
) -> "Dataset[Sample]":
    """`num_samples` samples of the parts by weight; None: all samples of each part once."""
    for part in parts:
        part.num_samples = num_samples
    if len(parts) == 1:
        return parts[0]
    # in memory on every rank (10 bytes and 30 ns a sample): Megatron's cache needs a group
    config = _config(sequence_length=parts[0].config.sequence_length, seed=0, cache=None)
    if num_samples is None:
        return Blend(list(parts), [part.samples_per_pass for part in parts], None, config)
    return Blend(list(parts), [float(weight) for weight in weights], num_samples, config)
