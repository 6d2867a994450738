"""Data of the local tasks, read from the folder that `--data` names; nothing comes from a hub."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from moe.errors import UserError, raise_all

DOCUMENTS = (".txt", ".py", ".md", ".rst", ".jsonl")


def _find(data: str | None, *files: str) -> list[Path]:
    """Files of the data folder. Raises UserError with every one that is missing."""
    if data is None:
        names = " and ".join(files)
        raise UserError(f"this task reads {names} from a data folder: name it with --data.")
    paths = [Path(data) / file for file in files]
    raise_all(
        [
            f"{path} does not exist: put {file} into the folder given by --data."
            for path, file in zip(paths, files, strict=True)
            if not path.is_file()
        ]
    )
    return paths


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises UserError with the line that is none."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # texts may hold any other
        if not line.strip():
            continue
        try:
            found.append(json.loads(line.decode()))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}). Mend it.") from error
        if not isinstance(found[-1], dict):
            raise UserError(f"{path}: line {number} is no object. Mend it.")
    if not found:
        raise UserError(f"{path} is empty: put the data set's own file there.")
    return found


def jsonl(data: str | None = None, files: dict | None = None, **_: Any) -> DatasetDict:
    """JSON lines, one file a split."""
    assert files is not None
    paths = _find(data, *files.values())
    rows = [Dataset.from_list(_rows(path)) for path in paths]
    return DatasetDict(dict(zip(files, rows, strict=True)))


def piqa(data: str | None = None, **_: Any) -> DatasetDict:
    """PIQA's questions and their labels, which come in a file of their own."""
    questions, answers = _find(data, "piqa/valid.jsonl", "piqa/valid-labels.lst")
    rows, labels = _rows(questions), answers.read_text(errors="replace").split()
    if len(rows) != len(labels):
        raise UserError(f"{data}/piqa: {len(rows)} questions but {len(labels)} labels.")
    raise_all(
        [
            f"{answers}: label {number} is {label!r}, the answers are 0 and 1. Mend it."
            for number, label in enumerate(labels, 1)
            if label not in ("0", "1")
        ]
    )
    merged = [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]
    return DatasetDict({"validation": Dataset.from_list(merged)})


def wikitext(data: str | None = None, **_: Any) -> DatasetDict:
    """WikiText-2's test text, cut into its articles."""
    pages: list[list[str]] = []
    (path,) = _find(data, "wikitext2/test.txt")
    for line in path.read_text().splitlines(keepends=True):
        title = line.startswith(" = ") and not line.startswith(" = = ")
        if title or not pages:
            pages.append([])
        pages[-1].append(line)
    texts = ["".join(page) for page in pages]
    return DatasetDict({"test": Dataset.from_list([{"page": t} for t in texts if t.strip()])})


def text(data: str | None = None, domain: str = "", **_: Any) -> DatasetDict:
    """Every file of DOCUMENTS under `text/`, or under one domain's folder there.

    A file is a document, of .jsonl a line's `text`.
    """
    folder = Path(data or ".") / "text" / domain
    files = documents(folder)
    if data is None or not files:
        where = f"text/{domain}".rstrip("/")
        kinds = ", ".join(f"*{suffix}" for suffix in DOCUMENTS)
        raise UserError(f"this task reads {where}/ ({kinds}) from the folder of --data.")
    pages = [page for path in files for page in _pages(path) if page.strip()]
    if not pages:
        raise UserError(f"{folder}: its {len(files)} files hold no text.")
    return DatasetDict({"test": Dataset.from_list([{"page": p} for p in pages])})


def documents(folder: Path) -> list[Path]:
    """The files of text below a folder, but hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in DOCUMENTS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _pages(path: Path) -> list[str]:
    if path.suffix != ".jsonl":
        return [path.read_text(encoding="utf-8", errors="replace")]
    try:
        return [str(row["text"]) for row in _rows(path)]
    except KeyError as error:
        raise UserError(f"{path}: each line is to be an object with a `text`.") from error


def perplexities(doc: dict[str, Any], results: Any) -> dict[str, tuple[float, int]]:
    """A document's log-likelihood with the tokens, words and bytes that it is spread over."""
    ((likelihood, tokens),) = results
    words, size = len(doc["page"].split()), len(doc["page"].encode())
    return {
        "token_perplexity": (likelihood, tokens),
        "word_perplexity": (likelihood, words),
        "byte_perplexity": (likelihood, size),
        "bits_per_byte": (likelihood, size),
    }


def perplexity(items: Sequence[tuple[float, int]]) -> float:
    """exp of the mean loss, or the largest float where a text without spaces is too unlikely."""
    likelihoods, sizes = zip(*items, strict=True)
    try:
        return math.exp(-sum(likelihoods) / sum(sizes))
    except OverflowError:
        return sys.float_info.max
