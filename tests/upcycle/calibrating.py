"""What tests of calibration share: a text for the tiny tokenizer, a model that reads it no worse
than blindly, one whose heads matter where they are meant to, and calls of the pieces.
"""

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from invoke import moe
from torch import Tensor

from moe.progress import Progress
from moe.upcycle.calibrate.fitting import Calibration
from moe.upcycle.calibrate.journal import Journal
from moe.upcycle.calibrate.parts import Part
from moe.upcycle.calibrate.ranks import Alone
from moe.upcycle.calibrate.text import read_windows
from moe.upcycle.recipes.conversion import config_of
from moe.upcycle.source import Source

TOKENS = 1500
DEAD, ALWAYS, SOMETIMES = 4, 2, 7  # heads of the planted model's first layer
CLASS = "abcdefghijklm"  # letters that the last of them is for


def letters(seed: int, count: int = 4000) -> str:
    """Random letters: text that the tiny tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 60, (count,), generator=generator).tolist()
    return "".join(tiny.LETTERS[i] for i in chosen)


def write(folder: Path, model: Any) -> Path:
    """A model folder whose guesses are nearly equal, so that any text is of its language."""
    model.model.norm.weight.data *= 0.05
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def source(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    return write(folder, tiny.dense_model(family, **overrides))


def text(path: Path, seed: int = 0) -> Path:
    path.write_text(letters(seed))
    return path


def planted(folder: Path) -> Path:
    """A model in whose first layer each token sees itself alone, one head adds nothing, one most of
    all, one something to tokens of CLASS alone, and the others little.
    """
    model = tiny.dense_model("mistral", sliding_window=1, num_key_value_heads=9)
    ids = tiny.tokenizer().convert_tokens_to_ids(list(CLASS))
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 0] = 0.0
    embedding[ids, 0] = embedding.square().mean().sqrt() * 4
    attention = model.model.layers[0].self_attn
    value, output = attention.v_proj.weight.data, attention.o_proj.weight.data
    value *= 0.1
    rows = [slice(8 * head, 8 * head + 8) for head in range(9)]
    output[:, rows[DEAD]] = 0.0
    value[rows[ALWAYS]] *= 50
    value[rows[SOMETIMES]] = 0.0
    value[rows[SOMETIMES], 0] = 1.0
    return write(folder, model)


def windows(folder: Path, file: Path, tokens: int = TOKENS) -> list[Tensor]:
    return read_windows(folder, file, tokens, config_of(Source.open(folder)))


def calibration(folder: Path, file: Path, journal: Path, *parts: Part, **options: Any) -> Any:
    """A calibration of these parts of all layers, about to begin."""
    opened = Source.open(folder)
    layers = options.get("layers", range(opened.config.num_hidden_layers))
    given = options.get("windows") or windows(folder, file)
    place = Journal(journal), options.get("ranks") or Alone(), True
    return Calibration(opened, list(layers), list(parts), given, "key", *place)


def quiet() -> Progress:
    return Progress("", None, "tokens", quiet=True)


def upcycle(*arguments: object) -> None:
    """The command, in a process or rank of its own; says what failed."""
    result = moe("upcycle", *arguments)
    if result.code:
        print(result.err, file=sys.stderr)
        raise SystemExit(result.code)
