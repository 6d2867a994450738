"""A RoutedLlama as a plain model of the family it came from.

    dense = dense_model(routed_config, plan)                  # nothing is left out: the same model
    dense = dense_model(routed_config, plan, lambda: gates)   # gates frozen to these: its twin

Where every head and expert is on with weight 1, the routers are left out and nothing changes. Soft
gates (BAM's attention, a mixture's experts) depend on the token: frozen to their mean they go into
the output projections, which is another function. The tensors are made in moe.hf.twin.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from moe.errors import UserError
from moe.hf import twin
from moe.hf.families import FAMILIES, carried, computes_differently, routed_config
from moe.hf.gates import Gates, frozen_parts
from moe.model import RoutedLlamaConfig
from moe.model.spec import BAMAttention, MoEMLP, MoHAttention, UoEAttention, UoEMLP
from moe.upcycle.expression import Expression

Plan = dict[str, Expression]


@dataclass(frozen=True, slots=True)
class Dense:
    """A plain model to be, what is to be said of it, and the gates that it has in its weights."""

    config: PreTrainedConfig
    plan: Plan
    notes: list[str]
    gates: Gates  # none: it computes what the routed model does


def dense_model(
    config: RoutedLlamaConfig, plan: Plan, measure: Callable[[], Gates] | None = None
) -> Dense:
    """The plain model of a RoutedLlama's config and tensors.

    `measure` gives the mean gates of the parts whose gates depend on the token; it is called once,
    when nothing else stands in the way. Raises UserError with all that does.
    """
    found, notes = list[str](), list[str]()
    for layer in range(config.num_hidden_layers):
        for look in (look_at_attention, look_at_mlp):
            problems, note = look(config, layer)
            found += problems
            notes += [note] if note else []
    frozen = frozen_parts(config)
    found += _calibration_problems(frozen, measure is not None)
    found += twin.size_problems(config) + twin.norm_problems(config, plan)
    plain = _plain(config)
    family, misfits = _family(plain, bool(frozen))
    found += [f"{misfit} has no place in a {family} model." for misfit in misfits]
    if found:
        raise UserError(
            "this model is not a dense one in another form:\n"
            + "\n".join(f"  {problem}" for problem in dict.fromkeys(found))
            + "\n--to hf and --to remote-code hold every RoutedLlama."
        )
    if config.source_model_type in FAMILIES and family != config.source_model_type:
        notes.append(
            f"a {family}, which computes the same as a {config.source_model_type} and takes "
            f"{plain.num_attention_heads} heads at hidden_size={plain.hidden_size}"
        )
    gates = measure() if measure is not None and frozen else {}
    tensors = twin.fold(config, plan, gates)
    return Dense(_build(plain, family), tensors, list(dict.fromkeys(notes)), gates)


def look_at_attention(config: RoutedLlamaConfig, layer: int) -> tuple[list[str], str]:
    """What keeps one layer's attention from being dense, and what is to be said of it if nothing
    does; each empty where there is nothing.
    """
    spec = config.attention_spec(layer)
    if isinstance(spec, BAMAttention):
        heads, groups = twin.heads(config, layer)
        return [], (
            f"{spec.num_experts} attention experts side by side as {heads} heads over {groups} of "
            "keys and values, their mean gates in o_proj"
        )
    if isinstance(spec, UoEAttention):
        return _union_problems(spec), "every attention expert is on, so the router is left out"
    if isinstance(spec, MoHAttention):
        note = "every head is on with weight 1, so the router is left out"
        return _moh_problems(config, spec), note
    return [], ""


def look_at_mlp(config: RoutedLlamaConfig, layer: int) -> tuple[list[str], str]:
    """As look_at_attention, of a layer's MLP."""
    spec = config.mlp_spec(layer)
    width = twin.width(config, layer)
    if isinstance(spec, MoEMLP):
        return [], (
            f"{spec.num_experts} FFN experts side by side as {width} neurons, all of them on, "
            "their mean weights in down_proj"
        )
    if isinstance(spec, UoEMLP):
        return _union_problems(spec), "every slice of the MLP is on, so they are one MLP again"
    return [], ""


def _moh_problems(config: RoutedLlamaConfig, spec: MoHAttention) -> list[str]:
    if spec.router == "two_stage":
        return ["attention.router=two_stage gives heads weights that depend on the token."]
    grouped = spec.granularity == "kv_group"
    units = config.num_key_value_heads if grouped else config.num_attention_heads
    assert units is not None
    routed = len(spec.routed_heads(units))
    if spec.budget == "threshold":
        return ["attention.budget=threshold leaves out heads by their scores."]
    if spec.top_k < routed:
        return [f"attention.top_k={spec.top_k} leaves out {routed - spec.top_k} of {units}."]
    if spec.routed_scale != 1:
        return [f"attention.routed_scale={spec.routed_scale:g} weighs heads differently."]
    return []


def _union_problems(spec: UoEAttention | UoEMLP) -> list[str]:
    found, part = [], spec.part
    if isinstance(spec, UoEMLP) and spec.mode in ("threshold", "budget"):
        found.append(f"mlp.mode={spec.mode} leaves out experts by their scores.")
    elif spec.top_k < spec.num_experts:
        left_out = spec.num_experts - spec.top_k
        found.append(
            f"{part}.top_k={spec.top_k} leaves out {left_out} of {spec.num_experts} experts."
        )
    if spec.weights == "soft":
        found.append(f"{part}.weights=soft gives experts weights that depend on the token.")
    if isinstance(spec, UoEMLP) and spec.output_scale != 1:
        found.append(f"mlp.output_scale={spec.output_scale:g} weighs experts differently.")
    return found


def _calibration_problems(frozen: list[tuple[int, str]], given: bool) -> list[str]:
    """Whether a text to freeze gates on is there where it is needed, and only there."""
    if frozen and not given:
        names = {"attention": "attention experts (bam)", "mlp": "FFN experts (moe)"}
        parts = [name for part, name in names.items() if part in {part for _, part in frozen}]
        return [
            f"the gates of its {' and '.join(parts)} depend on the token. To freeze them to their "
            "mean, which is lossy, give --calibrate FILE, a text to take the mean over."
        ]
    if given and not frozen:
        return ["--calibrate: it has no gates to be frozen. Leave it out."]
    return []


def _plain(config: RoutedLlamaConfig) -> RoutedLlamaConfig:
    """The config with nothing routed, in the sizes that the parts side by side have."""
    plain = copy.copy(config)
    plain.attention, plain.mlp = {"kind": "dense"}, {"kind": "dense"}
    plain.num_attention_heads, plain.num_key_value_heads = twin.heads(config, 0)
    plain.intermediate_size = twin.width(config, 0)
    return plain


def _family(plain: RoutedLlamaConfig, widened: bool) -> tuple[str, list[str]]:
    """The family to write, and what of the config it cannot say: its own, or the first that can.

    A widened model may need another than its own: a LLaMA's heads must divide its hidden size,
    which those of three attention experts often do not.
    """
    own = plain.source_model_type
    families = [str(f) for f in FAMILIES]
    if own in FAMILIES:
        families = [own, *(f for f in families if f != own)] if widened else [own]
    misfits = {family: _misfits(plain, family) for family in families}
    best = min(families, key=lambda family: len(misfits[family]))
    if not misfits[best] or own not in misfits:
        return best, misfits[best]
    # none can: what its own refuses, and what all the others do, for that would come next
    common = list(misfits[str(own)])
    others = [misfits[family] for family in families if family != own]
    for misfit in others[0] if others else []:
        if all(misfit in other for other in others) and misfit not in common:
            common.append(misfit)
    return str(own), common


def _misfits(plain: RoutedLlamaConfig, family: str) -> list[str]:
    try:
        back = routed_config(_build(plain, family))
    except Exception as error:  # transformers raises what it likes over a field it does not like
        reason = str(error).strip().split("\n")[-1].strip().removeprefix("ValueError: ")
        return [f"what its config refuses ({reason.rstrip('.')})"]
    return computes_differently(plain, back)


def _build(plain: RoutedLlamaConfig, family: str) -> PreTrainedConfig:
    fields: dict[str, Any] = {
        **carried(plain, CONFIG_MAPPING[family]),
        "head_dim": plain.head_dim,
    }
    if "qwen" in family:
        fields["use_sliding_window"] = "sliding_attention" in (plain.layer_types or ())
    return CONFIG_MAPPING[family](**fields)
