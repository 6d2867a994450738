"""Model folders and training checkpoints as language models of lm-evaluation-harness.

lm = MoeLM(Path("runs/a/checkpoints/step-500"), batch_size=8)
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe.model  # noqa: F401  (registers RoutedLlama)
from moe.checkpoint import store
from moe.errors import UserError


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


def load_model(folder: Path) -> PreTrainedModel:
    """A model folder or a `step-N` checkpoint, in the dtype its config names, to evaluate.

    Raises UserError where it is neither.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is neither a model folder nor a checkpoint: no config.json.")
    if not store.is_checkpoint(folder):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: {str(error).strip().splitlines()[0]}") from error
        return model.eval()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights: dict[str, Any] = dict(store.weights(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [n for n in missing if model.get_parameter(n).is_meta]
    if missing or unexpected:
        raise UserError(f"{folder}: weights do not fit its config: {missing[:3]} {unexpected[:3]}")
    # what is computed, not stored, is still on the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights. Raises UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no tokenizer that can be read: copy tokenizer.json and "
            "tokenizer_config.json into it."
        ) from error
