"""PREFIX.json: what is in PREFIX.bin and PREFIX.idx, and with which tokenizer it was made.

    manifest = read_manifest(Path("corpus"))   # UserError when there is none
    verify_files(Path("corpus"))               # Corrupt when a byte differs

It is written last, so a prefix that has one is complete.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from moe.errors import Corrupt, UserError
from moe.jsonfile import read_json

BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerIdentity:
    """What token ids mean. `hash` covers the vocabulary: equal hashes, interchangeable ids."""

    hash: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and xxh3-128 of one written file."""

    bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One prepared data set. tokens counts the EOS that ends each document."""

    tokenizer: TokenizerIdentity
    documents: int
    tokens: int
    dtype: str
    bin: FileRecord
    idx: FileRecord
    sources: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Names the content: indices cached for other content are never taken for this one's."""
        return f"{self.bin.xxh3[:16]}-{self.idx.xxh3[:16]}"


def identify_tokenizer(tokenizer: Any) -> TokenizerIdentity:
    """Identity of a transformers tokenizer. Raises UserError if it has no EOS token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has no EOS token, and documents end with it. "
            'Set "eos_token" in its tokenizer_config.json.'
        )
    vocabulary = sorted((token, index) for token, index in tokenizer.get_vocab().items())
    content = json.dumps(vocabulary, ensure_ascii=True).encode()
    return TokenizerIdentity(
        hash=xxhash.xxh3_128_hexdigest(content),
        vocab_size=max(len(vocabulary), 1 + max(index for _, index in vocabulary)),
        eos_id=tokenizer.eos_token_id,
    )


def path_of(prefix: Path, extension: str) -> Path:
    """PREFIX.extension; a prefix may itself contain dots."""
    return prefix.with_name(f"{prefix.name}.{extension}")


def record_file(path: Path) -> FileRecord:
    """Hash a file that was written, and force it to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _record(path)


def _record(path: Path) -> FileRecord:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, xxh3=digest.hexdigest())


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as JSON."""
    path.write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(prefix: Path) -> Manifest:
    """Read PREFIX.json and compare the sizes of PREFIX.bin and PREFIX.idx with it.

    Raises UserError when there is no such data, Corrupt when a file is damaged.
    """
    path = path_of(prefix, "json")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: {prefix} is not prepared data. "
            "Give the --out of `moe data prepare`, without extension."
        )
    try:
        values = read_json(path)
        values["tokenizer"] = TokenizerIdentity(**values["tokenizer"])
        values["bin"] = FileRecord(**values["bin"])
        values["idx"] = FileRecord(**values["idx"])
        values["sources"] = tuple(values["sources"])
        manifest = Manifest(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"{path} is not the manifest of prepared data: {error!r}. Prepare the data again."
        ) from error
    for extension, record in (("bin", manifest.bin), ("idx", manifest.idx)):
        data = path_of(prefix, extension)
        size = data.stat().st_size if data.is_file() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise Corrupt(f"{data} {found}, {path.name} says {record.bytes:,}. Prepare it again.")
    return manifest


def verify_files(prefix: Path) -> Manifest:
    """Read both files whole and compare their hashes. Raises Corrupt naming the file."""
    manifest = read_manifest(prefix)
    for extension, record in (("bin", manifest.bin), ("idx", manifest.idx)):
        path = path_of(prefix, extension)
        if (found := _record(path)) != record:
            raise Corrupt(f"{path}: xxh3 {found.xxh3}, expected {record.xxh3}. Prepare it again.")
    return manifest


def check_same_tokenizer(manifests: dict[str, TokenizerIdentity]) -> None:
    """Raise UserError unless all the named identities give token ids the same meaning."""
    (name, first), *others = manifests.items()
    for other, identity in others:
        if identity.hash != first.hash or identity.eos_id != first.eos_id:
            raise UserError(
                f"{name} and {other} have different tokenizers ({first.vocab_size} and "
                f"{identity.vocab_size} tokens, EOS {first.eos_id} and {identity.eos_id}). "
                "Prepare all data with the tokenizer of the model."
            )
