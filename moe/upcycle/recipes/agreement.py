"""Whether several models can be mixed: the same shapes, vocabulary, tokenizer and positions."""

from collections.abc import Sequence
from typing import Any

import torch

from moe.errors import UserError
from moe.hf.families import routed_config
from moe.upcycle.source import Source, hash_file
from moe.upcycle.tokenizer import load_tokenizer

# what may differ between copies of one seed
IGNORED = {
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range",
    "source_model_type", "auto_map",
}  # fmt: skip


def require_agreement(sources: Sequence[Source], dtype: torch.dtype | None) -> None:
    """Raise UserError naming every field in which a source differs from the first, both values."""
    first, problems = sources[0], []
    ours = _fields(first)
    for other in sources[1:]:
        if other.folder == first.folder:
            continue
        theirs = _fields(other)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                problems.append(
                    f"{name} is {ours.get(name)!r} in {first.folder} and {theirs.get(name)!r} in "
                    f"{other.folder}: only models of one shape can be mixed."
                )
        if not problems and dtype is None and _dtypes(first) != _dtypes(other):
            problems.append(
                f"weights are {', '.join(_dtypes(first))} in {first.folder} and "
                f"{', '.join(_dtypes(other))} in {other.folder}. Give --dtype."
            )
        if differs := _tokenizer_difference(first, other):
            problems.append(f"{differs}: their embeddings cannot be averaged.")
    if problems:
        raise UserError("\n".join(problems))


def _fields(source: Source) -> dict[str, Any]:
    try:
        fields = routed_config(source.config).to_dict()
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from None
    return {k: v for k, v in fields.items() if k not in IGNORED}


def _dtypes(source: Source) -> list[str]:
    return sorted({str(t.dtype).removeprefix("torch.") for t in source.tensors.values()})


def _tokenizer_difference(first: Source, other: Source) -> str:
    """What tells two tokenizers apart: nothing where the files or the vocabularies are equal.

    Without a tokenizer there is nothing to compare.
    """
    files = [s.folder / "tokenizer.json" for s in (first, other)]
    if all(f.is_file() for f in files) and hash_file(files[0]) == hash_file(files[1]):
        return ""
    try:
        left, right = (load_tokenizer(s.folder).get_vocab() for s in (first, other))
    except Exception:  # transformers raises what it likes where there is none
        return ""
    if left == right:
        return ""
    names = (left.keys() | right.keys()) - {t for t in left if left[t] == right.get(t)}
    token = min(names, key=lambda t: (left.get(t, len(left)), t))
    ids = [f"{v[token]}" if token in v else "no token" for v in (left, right)]
    return (
        f"the tokenizers differ, {len(left)} tokens in {first.folder} and {len(right)} in "
        f"{other.folder}: {token!r} is {ids[0]} in the one and {ids[1]} in the other"
    )
