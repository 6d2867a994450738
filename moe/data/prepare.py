"""`moe data prepare`: documents to PREFIX.bin, PREFIX.idx (Megatron's IndexedDataset), PREFIX.json.

    prepare(["corpus.jsonl"], "model-folder", Path("corpus"))

Written under partial names and renamed when complete, PREFIX.json last.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy

from moe.data.manifest import (
    Manifest,
    TokenizerIdentity,
    identify_tokenizer,
    path_of,
    record_file,
    write_manifest,
)
from moe.data.sources import Source, SourceOptions, open_sources
from moe.data.tokenise import TokenBatch, load_tokenizer, tokenise
from moe.errors import UserError
from moe.progress import Progress, duration

EXTENSIONS = ("bin", "idx", "json")  # the order they are published in: the last one is the proof


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was written, and what was left out. validation is None unless it was asked for."""

    train: Manifest
    validation: Manifest | None
    empty: int
    undecodable: tuple[str, ...]


def prepare(
    names: Sequence[str],
    tokenizer: str,
    prefix: Path,
    *,
    options: SourceOptions | None = None,
    workers: int | None = None,
    validation: float = 0.0,
    limit_documents: int | None = None,
    quiet: bool = False,
) -> Prepared:
    """Tokenise all documents of the named sources into one data set, in the order given.

    validation: fraction of the documents, chosen by hash of content, that goes to
    PREFIX-validation instead. limit_documents: read this many and stop.
    """
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation} is not a fraction. Use 0 to below 1.")
    prefixes = {False: prefix}
    if validation:
        prefixes[True] = prefix.with_name(f"{prefix.name}-validation")
    for output in prefixes.values():
        _refuse_existing(output)
    identity = identify_tokenizer(load_tokenizer(tokenizer))
    sources = open_sources(names, options or SourceOptions())
    texts = itertools.islice(
        itertools.chain.from_iterable(source.texts for source in sources), limit_documents
    )
    workers = workers or len(os.sched_getaffinity(0))
    batches = tokenise(texts, tokenizer, workers=workers, validation=validation)
    progress = _TokeniseProgress(_total(sources, limit_documents), quiet)
    with _telling_disk_errors(prefix), ExitStack() as cleanup:
        cleanup.enter_context(closing(batches))
        writers = {}
        for held_out, output in prefixes.items():
            writers[held_out] = _Writer(output, identity)
            cleanup.callback(writers[held_out].discard)
        with progress:
            empty = _write(batches, writers, progress)
        undecodable = [name for source in sources for name in source.undecodable]
        _check_amounts(writers, empty, len(undecodable))
        written = {held_out: writers[held_out].finish(names) for held_out in writers}
        for held_out in sorted(writers, reverse=True):  # the main set last: it implies the other
            writers[held_out].publish()
    return Prepared(
        train=written[False],
        validation=written.get(True),
        empty=empty,
        undecodable=tuple(undecodable),
    )


@contextmanager
def _telling_disk_errors(prefix: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of sources they are UserErrors already
        raise UserError(
            f"{prefix} cannot be written: {error.strerror}. Nothing was left behind."
        ) from error


def _write(
    batches: Iterator[TokenBatch], writers: dict[bool, "_Writer"], progress: "_TokeniseProgress"
) -> int:
    """Give every document to its writer; return how many were empty."""
    empty = 0
    for batch in batches:
        for tokens, held_out in batch.documents():
            writers[held_out].add(tokens)
        empty += batch.empty
        progress.count(batch)
    return empty


class _Writer:
    """One data set being written under partial names."""

    def __init__(self, prefix: Path, identity: TokenizerIdentity) -> None:
        from moe.data.indexed import DType, IndexedDatasetBuilder

        self.prefix, self.identity = prefix, identity
        self.documents = self.tokens = 0
        self.dtype = DType.optimal_dtype(identity.vocab_size)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.builder = IndexedDatasetBuilder(str(self._partial("bin")), dtype=self.dtype)

    def _partial(self, extension: str) -> Path:
        final = path_of(self.prefix, extension)
        return final.with_name(f"{final.name}.partial")

    def add(self, tokens: numpy.ndarray) -> None:
        self.builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self, sources: Sequence[str]) -> Manifest:
        """Complete the three files, still under partial names."""
        self.builder.finalize(str(self._partial("idx")))
        manifest = Manifest(
            tokenizer=self.identity,
            documents=self.documents,
            tokens=self.tokens,
            dtype=numpy.dtype(self.dtype).name,
            bin=record_file(self._partial("bin")),
            idx=record_file(self._partial("idx")),
            sources=tuple(sources),
        )
        write_manifest(self._partial("json"), manifest)
        return manifest

    def publish(self) -> None:
        for extension in EXTENSIONS:
            self._partial(extension).rename(path_of(self.prefix, extension))

    def discard(self) -> None:
        """Remove what was not published."""
        with suppress(OSError):  # a full disk has been told of already
            self.builder.data_file.close()
        for extension in EXTENSIONS:
            self._partial(extension).unlink(missing_ok=True)


class _TokeniseProgress(Progress):
    """Documents, tokens, rate in text read and time left."""

    def __init__(self, documents: int | None, quiet: bool) -> None:
        super().__init__("prepare", documents, "documents", quiet)
        self.tokens = self.bytes = 0

    def count(self, batch: TokenBatch) -> None:
        self.tokens += len(batch.tokens)
        self.bytes += batch.bytes
        self.advance(len(batch.lengths) + batch.empty)

    def line(self, seconds: float, final: bool) -> str:
        share = f" ({min(1.0, self.done / self.total):.0%})" if self.total and not final else ""
        rate = self.bytes / 1e6 / max(seconds, 1e-9)
        text = (
            f"prepare: {self.done:,.0f} documents{share}, {self.tokens / 1e6:,.2f} M tokens, "
            f"{rate:.2f} MB/s"
        )
        if final:
            return f"{text}, took {duration(seconds)}"
        if self.total and self.done:
            text += f", {duration(max(0.0, self.total / self.done - 1) * seconds)} left"
        return text


def _total(sources: list[Source], limit: int | None) -> int | None:
    counts = [source.documents for source in sources]
    if None in counts:
        return limit
    total = sum(count for count in counts if count is not None)
    return total if limit is None else min(total, limit)


def _refuse_existing(prefix: Path) -> None:
    for path in (path_of(prefix, extension) for extension in EXTENSIONS):
        if path.exists():
            raise UserError(f"{path} exists. Remove it or choose another --out.")


def _check_amounts(writers: dict[bool, _Writer], empty: int, undecodable: int) -> None:
    documents = sum(writer.documents for writer in writers.values())
    if not documents:
        raise UserError(
            f"no document to write: {empty} empty, {undecodable} not UTF-8. Check the sources, "
            "--pattern and --text-field."
        )
    for held_out, writer in writers.items():
        if not writer.documents:
            side = "validation" if held_out else "training"
            raise UserError(
                f"none of the {documents} documents fell to {side}. Change --validation, or give "
                "more documents."
            )
