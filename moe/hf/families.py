"""Which dense families can become a RoutedLlama, and which switches each of them sets.

config = routed_config(AutoConfig.from_pretrained(folder))
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe.errors import UserError
from moe.model.config import RoutedLlamaConfig


def _llama(config: PreTrainedConfig) -> dict[str, Any]:
    return {}


def _mistral(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False}


def _qwen3(config: PreTrainedConfig) -> dict[str, Any]:
    return {"qk_norm": True, "mlp_bias": False}


FAMILIES: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}

# What a family's own class would do and a RoutedLlama would not, with the value that is harmless.
OBSTACLES: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_local_experts": (None,),
    "num_experts": (None,),
    "logit_scale": (None, 1.0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "residual_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "partial_rotary_factor": (None, 1.0),
}

# Fields of a RoutedLlamaConfig that say nothing of what it computes outside its routed parts.
WITHOUT_EFFECT = {"attention", "mlp", "source_model_type", "pretraining_tp"}


def require_family(field: str, value: Any) -> None:
    """Raises UserError, naming the field and the families that work, where `value` is not one."""
    if value not in FAMILIES:
        raise UserError(
            f"{field}={value!r} is not a LLaMA-like family. Families that can be upcycled: "
            f"{', '.join(FAMILIES)}."
        )


def routed_config(dense: PreTrainedConfig) -> RoutedLlamaConfig:
    """The RoutedLlamaConfig that computes what `dense` computes, nothing routed yet.

    Every field of the source is carried over, known to us or not. A RoutedLlamaConfig comes back as
    a copy. Raises UserError naming the field that stands in the way.
    """
    if isinstance(dense, RoutedLlamaConfig):
        fields = {k: v for k, v in dense.to_dict().items() if k != "auto_map"}  # of a copy of ours
        return RoutedLlamaConfig.from_dict(fields)
    family = dense.model_type
    require_family("model_type", family)
    rope = getattr(dense, "rope_parameters", None) or {}  # transformers moves some fields there
    if (activation := getattr(dense, "hidden_act", "silu")) not in ACT2FN:
        raise UserError(f"hidden_act={activation!r} is unknown to transformers.")
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else None
    if kind not in [None, "default", *ROPE_INIT_FUNCTIONS]:  # a list, for what cannot be hashed
        raise UserError(
            f"rope_parameters.rope_type={kind!r} is unknown. transformers has default, "
            f"{', '.join(sorted(set(ROPE_INIT_FUNCTIONS) - {'default'}))}."
        )
    for field, harmless in OBSTACLES.items():
        value = getattr(dense, field, rope.get(field))
        if value not in harmless:
            advice = (
                " Save it dequantised, or import a GGUF file of it." if "quant" in field else ""
            )
            raise UserError(
                f"{field}={value!r} in the source's config has no counterpart here: the result "
                f"would not be the same model.{advice}"
            )
    fields = dense.to_dict()
    for own in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(own, None)
    return RoutedLlamaConfig(**{**fields, **FAMILIES[family](dense), "source_model_type": family})


def computes_differently(config: RoutedLlamaConfig, other: RoutedLlamaConfig) -> list[str]:
    """Every field outside the routed parts in which two configs differ, as `field=value`.

    What nothing in a model of `config` reads may differ.
    """
    fields = _declared(RoutedLlamaConfig) - _declared(PreTrainedConfig) - WITHOUT_EFFECT
    if "sliding_attention" not in (config.layer_types or ()):
        fields -= {"sliding_window"}
    if all(config.mlp_spec(i).kind != "dense" for i in range(config.num_hidden_layers)):
        fields -= {"intermediate_size"}
    pairs = [(field, getattr(config, field), getattr(other, field)) for field in sorted(fields)]
    return [f"{field}={ours!r}" for field, ours, theirs in pairs if ours != theirs]


def carried(config: PreTrainedConfig, target: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of `config` that a config of another class takes over as they are.

    Those it declares itself, and those that none of the classes knows: they are the user's own.
    """
    known = _declared(target)
    foreign = set().union(*(_declared(c) for c in (type(config), *_family_classes()))) - known
    leave = {"model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"}
    return {k: v for k, v in config.to_dict().items() if k not in foreign and k not in leave}


def _declared(config_class: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _family_classes() -> list[type[PreTrainedConfig]]:
    return [CONFIG_MAPPING[family] for family in FAMILIES]
