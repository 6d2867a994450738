"""A model to look into: its weights, tokenizer, routers, and the tuning that is to be at work.

subject = open_subject(folder, tuning=Path("tuning.json"), scale=0.5)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.errors import UserError
from moe.hf.loading import identity, load_model, load_tokenizer
from moe.tune.families import Site, sites
from moe.tune.generation import Sampling, respond, stops
from moe.tune.intervene import tuned
from moe.tune.prompts import Prompt, encode, places
from moe.tune.tuning import Tuning


@dataclass(kw_only=True, slots=True)
class Subject:
    """A loaded model with what its commands ask of it; `scale` is the dial."""

    folder: Path
    model: Any
    tokenizer: Any
    sites: list[Site]  # empty for a dense model
    identity: dict[str, str]
    tuning: Tuning | None
    scale: float

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def open_subject(
    folder: Path,
    tuning: Path | None = None,
    scale: float | None = None,
    other_model: bool = False,
    dense: bool = False,
) -> Subject:
    """Load a model onto the device there is. With `dense` it may have no routers.

    Raises UserError where the tuning is another model's.
    """
    wanted = None if tuning is None else Tuning.read(tuning)
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder)
    found = [] if dense and wanted is None else sites(model)
    known = identity(folder)
    if wanted is not None:
        wanted.check(found)
        if not other_model:
            wanted.check_model(known)
        scale = wanted.scale if scale is None else scale
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Subject(
        folder=folder, model=model, tokenizer=tokenizer, sites=found, identity=known,
        tuning=wanted, scale=1.0 if scale is None else scale,
    )  # fmt: skip


def describe(tuning: Tuning | None, scale: float) -> str:
    """A tuning at a scale in one line."""
    return tuning.summary(scale) if tuning is not None and tuning.experts else "no tuning"


def check_scale(scale: float | None, tuning: Path | None) -> None:
    """Raise UserError for a dial out of range, or of nothing."""
    if scale is not None and not 0 <= scale <= 1:
        raise UserError(f"--scale {scale:g} must be between 0 and 1.")
    if scale is not None and tuning is None:
        raise UserError("--scale turns a tuning's dial: give --tuning too.")


def answer(subject: Subject, prompts: Sequence[str], sampling: Sampling, chat: bool) -> list[str]:
    """Responses to prompts, under the subject's tuning. Raises UserError for those too long."""
    texts = [
        Prompt(line=n, text=text, messages=None, response=None, fields={})
        for n, text in enumerate(prompts, start=1)
    ]
    config = subject.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    encoded = encode(texts, subject.tokenizer, chat, longest, sampling.max_new_tokens, "prompt")
    ends = stops(subject.model, subject.tokenizer)
    with tuned(subject.model, subject.tuning, subject.scale):
        rows = [entry.prompt for entry in encoded]
        found = respond(subject.model, rows, sampling, places(texts), ends)
    return [subject.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
