"""Model folders and training checkpoints as language models of lm-evaluation-harness.

lm = MoeLM(Path("runs/a/checkpoints/step-500"), batch_size=8)
"""

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe.model  # noqa: F401  (registers RoutedLlama)
from moe.checkpoint import store
from moe.errors import Corrupt, UserError
from moe.upcycle.source import read_config, require_finite, weight_files


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


def load_model(folder: Path) -> PreTrainedModel:
    """A model folder or a `step-N` checkpoint, in the dtype its config names, to evaluate.

    Raises UserError where it is neither, Corrupt where it is damaged.
    """
    config = read_config(folder)
    if not store.is_checkpoint(folder):
        return _load_folder(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights: dict[str, Any] = dict(store.weights(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [n for n in missing if model.get_parameter(n).is_meta]
    _check_keys(folder, missing, unexpected)
    # what is computed, not stored, is still on the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    require_finite(folder, model.named_parameters())
    return model.eval()


def _load_folder(folder: Path) -> PreTrainedModel:
    weight_files(folder)  # says what is missing, or that it is a pickle
    model: PreTrainedModel
    info: dict[str, Any]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except SafetensorError as error:
        raise Corrupt(f"{folder}: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {str(error).strip().splitlines()[0]}") from error
    _check_keys(folder, info["missing_keys"], info["unexpected_keys"])
    require_finite(folder, model.named_parameters())
    return model.eval()


def _check_keys(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Weights that are not there would be drawn, and their results worth nothing."""
    if missing or unexpected:
        raise UserError(
            f"{folder}: weights do not fit its config: missing {sorted(missing)[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}."
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights. Raises UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no tokenizer that can be read: copy tokenizer.json and "
            "tokenizer_config.json into it."
        ) from error
