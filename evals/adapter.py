"""Model folders and training checkpoints as language models of lm-evaluation-harness.

lm = MoeLM(Path("runs/a/checkpoints/step-500"), batch_size=8)
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from moe.errors import UserError
from moe.hf.loading import load_model, load_tokenizer


def _without_bars(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The harness's method without its progress bar where that would only make a mess of a log."""

    @functools.wraps(answer)
    def call(lm: HFLM, requests: Any, disable_tqdm: bool = False, **more: Any) -> Any:
        quiet = disable_tqdm or not sys.stderr.isatty()
        return answer(lm, requests, disable_tqdm=quiet, **more)

    return call


def _causal_only(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The harness's method, refused where a token's likelihood would know what follows it."""

    @functools.wraps(answer)
    def call(lm: HFLM, *given: Any, **more: Any) -> Any:
        if not getattr(lm.model.config, "causal", True):
            raise UserError(
                "this model is not causal while it scores a text (mlp.mode expert_choice or "
                "sequence): its likelihoods mean nothing. Use token_choice or threshold."
            )
        return answer(lm, *given, **more)

    return call


class MoeLM(HFLM):
    """The harness's own Hugging Face model around a model loaded here, one process."""

    def __init__(self, folder: Path, batch_size: int = 8, max_length: int | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(
            pretrained=load_model(folder).to(device),  # type: ignore[arg-type]
            tokenizer=load_tokenizer(folder),
            backend="causal",  # RoutedLlama is not in transformers' own table
            batch_size=batch_size,
            max_length=max_length,
        )

    _loglikelihood_tokens = _causal_only(_without_bars(HFLM._loglikelihood_tokens))
    loglikelihood_rolling = _without_bars(HFLM.loglikelihood_rolling)
    generate_until = _without_bars(HFLM.generate_until)
