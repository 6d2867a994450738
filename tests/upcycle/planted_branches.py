"""Three sources that each know letters of their own, and text of all: what routers between them are
fitted to in tests.
"""

import json
from pathlib import Path

import calibrating
import tiny
import torch

from moe.upcycle.calibrate.labels import read_labelled
from moe.upcycle.calibrate.parts import Branches
from moe.upcycle.recipes.conversion import config_of
from moe.upcycle.source import Source

NAMES = ("apple", "birch", "cedar")
OWN = [tiny.LETTERS[20 * i : 20 * i + 20] for i in range(3)]  # the letters that a source is for
TOKENS = 1200


def letters(source: int, seed: int, count: int = 100) -> str:
    generator = torch.Generator().manual_seed(100 * seed + source)
    return "".join(OWN[source][i] for i in torch.randint(0, 20, (count,), generator=generator))


def lines(path: Path, labels: tuple[object, ...] | None = NAMES) -> Path:
    """The domains' text, with labels sorted by domain: the first alone would fill a budget."""
    rows = []
    for source in range(3):
        own = {} if labels is None else {"label": labels[source]}
        rows += [{"text": letters(source, seed), **own} for seed in range(8)]
    if labels is None:
        rows = [row for seed in range(8) for row in rows[seed::8]]  # else the first would fill it
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plant(folder: Path, source: int) -> Path:
    """A model that expects letters of its own, through one number that is the same everywhere; the
    others' MLPs are not its own.
    """
    model = tiny.dense_model("mistral", sliding_window=64)
    model.model.embed_tokens.weight.data[:, 0] = 8 * model.model.embed_tokens.weight.std()
    ids = tiny.tokenizer().convert_tokens_to_ids(list(OWN[source]))
    model.lm_head.weight.data[ids, 0] += 3.0
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 0.2 * (source + 1)
        layer.self_attn.o_proj.weight.data *= 0.5
        for own in (layer.mlp.down_proj, layer.self_attn.o_proj):
            own.weight.data[0] = 0.0
    return calibrating.write(folder, model)


def build(folder: Path) -> Path:
    """Three sources and their text, with labels and without."""
    for source, name in enumerate(NAMES):
        plant(folder / name, source)
    lines(folder / "labelled.jsonl")
    lines(folder / "unlabelled.jsonl", labels=None)
    return folder


def sources(folder: Path) -> list[object]:
    return [word for name in NAMES for word in ("--source", folder / name)]


def calibration(folder: Path, target: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The windows that the command fits to, and the label of each token."""
    wanted = Branches(("mlp",), 3, target)
    config = config_of(Source.open(folder / NAMES[0]))
    given = [folder / name for name in NAMES], folder / "labelled.jsonl", TOKENS, config
    ids = read_labelled(wanted, *given)
    if target == "loss":
        return ids, torch.empty(0)
    pairs = zip(wanted.labels, ids, strict=True)
    return ids, torch.cat([torch.full((len(w),), label) for label, w in pairs])
