"""Proof of an export: the written folder, loaded as its readers load it, against the model itself.

    sample = choose(folder, text, config)
    with assembled(written, unverified) as whole:
        record = prove(reference(config, plan), load(whole), sample)

In float32 on the same tokens; what is exact stays under a relative logit difference of 1e-5. What
is not is measured, and proved against the model with its gates frozen as they were.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe.errors import Corrupt
from moe.hf.gates import Gates, freeze
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.progress import Progress, quiet_libraries
from moe.upcycle.expression import Expression, num_rows
from moe.upcycle.tokenizer import load_tokenizer
from moe.upcycle.verify import EXACT, compare, windows

DRAWN = (4, 64)  # windows and tokens of a sample without a tokenizer
POSITIONS = 32  # of the comparison spread over the whole context
# There a trained model is lost, and rounding grows: 1.2e-5 was seen. A rope setting that is gone
# moves logits by a tenth and more.
SPREAD = 1e-3

Plan = dict[str, Expression]


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids [windows, length] and what they are."""

    ids: Tensor
    name: str
    text: Path | None
    tokenised: bool  # so the result's own tokenizer must give the same ids


def choose(folder: Path, text: Path | None, config: PreTrainedConfig) -> Sample:
    """Tokens of the text, or of the Python documentation; numbers drawn where no tokenizer is.

    Raises UserError where a text is given and cannot be used.
    """
    quiet_libraries()
    tokenised = text is not None
    if text is None:
        try:
            load_tokenizer(folder)
            tokenised = True
        except Exception:  # transformers raises what it likes where there is none
            tokenised = False
    if tokenised:
        ids, name = windows(folder, text, config.vocab_size)
        return Sample(ids, name, text, True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, DRAWN, generator=generator)
    return Sample(ids, "drawn tokens (there is no tokenizer)", None, False)


def require_same_tokens(sample: Sample, folder: Path, vocab_size: int) -> None:
    """Raise Corrupt where the written tokenizer splits the sample's text differently."""
    if not sample.tokenised:
        return
    ids, _ = windows(folder, sample.text, vocab_size)
    if not torch.equal(ids, sample.ids):
        raise Corrupt(f"the result's tokenizer splits {sample.name} differently than the model's.")


def reference(config: RoutedLlamaConfig, plan: Plan) -> PreTrainedModel:
    """The model that a plan's tensors make, in float32. Raises Corrupt where they make none."""
    weights = {}
    for name, expression in plan.items():
        values = expression.rows(0, num_rows(expression.shape)).view(expression.shape)
        weights[name] = values.float() if values.is_floating_point() else values
    model: PreTrainedModel
    info: dict[str, Any]
    model, info = RoutedLlamaForCausalLM.from_pretrained(  # type: ignore[misc]
        None,
        config=RoutedLlamaConfig.from_dict(config.to_dict()),
        state_dict=weights,
        dtype=torch.float32,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))[:5]
            raise Corrupt(f"the tensors are not those of the config: {kind.split('_')[0]} {names}")
    return model.eval()


class Logits(Protocol):
    """All that a proof asks of a loaded model."""

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...


def prove(
    original: PreTrainedModel, written: Logits, sample: Sample, quiet: bool
) -> dict[str, Any]:
    """Differences of logits on the sample as a JSON-ready record, `status` pass or fail."""
    ids = sample.ids
    record: dict[str, Any] = {"text": sample.name, "windows": list(ids.shape), "dtype": "float32"}
    with Progress("verify", ids.numel(), "tokens", quiet) as progress:
        record |= compare(original, cast(PreTrainedModel, written), ids, progress)
    # not `>`: what is not a number fails
    passes = record["relative_difference"] <= EXACT
    record["long"] = None
    if isinstance(written, PreTrainedModel):
        record["long"] = _spread(original, written, ids)
        passes = passes and record["long"]["relative_difference"] <= SPREAD
    return record | {"gradients": [], "status": "pass" if passes else "fail", "bound": EXACT}


def measure(
    original: PreTrainedModel,
    written: PreTrainedModel,
    sample: Sample,
    gates: Gates,
    rounded: bool,
    quiet: bool,
) -> dict[str, Any]:
    """What freezing a model's gates did, as a JSON-ready record of `status` measured, or fail.

    It fails where `written` is not the model with these gates. `rounded`: a gate times a weight was
    rounded to less than float32, so there is no bound. `original` has frozen gates afterwards.
    Raises Corrupt where logits are not finite.
    """
    ids = sample.ids
    record: dict[str, Any] = {"text": sample.name, "windows": list(ids.shape), "dtype": "float32"}
    with Progress("verify", ids.numel(), "tokens", quiet) as progress:
        record |= compare(original, written, ids, progress)
    if not math.isfinite(record["relative_difference"]):
        raise Corrupt("logits of the model or of what was made of it are not finite.")
    freeze(original, gates)
    with Progress("verify", ids[:1].numel(), "tokens", True) as progress:
        same = compare(original, written, ids[:1], progress)["relative_difference"]
    record["long"] = _spread(original, written, ids)
    passes = same <= EXACT and record["long"]["relative_difference"] <= SPREAD
    record["frozen"] = {"relative_difference": same, "bound": None if rounded else EXACT}
    if rounded:
        record["long"]["bound"] = None
    status = "measured" if passes or rounded else "fail"
    return record | {"gradients": [], "status": status}


@torch.no_grad()
def _spread(original: PreTrainedModel, written: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """The same at positions over the whole context, where a lost rope scaling shows."""
    ids = ids[:1, :POSITIONS]
    last = original.config.max_position_embeddings - 1
    positions = torch.linspace(0, last, ids.shape[1]).long()[None]
    expected, actual = (
        m(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for m in (original, written)
    )
    relative = ((actual - expected).norm() / expected.norm()).item()
    return {"last_position": last, "relative_difference": relative, "bound": SPREAD}
