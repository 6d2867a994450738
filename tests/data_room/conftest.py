"""A tokenizer trained on the spot, and small data sets prepared from real text."""

import json
import sysconfig
from pathlib import Path

import pytest
from data import shared
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe.data.prepare import prepare
from moe.data.sources import SourceOptions

STDLIB = Path(sysconfig.get_path("stdlib"))


def train_tokenizer(folder: Path, vocab_size: int = 512, **special: str) -> Path:
    """A byte-level BPE tokenizer of Python's own sources, saved as transformers saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [(STDLIB / f"{name}.py").read_text() for name in ("ast", "enum", "json/decoder")]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **special)
    fast.save_pretrained(folder)
    return folder


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


def problems(path: Path) -> list[str]:
    """The questions of a file of GSM8K."""
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


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
