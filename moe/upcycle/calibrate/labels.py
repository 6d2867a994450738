"""Text of several domains for the routers of a mixture, each line labelled with its source or none.

windows = read_labelled(branches, folders, Path("text.jsonl"), 16_384, config)
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moe.errors import UserError
from moe.model import RoutedLlamaConfig
from moe.upcycle.calibrate.parts import Branches
from moe.upcycle.calibrate.text import cut, document_of, read_windows, require_use, tokenizer_of


class Line(NamedTuple):
    """One line of a text."""

    number: int
    text: str
    label: object  # None where it has none


def read_labelled(
    branches: Branches, folders: Sequence[Path], text: Path, tokens: int, config: RoutedLlamaConfig
) -> list[Tensor]:
    """Windows of a text, as many tokens of each label; `branches` gets their labels and a target.

    A text without labels is read from its beginning. Raises UserError where it is of no use, or a
    label is no source's number or folder name, or a source has no text.
    """
    first = next(_lines(text), None)
    if first is None or first.label is None:
        if branches.target == "label":
            raise UserError(
                f'--target label: --calibrate {text} has no labels. Give lines {{"text": …, '
                '"label": …}, the label a source\'s number or folder name, or use --target loss.'
            )
        branches.target = "loss"
        _require_no_label(text)
        return read_windows(folders[0], text, tokens, config)
    branches.target = branches.target or "label"
    tokenizer, share = tokenizer_of(folders[0]), tokens // len(folders)
    sources = _sources(folders)
    windows: list[tuple[Hashable, Tensor]] = []
    left: dict[Hashable, int] = {}
    if branches.target == "label":
        left = dict.fromkeys(range(len(folders)), share)
    for line in _lines(text):
        key = _label(text, line, sources if branches.target == "label" else None)
        if left.setdefault(key, share) > 1:
            own = cut(tokenizer, line.text, left[key], config)
            left[key] -= sum(map(len, own))
            windows += [(key, window) for window in own]
        read = sum(len(window) for _, window in windows)
        if read > tokens - 2 or (len(left) >= len(folders) and max(left.values()) < 2):
            break
    if branches.target == "label":
        _require_each(text, folders, [key for key, _ in windows])
        branches.labels = [key for key, _ in windows if isinstance(key, int)]
    found = [window for _, window in windows]
    require_use(folders[0], text, tokenizer, found, tokens, config)
    return found


def _lines(text: Path) -> Iterator[Line]:
    """The lines that are not empty; none of a file that is not of JSON lines."""
    if text.suffix != ".jsonl":
        return
    try:
        with text.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = document_of(text, number, line)
                    yield Line(number, found, json.loads(line).get("label"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibrate {text} cannot be read: {error}") from error


def _require_no_label(text: Path) -> None:
    for line in _lines(text):
        if line.label is not None:
            raise UserError(
                f"--calibrate {text}: line {line.number} has a label and the first one has none. "
                "Give every line one, or none of them."
            )


def _sources(folders: Sequence[Path]) -> dict[object, int]:
    """Numbers and names of sources; a name that two of them have is none."""
    names = [folder.resolve().name for folder in folders]
    found: dict[object, int] = {number: number for number in range(len(folders))}
    return found | {name: i for i, name in enumerate(names) if names.count(name) == 1}


def _label(text: Path, line: Line, sources: dict[object, int] | None) -> Hashable:
    """The source that a label means; any label is as good where they only tell domains apart."""
    if line.label is None:
        raise UserError(
            f"--calibrate {text}: line {line.number} has no label and the first one has one. Give "
            "every line one, or none of them."
        )
    if isinstance(line.label, bool) or not isinstance(line.label, int | str):
        raise UserError(
            f"--calibrate {text}: line {line.number} has the label {line.label!r:.80}, which is "
            "neither a number nor a name."
        )
    if sources is None:
        return line.label
    if line.label not in sources:
        names = ", ".join(name for name in sources if isinstance(name, str))
        last = sum(isinstance(name, int) for name in sources) - 1
        raise UserError(
            f"--calibrate {text}: line {line.number} has the label {line.label!r:.80}, which is no "
            f"source. Use a number from 0 to {last}" + (f", or {names}." if names else ".")
        )
    return sources[line.label]


def of_little(
    branches: Branches, folders: Sequence[Path], text: Path, tokens: int, windows: Sequence[Tensor]
) -> list[str]:
    """What to say of the sources that have less than half of their share of the tokens."""
    found, share = [], tokens // len(folders)
    for number, folder in enumerate(folders if branches.labels else ()):
        pairs = zip(branches.labels, windows, strict=True)
        count = sum(len(window) for label, window in pairs if label == number)
        if 2 * count < share:
            found.append(
                f"--calibrate {text} has {count:,} tokens for source {number} ({folder}), of "
                f"{share:,} that each is to have: little to tell it from the others by."
            )
    return found


def _require_each(text: Path, folders: Sequence[Path], labels: Sequence[Hashable]) -> None:
    """Raise UserError naming every source that has no text."""
    missing = [f"{i} ({f})" for i, f in enumerate(folders) if i not in set(labels)]
    if missing:
        raise UserError(
            f"--calibrate {text} has no text for source {', '.join(missing)}: each needs some to "
            "be told from the others. Add lines with its label, or use --target loss."
        )
