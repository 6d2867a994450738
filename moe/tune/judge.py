"""A model that chooses among continuations of a text, as lm-eval's multiple choice does.

    likeliest(folder, texts, [" refused", " answered"])     # the number of the likeliest, per text

B pairs of a text and a choice, S tokens, C of a choice, V words.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe.hf.loading import load_model, load_tokenizer
from moe.progress import Progress
from moe.tune.generation import pad
from moe.tune.prompts import chunks

BATCH = 16


def likeliest(folder: Path, texts: Sequence[str], choices: Sequence[str]) -> list[int]:
    """Which of the choices has the highest log-probability after each text."""
    totals = likelihoods(folder, [(text, choice) for text in texts for choice in choices])
    return torch.tensor(totals).view(len(texts), len(choices)).argmax(1).tolist()


@torch.no_grad()
def likelihoods(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Sum of the log-probabilities of each pair's second text after its first.

    A pair that is longer than the model loses its beginning, which stderr then says.
    """
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    longest = getattr(model.config, "max_position_embeddings", None)
    encoded = [_encode(tokenizer, *pair) for pair in pairs]
    cut = [
        longest is not None and len(text) + len(choice) > longest + 1 for text, choice in encoded
    ]
    if any(cut):
        print(f"judge: {sum(cut)} of {len(pairs)} texts are longer than its {longest} positions "
              "and lose their beginning", file=sys.stderr)  # fmt: skip
    totals = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, encoded[i])))
    with Progress("judge", total=len(pairs), unit="choices") as progress:
        for numbers in chunks(order, BATCH):
            batch = [encoded[i] for i in numbers]
            # the last token predicts nothing that counts
            rows = [
                [*text, *choice][:-1][-longest if longest else None :] for text, choice in batch
            ]
            keep = max(len(choice) for _, choice in batch)
            logits_BCV = model(**pad(rows, model.device), logits_to_keep=keep).logits
            for i, logits_CV, (_, choice) in zip(numbers, logits_BCV, batch, strict=True):
                scores_CV = logits_CV[-len(choice) :].float().log_softmax(-1)
                tokens_C1 = torch.tensor(choice, device=scores_CV.device)[:, None]
                totals[i] = float(scores_CV.gather(1, tokens_C1).sum())
            progress.advance(len(numbers))
    return totals


def _encode(tokenizer: Any, text: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of a text and of what follows it, cut where lm-eval cuts."""
    bare = text.rstrip()
    choice = text[len(bare) :] + choice  # spaces belong to the word that they stand before
    before = tokenizer(bare)["input_ids"] if bare else []
    whole = tokenizer(bare + choice)["input_ids"]
    if not before:
        first = tokenizer.bos_token_id
        before = [tokenizer.eos_token_id if first is None else first]
        whole = [*before, *tokenizer(choice, add_special_tokens=False)["input_ids"]]
    return before, whole[len(before) :]
