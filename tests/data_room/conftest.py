"""A tokenizer trained on the spot, and small data sets prepared from real text."""

import sysconfig
from pathlib import Path

import pytest
from corpora import train_tokenizer
from data import shared

from moe.data.prepare import prepare
from moe.data.sources import SourceOptions

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    return str(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="</s>"))


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("other")
    return str(train_tokenizer(folder, vocab_size=400, eos_token="</s>"))


@pytest.fixture(scope="session")
def code(tmp_path_factory) -> Path:
    """A folder of some of Python's own sources."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "nested").mkdir()
    for index, path in enumerate(sorted(STDLIB.glob("[a-d]*.py"))):
        target = folder / "nested" if index % 3 == 0 else folder
        (target / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def maths(tmp_path_factory) -> Path:
    """The first 300 problems of GSM8K's training split, as JSON lines."""
    lines = shared("gsm8k/train.jsonl").read_text().splitlines(keepends=True)[:300]
    path = tmp_path_factory.mktemp("maths") / "maths.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def maths_prefix(maths, tokenizer, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("prepared") / "maths"
    options = SourceOptions(text_fields=("question",))
    prepare([str(maths)], tokenizer, prefix, options=options, quiet=True)
    return prefix


@pytest.fixture(scope="session")
def code_prefix(code, tokenizer, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("prepared") / "code"
    prepare([str(code)], tokenizer, prefix, workers=1, quiet=True)
    return prefix
