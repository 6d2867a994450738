"""A state with tensors of every sort, saved and read back, and manifests edited behind our back."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from moe.checkpoint import manifest, store
from moe.checkpoint.progress import Judged
from moe.engines.base import Entry


def state(seed: int = 0) -> list[Entry]:
    """Tensors of every sort that a state may hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tied = draw(6, 5)
    return [
        Entry("embed", "parameter", tied),
        Entry("head", "parameter", tied),
        Entry("experts", "parameter", draw(3, 4, 2)),
        Entry("narrow", "parameter", draw(7).bfloat16()),
        Entry("turned", "parameter", draw(4, 6).T),
        Entry("scale", "parameter", draw()),
        Entry("nothing", "parameter", draw(0, 3)),
        Entry("bias", "buffer", draw(5).double()),
        Entry("embed", "exp_avg", draw(6, 5)),
        Entry("embed", "exp_avg_sq", draw(6, 5).square()),
    ]


def alone(value: Any) -> list[Any]:
    return [value]


def side_files(folder: Path) -> None:
    (folder / "config.json").write_text("{}\n")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ x }}")


def save(out: Path, step: int, entries: Iterable[Entry] | None = None) -> Path:
    return store.save(out, step, entries or state(step), progress(step), 0, alone, side_files)


def progress(step: int) -> store.Progress:
    """Of a run that has skipped steps and knows its loads."""
    return store.Progress(
        step=step,
        consumed_samples=8 * step,
        updates=max(0, step - 1),
        config={"data": {"sequence_length": 32}, "train": {"lr": 0.1}},
        origin=[{"recipe": "copy", "options": {"seed": 0}}],
        versions={"moe": "0"},
        reference=[[[0.1, 0.9], None], [None, [0.5, 0.25, 0.25]]],
        guard=Judged(skipped=1, clean=[[3.0, 0.1], [2.5, 0.3]], row=[[step, 0, 8]]),
        unvalidated=True,
        ranks=1,
    )


def blank(entries: list[Entry]) -> list[Entry]:
    return [Entry(e.name, e.kind, torch.full_like(e.tensor, 7)) for e in entries]


def differing(left: list[Entry], right: list[Entry]) -> list[str]:
    return [
        f"{a.kind}/{a.name}"
        for a, b in zip(left, right, strict=True)
        if a.tensor.dtype != b.tensor.dtype or not torch.equal(a.tensor, b.tensor)
    ]


def load(folder: Path, into: list[Entry]) -> None:
    with store.Reader(folder) as reader:
        reader.load(into)


def edited(folder: Path, edit: Callable[[dict], Any]) -> None:
    """Change the manifest and seal it again, as an attacker would."""
    values = json.loads((folder / manifest.NAME).read_text())
    values.pop("xxh3")
    values = edit(values) or values
    seal(folder, json.dumps(values).encode())


def seal(folder: Path, content: bytes) -> None:
    """Write a manifest that begins with the hash of the rest."""
    body = content[1:]
    digest = xxhash.xxh3_128_hexdigest(body)
    (folder / manifest.NAME).write_bytes(f'{{"xxh3": "{digest}", '.encode() + body)
