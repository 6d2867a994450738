"""What a model does with prompts, in one number each: how surprising they are, or how it answers.

    nll_P, tokens_P = losses(subject, encoded, batch_size=8)

P prompts, B of them at a time, S tokens each, V words.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from moe.tune.generation import pad
from moe.tune.prompts import Encoded, chunks
from moe.tune.subject import Subject


@torch.no_grad()
def losses(
    subject: Subject, encoded: Sequence[Encoded], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each prompt's tokens summed [P], and how many they are [P].

    Of the response where there is one; else of the prompt, all tokens but its first.
    """
    nll, counts = np.zeros(len(encoded)), np.zeros(len(encoded), np.int64)
    order = sorted(range(len(encoded)), key=lambda n: -_length(encoded[n]))
    for numbers in chunks(order, batch_size):
        batch = [encoded[n] for n in numbers]
        rows = [[*entry.prompt, *(entry.response or ())] for entry in batch]
        given = pad(rows, subject.device)
        logits_BSV = subject.model(**given, use_cache=False).logits
        for row, (entry, ids) in enumerate(zip(batch, rows, strict=True)):
            scored = len(entry.response) if entry.response else len(ids) - 1
            target = torch.tensor(ids[len(ids) - scored :], device=logits_BSV.device)
            logits_SV = logits_BSV[row, -scored - 1 : -1].float()
            nll[numbers[row]] = F.cross_entropy(logits_SV, target, reduction="sum").item()
            counts[numbers[row]] = scored
    return nll, counts


def windows(ids: Sequence[int], length: int, most: int) -> list[Encoded]:
    """A text as prompts of `length` tokens, at most `most` tokens in all; the rest is left out."""
    full = min(len(ids), most) // length
    return [Encoded(list(ids[n * length : (n + 1) * length]), None) for n in range(full)]


def _length(entry: Encoded) -> int:
    return len(entry.prompt) + len(entry.response or ())
