"""Windows of real text to calibrate on: documents cut, never padded.

windows = read_windows(folder, Path("text.txt"), 16_384, config)
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import UserError, raise_all
from moe.model import RoutedLlamaConfig
from moe.upcycle.tokenizer import load_tokenizer, refusal

TOKENS = 16_384  # by default
WINDOW = 1024
CHARACTERS = 16  # per token, at most
UNKNOWN = 0.1  # share of unknown tokens that is still this model's text


def read_windows(folder: Path, text: Path, tokens: int, config: RoutedLlamaConfig) -> list[Tensor]:
    """The first `tokens` tokens of a text, as ids [S] of at most WINDOW tokens each.

    A document begins a window; a `.jsonl` file has one a line, any other file is one. Raises
    UserError where there are too few for the fit, or they are not of this model's vocabulary.
    """
    tokenizer = tokenizer_of(folder)
    windows: list[Tensor] = []
    left = tokens
    for document in documents(text, CHARACTERS * tokens):
        windows += cut(tokenizer, document, left, config)
        left = tokens - sum(map(len, windows))
        if left < 2:
            break
    require_use(folder, text, tokenizer, windows, tokens, config)
    return windows


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises UserError where there is none to be used."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # transformers raises what it likes over a bad tokenizer
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        missing = f"{folder} has no tokenizer to calibrate with ({reason}). Add its files."
        raise UserError(refusal(folder, error, missing)) from error


def cut(tokenizer: Any, document: str, most: int, config: RoutedLlamaConfig) -> list[Tensor]:
    """A document's first tokens, at most so many, as windows of at least two."""
    length = min(WINDOW, config.max_position_embeddings)
    given = tokenizer(document[: CHARACTERS * most], add_special_tokens=False)["input_ids"]
    ids = torch.tensor(given[:most], dtype=torch.long)
    return [window for window in ids.split(length) if len(window) > 1]


def require_use(
    folder: Path,
    text: Path,
    tokenizer: Any,
    windows: list[Tensor],
    asked: int,
    config: RoutedLlamaConfig,
) -> None:
    """Raise UserError where there are too few tokens, or not of this model's vocabulary."""
    _require_enough(text, windows, asked, config.hidden_size)
    unknown = tokenizer.unk_token_id
    _require_vocabulary(folder, text, torch.cat(windows), unknown, config.vocab_size)


def documents(text: Path, characters: int) -> Iterator[str]:
    """The documents of a file, no more than so many characters of it where it is one."""
    try:
        with text.open(encoding="utf-8") as file:
            if text.suffix != ".jsonl":
                yield file.read(characters)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield document_of(text, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibrate {text} cannot be read: {error}") from error


def document_of(text: Path, number: int, line: str) -> str:
    """The text of a line of JSON. Raises UserError where it has none."""
    try:
        found = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = error
    if not isinstance(found, str):
        raise UserError(
            f'--calibrate {text}: line {number} is no object with a "text" ({found!r:.80}).'
        )
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--calibrate {text}: line {number} is no Unicode text ({error.reason}). Mend the "
            "line, or leave it out."
        ) from error
    return found


def required(hidden_size: int) -> int:
    """Tokens that a ridge regression on a layer's input needs: two for each of its numbers."""
    return 2 * (hidden_size + 1)


def _require_enough(text: Path, windows: list[Tensor], asked: int, hidden_size: int) -> None:
    count, needed = sum(map(len, windows)), required(hidden_size)
    if count >= needed:
        return
    rule = f"a router of {hidden_size} + 1 numbers a row needs at least 2 for each, {needed:,}"
    if asked < needed:
        raise UserError(f"--calibration-tokens {asked}: {rule}. Ask for more.")
    raise UserError(f"--calibrate {text} gives {count:,} tokens: {rule}. Give a longer text.")


def _require_vocabulary(
    folder: Path, text: Path, ids: Tensor, unknown: int | None, vocab_size: int
) -> None:
    problems = []
    if int(ids.max()) >= vocab_size:
        problems.append(
            f"the tokenizer of {folder} gives token {int(ids.max())}, the model has {vocab_size}: "
            "they do not belong together."
        )
    share = (ids == unknown).float().mean().item() if unknown is not None else 0.0
    if share > UNKNOWN:
        problems.append(
            f"--calibrate {text}: {share:.0%} of its tokens are unknown to the tokenizer of "
            f"{folder}, at most {UNKNOWN:.0%} may be. Give a text in the model's language."
        )
    raise_all(problems)


def require_sense(text: Path, perplexity: float, vocab_size: int) -> None:
    """Raise UserError where the model reads a text worse than one that knows nothing would."""
    bound = 2 * vocab_size  # a fresh model, all of whose guesses are equal, is at 1
    if not perplexity <= bound:
        raise UserError(
            f"--calibrate {text} has perplexity {perplexity:,.0f} under the source, where blind "
            f"guessing among its {vocab_size:,} tokens has {vocab_size:,} and {bound:,} is the "
            "most that is fitted to. Is it a text in the model's language, and the tokenizer its "
            "own?"
        )


def starts(windows: list[Tensor]) -> list[int]:
    """Number of the first token of each window."""
    return [0, *itertools.accumulate(map(len, windows))][:-1]
