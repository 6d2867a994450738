"""What a RoutedLlama is: a LLaMA config, and for each layer which attention and which MLP it has.

    config = RoutedLlamaConfig(..., attention={"kind": "moh", "top_k": 4}, mlp={"kind": "dense"})
    config.attention_spec(3).shared_heads

`attention` and `mlp` hold one specification (`moe.model.spec`) for all layers, or a list with one
per layer.
"""

import dataclasses
from typing import Any

from transformers import LlamaConfig

from moe.errors import UserError
from moe.model import spec
from moe.model.spec import AttentionSpec, MLPSpec, UoEMLP

BLOCKS = ("sequential", "parallel")


class RoutedLlamaConfig(LlamaConfig):
    """LlamaConfig, the switches that Mistral, Qwen2 and Qwen3 add to it, and the routed parts.

    Raises UserError with every problem found when the routed parts do not fit the model.
    """

    model_type = "routed_llama"

    attention: dict | list | None = None
    mlp: dict | list | None = None
    block: str = "sequential"  # parallel: attention and MLP of one norm, both added to the input
    attention_output_bias: bool | None = None  # of o_proj; None: as attention_bias
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
    sliding_window: int | None = None
    layer_types: list | None = None  # full_attention or sliding_attention, per layer
    source_model_type: str | None = None  # the dense family this came from

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.attention = self.attention or {"kind": "dense"}
        self.mlp = self.mlp or {"kind": "dense"}
        if problems := self.problems():
            raise UserError("\n".join(problems))

    def validate_architecture(self) -> None:
        """Head counts need not divide hidden_size here: head_dim is a field of its own."""

    def attention_spec(self, layer: int) -> AttentionSpec:
        """The attention of one layer."""
        return spec.attention_spec(_of_layer(self.attention, layer))

    def mlp_spec(self, layer: int) -> MLPSpec:
        """The MLP of one layer, its expert width filled in."""
        found = spec.mlp_spec(_of_layer(self.mlp, layer))
        width = found.intermediate_size or self.intermediate_size
        if isinstance(found, UoEMLP) and found.intermediate_size is None and found.num_experts > 0:
            width = (self.intermediate_size - found.shared_intermediate_size) // found.num_experts
        return dataclasses.replace(found, intermediate_size=width)

    @property
    def causal(self) -> bool:
        """Whether logits of a prefix are those of the whole, in every layer."""
        return all(spec.causal(self.mlp_spec(i)) for i in range(self.num_hidden_layers))

    def problems(self) -> list[str]:
        """Everything that makes this config impossible, one sentence each."""
        found = []
        assert self.num_key_value_heads is not None
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.block not in BLOCKS:
            found.append(f"block={self.block!r} is unknown. Use one of {', '.join(BLOCKS)}.")
        for name, parts in (("attention", self.attention), ("mlp", self.mlp)):
            if isinstance(parts, list) and len(parts) != self.num_hidden_layers:
                found.append(
                    f"{name} lists {len(parts)} layers, the model has {self.num_hidden_layers}. "
                    "Give one entry per layer, or a single entry for all."
                )
        if found:
            return found
        for layer in range(self.num_hidden_layers):
            try:
                heads = self.num_attention_heads, self.num_key_value_heads
                found += self.attention_spec(layer).problems(*heads)
                found += self.mlp_spec(layer).problems(self.hidden_act, self.mlp_bias)
            except UserError as error:
                found += str(error).split("\n")
        return list(dict.fromkeys(found))  # one config for all layers says it once


def _of_layer(parts: dict | list | None, layer: int) -> dict[str, Any]:
    assert parts is not None
    return parts[layer] if isinstance(parts, list) else parts
