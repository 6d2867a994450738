"""Text to token ids, in parallel and in order: the same output for any number of workers.

    for batch in tokenise(texts, folder, workers=8, validation=0.01): ...

A batch is about a megabyte of documents. Workers are processes; each loads the tokenizer once.
"""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy
import xxhash

from moe.errors import UserError

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
FEW_BATCHES = 8  # done in this process before the first worker would have started
BATCHES_PER_WORKER = 3  # in flight, so that a slow reader or writer leaves no worker idle


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Documents as token ids, each ended by EOS, one after the other.

    tokens [sum of lengths] int32; lengths [documents] int64; held_out [documents] bool: whether
    the document belongs to the validation set; bytes: of text read; empty: documents left out.
    """

    tokens: numpy.ndarray
    lengths: numpy.ndarray
    held_out: numpy.ndarray
    bytes: int
    empty: int

    def documents(self) -> Iterator[tuple[numpy.ndarray, bool]]:
        """Each document's tokens, and whether it is held out for validation."""
        ends = numpy.cumsum(self.lengths)
        for end, length, held_out in zip(ends, self.lengths, self.held_out, strict=True):
            yield self.tokens[end - length : end], bool(held_out)


def load_tokenizer(path: str) -> Any:
    """A transformers tokenizer from a model folder or hub id; never runs its code."""
    from transformers import AutoTokenizer, logging

    import moe.model  # noqa: F401  (a RoutedLlama folder's config is read on the way)

    logging.set_verbosity_error()  # documents longer than the model's context are as it should be
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes over a bad file
        from moe.upcycle.tokenizer import refusal

        missing = (
            f"{path} has no tokenizer that can be loaded: {error} "
            "Give a model folder that has tokenizer.json."
        )
        raise UserError(refusal(path, error, missing)) from error


def tokenise(
    texts: Iterable[str], tokenizer: str, *, workers: int, validation: float
) -> Generator[TokenBatch, None, None]:
    """Tokenise documents on `workers` processes, in the order they come.

    A document is framed as the tokenizer frames it (BOS, if it adds one) and ended by EOS.
    Whether it is held out depends on its own content only: xxh3(text) < validation · 2⁶⁴.
    """
    batches = _batches(texts)
    head = list(itertools.islice(batches, FEW_BATCHES + 1))
    batches = itertools.chain(head, batches)
    if workers == 1 or len(head) <= FEW_BATCHES:
        encode = _encoder(tokenizer, validation)
        yield from map(encode, batches)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, validation),
    )
    try:
        pending = deque(
            pool.submit(_encode, batch)
            for batch in itertools.islice(batches, workers * BATCHES_PER_WORKER)
        )
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_encode, batch) for batch in itertools.islice(batches, 1))
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} tokenising workers was killed, most often for lack of memory. "
            "Use fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoder(path: str, validation: float) -> Callable[[list[str]], TokenBatch]:
    tokenizer = load_tokenizer(path)
    eos = tokenizer.eos_token_id
    threshold = int(validation * 2**64)

    def encode(batch: list[str]) -> TokenBatch:
        texts = [text for text in batch if text.strip()]
        ids = tokenizer(texts)["input_ids"] if texts else []
        ended = [row if row and row[-1] == eos else [*row, eos] for row in ids]
        return TokenBatch(
            tokens=numpy.fromiter(itertools.chain.from_iterable(ended), dtype=numpy.int32),
            lengths=numpy.array([len(row) for row in ended], dtype=numpy.int64),
            held_out=numpy.array(
                [xxhash.xxh3_64_intdigest(text.encode()) < threshold for text in texts], dtype=bool
            ),
            bytes=sum(len(text.encode()) for text in batch),
            empty=len(batch) - len(texts),
        )

    return encode


_encode_here: Callable[[list[str]], TokenBatch]


def _start_worker(path: str, validation: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    global _encode_here  # noqa: PLW0603  (a pool's initializer has nowhere else to leave it)
    _encode_here = _encoder(path, validation)


def _encode(batch: list[str]) -> TokenBatch:
    return _encode_here(batch)
