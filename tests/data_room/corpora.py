"""What tests of data share: a tokenizer trained on the spot, problems of GSM8K."""

import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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


def problems(path: Path) -> list[str]:
    """The questions of a file of GSM8K."""
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]
