"""Data of the local tasks, read from the folder that `--data` names; nothing comes from a hub."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from moe.errors import UserError

PAGE = 4000  # characters


def _open(data: str | None, relative: str) -> Path:
    if data is None:
        raise UserError(f"this task reads {relative} from a data folder: name it with --data.")
    path = Path(data) / relative
    if not path.is_file():
        raise UserError(f"{path} does not exist: put {relative} into the folder given by --data.")
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def jsonl(data: str | None = None, files: dict | None = None, **_: Any) -> DatasetDict:
    """JSON lines, one file a split."""
    assert files is not None
    return DatasetDict({s: Dataset.from_list(_rows(_open(data, f))) for s, f in files.items()})


def piqa(data: str | None = None, **_: Any) -> DatasetDict:
    """PIQA's questions and their labels, which come in a file of their own."""
    rows = _rows(_open(data, "piqa/valid.jsonl"))
    labels = _open(data, "piqa/valid-labels.lst").read_text().split()
    if len(rows) != len(labels):
        raise UserError(f"{data}/piqa: {len(rows)} questions but {len(labels)} labels.")
    merged = [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]
    return DatasetDict({"validation": Dataset.from_list(merged)})


def wikitext(data: str | None = None, **_: Any) -> DatasetDict:
    """WikiText-2's test text, cut into its articles."""
    pages: list[list[str]] = []
    for line in _open(data, "wikitext2/test.txt").read_text().splitlines(keepends=True):
        title = line.startswith(" = ") and not line.startswith(" = = ")
        if title or not pages:
            pages.append([])
        pages[-1].append(line)
    texts = ["".join(page) for page in pages]
    return DatasetDict({"test": Dataset.from_list([{"page": t} for t in texts if t.strip()])})


def text(data: str | None = None, domain: str = "", **_: Any) -> DatasetDict:
    """Every .txt and .py file under `text/`, or one domain's folder there, cut at line ends into
    pages of PAGE characters.
    """
    folder = Path(data or ".") / "text" / domain
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".py"))
    if data is None or not files:
        where = f"text/{domain}".rstrip("/")
        raise UserError(f"this task reads {where}/*.txt and *.py from the folder of --data.")
    pages = []
    for path in files:
        page = ""
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            page += line
            if len(page) >= PAGE:
                pages.append(page)
                page = ""
        if page.strip():
            pages.append(page)
    return DatasetDict({"test": Dataset.from_list([{"page": p} for p in pages])})


def perplexities(doc: dict[str, Any], results: Any) -> dict[str, tuple[float, int]]:
    """Log-likelihood with the words and bytes it is spread over."""
    (likelihood,) = results
    words, size = len(doc["page"].split()), len(doc["page"].encode())
    return {
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
