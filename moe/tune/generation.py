"""Responses that do not depend on which prompts were batched together.

    ids = respond(model, prompts, Sampling(max_new_tokens=64, temperature=0.7, seed=0), places)

A token of the highest logit / temperature + Gumbel noise is a sample of the softmax, so sampling is
a greedy search with noise, and each prompt draws its noise on its own. B prompts, V words.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are made; at temperature 0 the likeliest token is taken."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Noise(LogitsProcessor):
    """Logits over a temperature, plus Gumbel noise of each row's own generator."""

    def __init__(self, sampling: Sampling, places: Sequence[str], device: torch.device) -> None:
        self.temperature = sampling.temperature
        self.generators = []
        for place in places:
            number = xxhash.xxh3_64_intdigest(f"{sampling.seed} {place}".encode()) >> 1
            self.generators.append(torch.Generator(device).manual_seed(number))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(noise_BV, self.generators, strict=True):
            row_V.exponential_(generator=generator)
        return scores.float() / self.temperature - noise_BV.log()


def pad(rows: Sequence[Sequence[int]], device: torch.device, filler: int = 0) -> dict[str, Tensor]:
    """Rows of tokens with padding on the left: input_ids, attention_mask and position_ids [B, S].

    Positions count tokens alone, so that each row is as it would be by itself.
    """
    length = max(map(len, rows))
    ids = [[filler] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    mask_BS = torch.tensor(mask)
    given = {
        "input_ids": torch.tensor(ids),
        "attention_mask": mask_BS,
        "position_ids": (mask_BS.cumsum(-1) - 1).clamp(min=0),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def stops(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


@torch.no_grad()
def respond(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    places: Sequence[str],
    ends: Sequence[int],
) -> list[list[int]]:
    """The response's tokens for each prompt, without the one of `ends` that ended it.

    `places` name the prompts (`prompts.places`): what a prompt draws depends on its name and the
    seed alone.
    """
    given = pad(prompts, model.device, filler=ends[0] if ends else 0)
    del given["position_ids"]  # generate makes them of the mask, and goes on with them
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(Noise(sampling, places, model.device))
    with _plain(model, sampling, ends):
        found = model.generate(**given, logits_processor=processors)
    responses = []
    for row in found[:, given["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        responses.append(row[:end])
    return responses


@contextlib.contextmanager
def _plain(model: Any, sampling: Sampling, ends: Sequence[int]) -> Iterator[None]:
    """The model without a checkpoint's own wishes for generation, which fill in what a call leaves
    open: penalties, beams, cuts of the distribution.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    try:
        yield
    finally:
        model.generation_config = own
