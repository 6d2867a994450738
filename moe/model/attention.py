"""The routed attention: LLaMA's, with a gate per (token, head) before the output projection.

B batch, S sequence, N query heads, d head size, H hidden, T = B·S tokens.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from moe.kernels import ops
from moe.model.config import RoutedLlamaConfig
from moe.model.losses import RoutingLoad
from moe.model.router import attention_router
from moe.model.spec import AttentionSpec, BAMAttention


class RoutedAttention(LlamaAttention):
    """Dense, MoH or BAM attention of the LLaMA, Mistral, Qwen2 and Qwen3 families.

    One attention call over the keys and values of every token, then a gate per head. BAM's experts
    are groups of heads of one wide attention: Σ_e g_e O_e A_e(x) = O (g ∘ A(x)).
    """

    def __init__(self, config: RoutedLlamaConfig, layer: int) -> None:
        spec = config.attention_spec(layer)
        wide = widened(config, spec)
        super().__init__(wide, layer)
        self.config = config  # the model's own: its attention implementation can be changed
        assert config.layer_types is not None and wide.num_key_value_heads is not None
        num_heads, head_dim = wide.num_attention_heads, self.head_dim
        if config.attention_output_bias != config.attention_bias:  # Qwen2: q, k and v only
            self.o_proj = nn.Linear(
                num_heads * head_dim, config.hidden_size, bias=bool(config.attention_output_bias)
            )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            # attention experts come with norms of their own: a weight per head
            shapes: list[Any] = [head_dim, head_dim]
            if isinstance(spec, BAMAttention):
                shapes = [(num_heads, head_dim), (wide.num_key_value_heads, head_dim)]
            self.q_norm = LlamaRMSNorm(shapes[0], eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(shapes[1], eps=config.rms_norm_eps)
        slides = config.layer_types[layer] == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None
        heads = config.num_attention_heads, config.num_key_value_heads
        self.router = attention_router(spec, *heads, config.hidden_size)  # type: ignore[arg-type]

    def forward(  # type: ignore[override]  # returns the load too
        self,
        x_BSH: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        valid_T: Tensor | None = None,
        reference_R: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, RoutingLoad | None]:
        """Output [B, S, H], attention weights where the implementation gives them, head load."""
        batch, length, _ = x_BSH.shape
        q_BSNd, k_BSGd, v_BSGd = (
            projection(x_BSH).view(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        gate, load = None, None
        if self.router is not None:
            # before q_norm and RoPE: a normed query's length says nothing
            query_TNd, x_TH = q_BSNd.flatten(0, 1), x_BSH.flatten(0, 1)
            gate, load = self.router(x_TH, query_TNd, valid_T, reference_R)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNd, k_BSGd = self.q_norm(q_BSNd), self.k_norm(k_BSGd)
        query, key, value = (t.transpose(1, 2) for t in (q_BSNd, k_BSGd, v_BSGd))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        heads_BSNd, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if gate is not None:
            heads_BSNd = ops.gate_heads(heads_BSNd, gate.view(batch, length, -1))
        return self.o_proj(heads_BSNd.reshape(batch, length, -1)), weights, load


def widened(config: RoutedLlamaConfig, spec: AttentionSpec) -> RoutedLlamaConfig:
    """The config of the attention as it is computed: BAM's has the heads of all its experts."""
    if not isinstance(spec, BAMAttention):
        return config
    assert config.num_key_value_heads is not None
    wide = copy.copy(config)
    wide.num_attention_heads = spec.num_experts * config.num_attention_heads
    if spec.kv == "expert":
        wide.num_key_value_heads = spec.num_experts * config.num_key_value_heads
    return wide
