"""What a RoutedLlama is: a LLaMA config, and for each layer which attention and which MLP it has.

    config = RoutedLlamaConfig(..., attention={"kind": "moh", "top_k": 4}, mlp={"kind": "dense"})
    config.attention_spec(3).shared_heads

`attention` and `mlp` hold one specification for all layers, or a list with one per layer.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from transformers import LlamaConfig

from moe.errors import UserError


class _Spec:
    """Shared reading, writing and checking of one layer part's specification."""

    kind: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON values; unknown keys and illegal choices are all reported at once."""
        hints = get_type_hints(cls)
        problems = []
        for key, value in values.items():
            if key not in hints:
                close = difflib.get_close_matches(key, hints, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(hints)}."
                problems.append(f"{cls.part()}.{key} is not a field.{hint}")
            elif get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
                choices = ", ".join(map(str, get_args(hints[key])))
                problems.append(f"{cls.part()}.{key}={value!r} is unknown. Use one of {choices}.")
        if problems:
            raise UserError("\n".join(problems))
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields that differ from their defaults, and always `kind`."""
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.name == "kind" or getattr(self, f.name) != f.default
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}

    @classmethod
    def part(cls) -> str:
        """`attention` or `mlp`: the config field this specification lives in."""
        raise AssertionError


BalanceNorm = Literal["code", "paper", "unit"]
"""Scale of a balance loss: MoH's code (R·ΣPf), its paper (ΣPf), or 1 when balanced (R/K·ΣPf)."""

BalanceScope = Literal["micro", "global"]
"""Tokens over which f, the load of each part, is counted: this forward pass, or a whole step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec(_Spec):
    """One layer's attention: dense, or MoH (arXiv 2410.11842) with one of its two routers.

    Heads are counted in the units of `granularity`: query heads, or whole KV groups.
    """

    kind: Literal["dense", "moh"] = "dense"
    router: Literal["qnorm", "two_stage"] = "qnorm"
    shared_heads: tuple[int, ...] = ()  # always on; indices of heads (or of KV groups)
    top_k: int = 0  # routed heads kept per token, besides the shared ones
    granularity: Literal["head", "kv_group"] = "head"
    straight_through: Literal["all", "selected"] = "all"  # which routed scores get a gradient
    differentiate_std: bool = True  # whether that gradient flows through the norms' deviation
    std_eps: float = 1e-6
    routed_scale: float = 1.0  # 1, or R/K to make up for the heads that are off
    balance_coef: float = 0.01
    balance_norm: BalanceNorm = "code"
    balance_scope: BalanceScope = "micro"

    @classmethod
    def part(cls) -> str:
        return "attention"

    def routed_heads(self, units: int) -> tuple[int, ...]:
        """Indices of the heads (or groups) that compete, in ascending order, out of `units`."""
        shared = set(self.shared_heads)
        return tuple(i for i in range(units) if i not in shared)

    def problems(self, heads: int, kv_heads: int) -> list[str]:
        """What is wrong with this specification for `heads` query and `kv_heads` KV heads."""
        if self.kind == "dense":
            return []
        units = kv_heads if self.granularity == "kv_group" else heads
        name = "KV groups" if self.granularity == "kv_group" else "heads"
        found = []
        if bad := [i for i in self.shared_heads if not 0 <= i < units]:
            found.append(
                f"attention.shared_heads={bad} is outside 0..{units - 1} ({units} {name})."
            )
        if len(set(self.shared_heads)) != len(self.shared_heads):
            found.append(f"attention.shared_heads={list(self.shared_heads)} repeats an index.")
        routed = units - len(set(self.shared_heads))
        if not 1 <= self.top_k <= routed:
            found.append(
                f"attention.top_k={self.top_k} must be between 1 and {routed}: "
                f"{units} {name} less {units - routed} shared leave {routed} to choose from."
            )
        if self.router == "two_stage" and self.granularity != "head":
            found.append("attention.router=two_stage routes single heads: use granularity=head.")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPSpec(_Spec):
    """One layer's MLP: dense, or `num_experts` gated FFNs of which each token visits `top_k`."""

    kind: Literal["dense", "moe"] = "dense"
    num_experts: int = 0
    top_k: int = 0
    intermediate_size: int | None = None  # of one expert; None: the config's
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True  # weights of the chosen experts sum to 1 (before weight_scale)
    weight_scale: float = 1.0
    shared_intermediate_size: int = 0  # of an expert that every token visits; 0: none
    selection_bias: bool = False  # a bias on the choice only, moved against the load (no loss)
    balance_coef: float = 0.01
    balance_scope: BalanceScope = "micro"
    z_coef: float = 0.0

    @classmethod
    def part(cls) -> str:
        return "mlp"

    def problems(self, hidden_act: str, mlp_bias: bool) -> list[str]:
        """What is wrong with this specification in a model of this activation and bias."""
        if self.kind == "dense":
            return []
        found = []
        if hidden_act != "silu":
            found.append(
                f"hidden_act={hidden_act!r}: experts are SwiGLU, hidden_act must be 'silu'."
            )
        if mlp_bias:
            found.append("mlp_bias=True: experts have no bias. Keep the MLP dense.")
        if self.num_experts < 1:
            found.append(f"mlp.num_experts={self.num_experts} must be at least 1.")
        if not 1 <= self.top_k <= max(self.num_experts, 1):
            found.append(
                f"mlp.top_k={self.top_k} must be between 1 and num_experts={self.num_experts}."
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            found.append(f"mlp.intermediate_size={self.intermediate_size} must be positive.")
        if self.shared_intermediate_size < 0:
            found.append(f"mlp.shared_intermediate_size={self.shared_intermediate_size} < 0.")
        return found


class RoutedLlamaConfig(LlamaConfig):
    """LlamaConfig, the switches that Mistral, Qwen2 and Qwen3 add to it, and the routed parts.

    Raises UserError with every problem found when the routed parts do not fit the model.
    """

    model_type = "routed_llama"

    attention: dict | list | None = None
    mlp: dict | list | None = None
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
        return AttentionSpec.from_dict(_of_layer(self.attention, layer))

    def mlp_spec(self, layer: int) -> MLPSpec:
        """The MLP of one layer, its expert width filled in."""
        spec = MLPSpec.from_dict(_of_layer(self.mlp, layer))
        width = spec.intermediate_size or self.intermediate_size
        return dataclasses.replace(spec, intermediate_size=width)

    def problems(self) -> list[str]:
        """Everything that makes this config impossible, one sentence each."""
        found = []
        assert self.num_key_value_heads is not None
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
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
