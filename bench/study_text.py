"""Text of three domains for bench/study.py: code, prose and maths, most to train on, some held out.

texts = write_texts(folder, data)     # {"code": folder/code.jsonl, …}
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DOMAINS = ("code", "prose", "maths")
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages",
           "dist-packages", "turtledemo", "ensurepip"}  # fmt: skip
EOS = "<|end|>"


def code() -> Iterator[str]:
    """Modules of Python's library, tests and tables left out."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED & set(path.relative_to(library).parts) and path.stat().st_size > 1000:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def prose(data: Path) -> Iterator[str]:
    """WikiText-2's two files by article, and the reference of this Python."""
    for name in ("valid", "test"):
        article: list[str] = []
        for line in (data / "wikitext2" / f"{name}.txt").read_text().splitlines(keepends=True):
            if line.startswith(" = ") and not line.startswith(" = = ") and article:
                yield "".join(article)
                article = []
            article.append(line)
        yield "".join(article)
    yield from sorted(set(topics.values()))


def maths(data: Path) -> Iterator[str]:
    """GSM8K's questions with their worked answers, training part."""
    for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield f"{row['question']}\n{row['answer']}\n"


def write_texts(folder: Path, data: Path) -> dict[str, Path]:
    """A JSON lines file per domain."""
    sources = {"code": code(), "prose": prose(data), "maths": maths(data)}
    paths = {}
    for domain, documents in sources.items():
        paths[domain] = path = folder / f"{domain}.jsonl"
        if not path.exists():
            lines = [json.dumps({"text": text}) for text in documents if text.strip()]
            partial = path.with_suffix(".partial")
            partial.write_text("\n".join(lines) + "\n")
            partial.rename(path)
    return paths


def train_tokenizer(paths: dict[str, Path], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the three domains, the same amount of each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(path.stat().st_size for path in paths.values())
    texts = []
    for path in paths.values():
        taken = 0
        for line in path.read_text().splitlines():
            if taken < share:
                texts.append(json.loads(line)["text"])
                taken += len(texts[-1])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)
