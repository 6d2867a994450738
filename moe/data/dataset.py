"""Prepared files as a torch dataset of packed sequences, one source or a weighted blend.

    sources = [("corpus", 0.7), ("code", 0.3)]
    dataset = build_dataset(sources, sequence_length=1024, num_samples=64_000, seed=0, cache=folder)
    dataset[0]["tokens"]   # [1024]

Sample i depends on the data, sequence_length, seed and weights only: asking for more samples (a
longer run) leaves the earlier ones as they were.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from moe.data.manifest import check_same_tokenizer, identify_tokenizer, read_manifest
from moe.data.tokenise import load_tokenizer
from moe.errors import UserError

Boundaries = Literal["none", "positions", "attention"]
"""What a document's end in the middle of a sequence means.

none: nothing, the sequence is one text. positions: position ids restart, and no loss is taken on
the first token of the next document. attention: also no token attends across it.
"""

Sample = dict[str, Tensor]
"""tokens [S] int64, labels [S] int64 (the next tokens), loss_mask [S] float32, position_ids [S]
int64; with boundaries `positions` also attention_mask [S] int64, all ones.

Give the model the attention_mask if there is one, None if not, and use_cache=False: transformers
keeps attention inside documents when position ids restart, and there is no mask and no cache.
"""


def build_dataset(
    sources: Sequence[tuple[str | Path, float]],
    *,
    sequence_length: int,
    num_samples: int | None,
    seed: int,
    cache: Path,
    document_boundaries: Boundaries = "none",
    tokenizer: str | None = None,
) -> Dataset[Sample]:
    """A dataset of `num_samples` samples drawn from the sources in proportion to their weights.

    sources: (PREFIX, weight > 0) of prepared data; each is shuffled, and again for every further
    pass over it. num_samples None: every sample of every source once, weights unused (validation).
    cache: folder for indices, on a file system all ranks share. tokenizer: the model's folder; the
    data must have been made with its vocabulary. Call on all ranks: rank 0 builds the indices.
    Raises UserError for data that cannot be used, Corrupt for damaged files.
    """
    if not sources:
        raise UserError("no data: list at least one source with its path and weight.")
    for path, weight in sources:
        if num_samples is not None and not weight > 0:
            raise UserError(f"{path}: weight={weight} must be positive. Leave the source out.")
    manifests = {str(path): read_manifest(Path(path)) for path, _ in sources}
    identities = {path: manifest.tokenizer for path, manifest in manifests.items()}
    if tokenizer is not None:
        identities[tokenizer] = identify_tokenizer(load_tokenizer(tokenizer))
    check_same_tokenizer(identities)
    for path, manifest in manifests.items():
        if manifest.tokens <= sequence_length:
            raise UserError(
                f"{path} has {manifest.tokens:,} tokens, fewer than one sequence of "
                f"{sequence_length:,} and the token after it. Lower data.sequence_length or "
                "prepare more documents."
            )
    from moe.data.packed import blend, open_packed  # megatron: four seconds

    parts = [
        open_packed(
            Path(path),
            manifests[str(path)],
            sequence_length=sequence_length,
            seed=seed,
            cache=cache,
            document_boundaries=document_boundaries,
        )
        for path, _ in sources
    ]
    return blend(parts, [weight for _, weight in sources], num_samples)
