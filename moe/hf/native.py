"""Which classes of transformers hold a RoutedLlama exactly, the config each gets, and the way back.

    config, notes = native_config(routed_config, "mixtral", torch.bfloat16)
    routed_config = from_native(AutoConfig.from_pretrained("a-mixtral"))

What does not fit is refused by name, all of it at once. The tensors are in moe.hf.layouts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moe.errors import UserError
from moe.hf.families import carried, computes_differently
from moe.model import RoutedLlamaConfig
from moe.model.spec import MoEMLP


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """What a class has room for, besides dense attention and softmax experts."""

    biases: tuple[tuple[bool, bool], ...]  # legal pairs: of q, k and v; of o_proj
    windows: Literal["none", "uniform", "any"] = "none"  # layers that see a sliding window
    raw_weights: bool = False  # expert weights that are not renormalised
    shared: bool = False  # an expert that every token visits
    dense_layers: bool = False  # layers without experts


HOMES = {
    "mixtral": Home(biases=((False, False),), windows="uniform"),
    "granitemoe": Home(biases=((False, False), (True, True))),
    "granitemoeshared": Home(biases=((False, False), (True, True)), shared=True),
    "qwen2_moe": Home(
        biases=((False, False), (True, False)),
        windows="any",
        raw_weights=True,
        shared=True,
        dense_layers=True,
    ),
}

# A Qwen2-MoE has a shared expert in every layer. Of width 0 its tensors are empty, which readers
# stumble over; one of zeros adds exactly nothing, and matmuls are aligned to eight columns.
NO_SHARED_WIDTH = 8
# It stands behind a sigmoid gate; with a gate of zeros that is ½ for every token.
SHARED_GATE = 0.5
# Granite's, each 1 in every other family.
UNIT_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


def native_config(
    config: RoutedLlamaConfig, target: str, dtype: torch.dtype
) -> tuple[PreTrainedConfig, list[str]]:
    """The config of `target` that computes what `config` does, and what is done to the weights.

    `dtype` is that of the weights to be. Raises UserError with all that stands in the way.
    """
    if problems := obstacles(config, target, dtype):
        fitting = [t for t in HOMES if t != target and not obstacles(config, t, dtype)]
        instead = f"It fits {' and '.join(fitting)}; " if fitting else ""
        raise UserError(
            f"this model does not fit {target}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\n{instead}--to hf and --to remote-code hold every RoutedLlama."
        )
    return _build(config, target), _notes(config, target)


def moe_layers(config: RoutedLlamaConfig) -> dict[int, MoEMLP]:
    """The experts of each layer that has any."""
    specs = {i: config.mlp_spec(i) for i in range(config.num_hidden_layers)}
    return {i: spec for i, spec in specs.items() if spec.kind == "moe"}


def obstacles(config: RoutedLlamaConfig, target: str, dtype: torch.dtype) -> list[str]:
    """Everything in `config` that `target` has no room for, one sentence each."""
    found = [*_attention_obstacles(config, target), *_mlp_obstacles(config, target, dtype)]
    if found:
        return found
    # what is left: fields that no rule above knows, found by going there and back
    back = from_native(_build(config, target))
    return [f"{field} has no place in {target}." for field in computes_differently(config, back)]


def _attention_obstacles(config: RoutedLlamaConfig, target: str) -> list[str]:
    home, found = HOMES[target], []
    kinds = {config.attention_spec(i).kind for i in range(config.num_hidden_layers)} - {"dense"}
    if kinds:
        found.append(f"attention of kind {', '.join(sorted(kinds))}: {target} has dense attention.")
    if config.qk_norm:
        found.append(f"qk_norm=True: {target} has no norm of queries and keys.")
    biases = bool(config.attention_bias), bool(config.attention_output_bias)
    if biases not in home.biases:
        legal = " or ".join(f"({qkv}, {o})" for qkv, o in home.biases)
        found.append(
            f"attention_bias={biases[0]}, attention_output_bias={biases[1]}: {target} has {legal}."
        )
    sliding = {kind == "sliding_attention" for kind in config.layer_types or ()}
    if home.windows == "none" and True in sliding:
        found.append(
            f"sliding_window={config.sliding_window}: attention of {target} sees everything."
        )
    if home.windows == "uniform" and len(sliding) == 2:
        found.append(f"layer_types mixes full and sliding attention: {target} has one for all.")
    return found


def _mlp_obstacles(config: RoutedLlamaConfig, target: str, dtype: torch.dtype) -> list[str]:
    home, found = HOMES[target], []
    kinds = [config.mlp_spec(i).kind for i in range(config.num_hidden_layers)]
    if other := sorted(set(kinds) - {"dense", "moe"}):
        found.append(f"MLPs of kind {', '.join(other)}: {target} has softmax experts.")
    layers = moe_layers(config)
    if not layers:
        dense = set(kinds) == {"dense"}
        return [*found, *(["no layer has experts: use --to dense."] if dense else [])]
    if "dense" in kinds and not home.dense_layers:
        without = [str(i) for i, kind in enumerate(kinds) if kind == "dense"]
        found.append(f"layers {', '.join(without)} have a dense MLP: {target} has experts in all.")
    specs = list(layers.values())
    for field in ("num_experts", "top_k", "intermediate_size", "shared_intermediate_size"):
        values = sorted({getattr(spec, field) for spec in specs})
        if len(values) > 1:
            found.append(f"mlp.{field} is {', '.join(map(str, values))}: {target} has one for all.")
    if any(spec.score != "softmax" for spec in specs):
        found.append(f"mlp.score=sigmoid: {target} scores experts by softmax.")
    if any(spec.selection_bias for spec in specs):
        found.append(f"mlp.selection_bias=True: {target} has no bias on the choice of experts.")
    for limited in sorted({(s.top_groups, s.num_groups) for s in specs if s.limited}):
        found.append(
            "mlp.top_groups={} of num_groups={}: in {} a token chooses among all experts.".format(
                *limited, target
            )
        )
    raw = {_raw(spec) for spec in specs}
    if True in raw and not home.raw_weights:
        found.append(f"mlp.renormalise=False: {target} makes the weights of a token sum to 1.")
    elif len(raw) == 2:
        found.append(f"mlp.renormalise differs between layers: {target} has one for all.")
    if any(spec.shared_intermediate_size for spec in specs) and not home.shared:
        found.append(f"mlp.shared_intermediate_size > 0: {target} has no shared expert.")
    for scale in sorted({spec.weight_scale for spec in specs}):
        if not exact_factor(scale, dtype):
            found.append(
                f"mlp.weight_scale={scale:g}: multiplied into down_proj it is rounded to "
                f"{str(dtype).removeprefix('torch.')}. Use --dtype float32."
            )
    return found


def _raw(spec: MoEMLP) -> bool:
    """Whether renormalising the chosen experts' weights would change them."""
    return not spec.renormalise and spec.top_k < spec.num_experts


def exact_factor(factor: float, dtype: torch.dtype) -> bool:
    """Whether a weight times `factor` keeps its precision, to the rounding of float32."""
    return dtype in (torch.float32, torch.float64) or abs(math.frexp(factor)[0]) == 0.5


def _build(config: RoutedLlamaConfig, target: str) -> PreTrainedConfig:
    """The config of `target`, what does not fit left out."""
    config_class = CONFIG_MAPPING[target]
    layers = moe_layers(config)
    specs = list(layers.values())
    spec = specs[0]
    slides = "sliding_attention" in (config.layer_types or ())
    # theirs sums the shares of a token's K experts, ours is 1 when balanced
    coefficient = sum(s.balance_coef for s in specs) / len(specs) / spec.top_k
    fields: dict[str, Any] = {
        **carried(config, config_class),
        "head_dim": config.head_dim,
        "num_experts_per_tok": spec.top_k,
        "router_aux_loss_coef": coefficient,
    }
    if target == "qwen2_moe":
        fields |= {
            "num_experts": spec.num_experts,
            "moe_intermediate_size": spec.intermediate_size,
            "shared_expert_intermediate_size": spec.shared_intermediate_size or NO_SHARED_WIDTH,
            "norm_topk_prob": not _raw(spec),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in layers],
            "qkv_bias": bool(config.attention_bias),
            "use_sliding_window": slides,
            "max_window_layers": _first_window(config.layer_types or ()),
        }
    else:
        fields |= {
            "num_local_experts": spec.num_experts,
            "intermediate_size": spec.intermediate_size,
        }
    if target == "mixtral":
        fields["sliding_window"] = config.sliding_window if slides else None
    if target.startswith("granite"):
        assert config.head_dim is not None
        fields |= dict.fromkeys(UNIT_MULTIPLIERS, 1.0)
        fields["attention_multiplier"] = _attention_scale(config.head_dim)
    if target == "granitemoeshared":
        fields["shared_intermediate_size"] = spec.shared_intermediate_size
    return config_class(**fields)


def _attention_scale(head_dim: int) -> float:
    """What a RoutedLlama multiplies queries times keys by."""
    return float(head_dim**-0.5)


def _first_window(layer_types: Sequence[str]) -> int:
    """Layers before the first that slides: transformers 4 reads this instead of layer_types."""
    kinds = list(layer_types)
    return kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)


def _notes(config: RoutedLlamaConfig, target: str) -> list[str]:
    """What the receipt says was done to the weights, and what has no field."""
    layers = moe_layers(config)
    specs, notes = list(layers.values()), []
    if scales := sorted({s.weight_scale for s in specs} - {1.0}):
        amounts = ", ".join(f"{scale:g}" for scale in scales)
        notes.append(f"weight_scale {amounts} multiplied into down_proj")
    if target == "qwen2_moe":
        if specs[0].shared_intermediate_size:
            notes.append("the shared expert stands behind a gate of 1/2, its down_proj doubled")
        else:
            notes.append(f"a shared expert of {NO_SHARED_WIDTH} zero neurons, which adds nothing")
    if len({s.balance_coef for s in specs}) > 1:
        notes.append("router_aux_loss_coef is the mean of the layers' balance coefficients")
    if any(s.z_coef for s in specs):
        notes.append("the z loss has no field and is left out of further training")
    return notes


def from_native(native: PreTrainedConfig, shared: bool = True) -> RoutedLlamaConfig:
    """The RoutedLlamaConfig that computes what a config of one of HOMES does.

    `shared=False` leaves out a Qwen2-MoE's shared expert. Raises UserError with all that a
    RoutedLlama has no room for.
    """
    fields = native.to_dict()
    if problems := _foreign(native):
        raise UserError("\n".join(problems))
    family = native.model_type
    is_qwen = family == "qwen2_moe"
    top_k = fields["num_experts_per_tok"]
    spec = {
        "kind": "moe",
        "num_experts": fields["num_experts" if is_qwen else "num_local_experts"],
        "top_k": top_k,
        "balance_coef": float(f"{fields['router_aux_loss_coef'] * top_k:.12g}"),  # 0.01 again
    }
    mlp: Any = spec
    bias = bool(fields.get("qkv_bias", False) if is_qwen else fields.get("attention_bias", False))
    own: dict[str, Any] = {
        "attention_bias": bias,
        "attention_output_bias": bias and not is_qwen,
        "source_model_type": family,
    }
    if family == "granitemoeshared" and fields["shared_intermediate_size"]:
        spec["shared_intermediate_size"] = fields["shared_intermediate_size"]
    if is_qwen:
        spec["intermediate_size"] = fields["moe_intermediate_size"]
        if not fields["norm_topk_prob"]:
            spec["renormalise"] = False
        if shared and fields["shared_expert_intermediate_size"]:
            spec["shared_intermediate_size"] = fields["shared_expert_intermediate_size"]
        dense = _dense_layers(fields)
        count = fields["num_hidden_layers"]
        if dense:
            mlp = [{"kind": "dense"} if i in dense else spec for i in range(count)]
        if "sliding_attention" not in fields["layer_types"]:
            own["sliding_window"] = None
    return RoutedLlamaConfig(**{**carried(native, RoutedLlamaConfig), **own, "mlp": mlp})


def _dense_layers(fields: dict[str, Any]) -> set[int]:
    """The layers of a Qwen2-MoE that have a plain MLP."""
    step = fields["decoder_sparse_step"]
    every = range(fields["num_hidden_layers"])
    none = set(every) if fields["num_experts"] == 0 else set()
    return {i for i in every if (i + 1) % step} | set(fields["mlp_only_layers"] or ()) | none


def _foreign(native: PreTrainedConfig) -> list[str]:
    """What a native config asks for that a RoutedLlama does not do."""
    found = []
    if getattr(native, "quantization_config", None) is not None:
        found.append("quantization_config: the weights are quantised. Save them dequantised.")
    for field in UNIT_MULTIPLIERS:
        if (value := getattr(native, field, 1.0)) != 1.0:
            found.append(f"{field}={value!r}: a RoutedLlama multiplies by 1.")
    head_dim = getattr(native, "head_dim", None)
    head_dim = head_dim or native.hidden_size // native.num_attention_heads
    usual = _attention_scale(head_dim)
    scale = getattr(native, "attention_multiplier", usual)
    if not math.isclose(scale, usual, rel_tol=1e-12):
        found.append(
            f"attention_multiplier={scale!r}: a RoutedLlama multiplies by head_dim^-0.5 = {usual}."
        )
    rope = getattr(native, "rope_parameters", None) or {}
    factor = getattr(native, "partial_rotary_factor", rope.get("partial_rotary_factor"))
    if factor not in (None, 1.0):
        found.append(f"partial_rotary_factor={factor!r}: a RoutedLlama turns whole heads.")
    return found
