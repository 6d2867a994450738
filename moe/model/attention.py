"""The routed attention: LLaMA's, with a gate per (token, head) before the output projection.

B batch, S sequence, N query heads, d head size, H hidden, T = B·S tokens.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
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
from moe.model.router import NormRouter, attention_router
from moe.model.spec import AttentionSpec, BAMAttention, MoHAttention, routed_on


class HeadSplit(Protocol):
    """How heads are divided. The model never sees ranks; an engine injects another than `Whole`,
    whose projections q, k and v give local heads and whose `o_proj` adds up all of them.
    """

    parts: int

    def enter(self, x: Tensor) -> Tensor:
        """The input of the local heads."""

    def take(self, whole: Tensor) -> Tensor:
        """The local ones of the last dimension's heads, or attention experts."""

    def leave(self, y: Tensor, *used: Tensor) -> Tensor:
        """The sum over all heads from that of the local ones. Those `used` get a gradient even
        where no local head read them.
        """

    def held(self, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a projection, as far as they are local."""


class Whole:
    """All heads are local."""

    parts = 1

    def enter(self, x: Tensor) -> Tensor:
        return x

    def take(self, whole: Tensor) -> Tensor:
        return whole

    def leave(self, y: Tensor, *used: Tensor) -> Tensor:
        return y

    def held(self, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
        return linear.weight, linear.bias  # type: ignore[return-value]


class RoutedAttention(LlamaAttention):
    """Dense, MoH or BAM attention of the LLaMA, Mistral, Qwen2 and Qwen3 families.

    One attention call over the keys and values of every token, then a gate per head. BAM's experts
    are groups of heads of one wide attention: Σ_e g_e O_e A_e(x) = O (g ∘ A(x)).
    """

    split: HeadSplit = Whole()

    def __init__(self, config: RoutedLlamaConfig, layer: int) -> None:
        spec = config.attention_spec(layer)
        wide = widened(config, spec)
        super().__init__(wide, layer)
        moh = spec if isinstance(spec, MoHAttention) and spec.router != "two_stage" else None
        # a straight-through router learns from what heads would have been worth
        self.learns_from_heads_that_are_off = moh is not None and moh.straight_through == "all"
        self.config = config  # the model's own: its attention implementation can be changed
        assert config.layer_types is not None and wide.num_key_value_heads is not None
        num_heads, head_dim = wide.num_attention_heads, self.head_dim
        self.heads_on = heads_on(spec, num_heads, wide.num_key_value_heads)
        self.varies = moh is not None and moh.budget == "threshold"  # heads_on is then a mean
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
        reach_BS: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, RoutingLoad | None]:
        """Output [B, S, H], attention weights where the implementation gives them, head load.

        `reach_BS`, where a mask can be said so, is how far back each query sees (`reach`).
        """
        batch, length, _ = x_BSH.shape
        inner_BSH = self.split.enter(x_BSH)
        q_BSNd, gate, load = self._route(x_BSH, inner_BSH, valid_T, reference_R)
        k_BSGd, v_BSGd = (
            projection(inner_BSH).view(batch, length, -1, self.head_dim)
            for projection in (self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNd, k_BSGd = self.q_norm(q_BSNd), self.k_norm(k_BSGd)
        query, key, value = (t.transpose(1, 2) for t in (q_BSNd, k_BSGd, v_BSGd))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if gate is not None and reach_BS is not None:
            gate_BSN = gate.view(batch, length, -1)
            on_BSN, most = self._heads_on(gate_BSN, query)
            # torch's own attention is the faster one over all heads, but not with a mask
            masked = attention_mask is not None and ops.attends_heads(query)
            if on_BSN is not None or masked:
                heads_BSNd = self._attend_gated(query, key, value, reach_BS, gate_BSN, on_BSN, most)
                return self.o_proj(heads_BSNd.reshape(batch, length, -1)), None, load
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

    def _route(
        self, x_BSH: Tensor, inner_BSH: Tensor, valid_T: Tensor | None, reference_R: Tensor | None
    ) -> tuple[Tensor, Tensor | None, RoutingLoad | None]:
        """Queries [B, S, N, d] and gate [T, N] of the local heads, and the load of all."""
        if self.router is None:
            return self._queries(inner_BSH, None), None, None
        q_BSNd = query_TNd = None
        if isinstance(self.router, NormRouter):
            # before q_norm and RoPE: a normed query's length says nothing
            q_BSNd = self._queries(inner_BSH, None)
            query_TNd = q_BSNd.flatten(0, 1)
        gate, load = self.router(x_BSH.flatten(0, 1), query_TNd, valid_T, reference_R)
        gate = self.split.take(gate)
        if q_BSNd is None:
            q_BSNd = self._queries(inner_BSH, gate)
        return q_BSNd, gate, load

    def _queries(self, x_BSH: Tensor, gate_TN: Tensor | None) -> Tensor:
        """Queries [B, S, N, d] of the local heads; zeros for what is off, where that pays."""
        shape = *x_BSH.shape[:2], -1, self.head_dim
        if gate_TN is not None and not self._asks(gate_TN):
            heads = gate_TN.shape[1] * self.split.parts
            weights = self.head_dim * x_BSH.shape[2]
            share = ops.projection_share(x_BSH.device, len(gate_TN), weights)
            if self.heads_on <= share * heads:
                given = x_BSH.flatten(0, 1), *self.split.held(self.q_proj)
                return ops.project_heads(*given, gate_TN.detach() != 0).view(shape)
        return self.q_proj(x_BSH).view(shape)

    def _asks(self, gate: Tensor) -> bool:
        """Whether heads that are off are asked for what they would have been worth."""
        return self.learns_from_heads_that_are_off and gate.requires_grad

    def _heads_on(self, gate_BSN: Tensor, query: Tensor) -> tuple[Tensor | None, int | None]:
        """Which heads to compute and how many at most; None where leaving some out does not pay."""
        batch, length, local = gate_BSN.shape
        heads = local * self.split.parts
        if length == 1 and ops.attends_heads(query) and not torch.is_grad_enabled():
            # what takes time is reading keys and values, so any head less pays
            pays = self.heads_on < heads
        else:
            share = ops.sparse_share(query.device, query.dtype, length)
            pays = self.heads_on <= share * heads
        if self._asks(gate_BSN) or not pays:
            return None, None
        most = local if self.varies else min(round(self.heads_on), local)
        return gate_BSN.detach() != 0, batch * length * most

    def _attend_gated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        reach_BS: Tensor,
        gate_BSN: Tensor,
        on_BSN: Tensor | None,
        most: int | None,
    ) -> Tensor:
        """Attention and gate in one kernel."""
        q_BSNd, k_BLGd, v_BLGd = (t.transpose(1, 2) for t in (query, key, value))
        length = gate_BSN.shape[1]
        place_S = torch.arange(length, device=query.device) + k_BLGd.shape[1] - length
        if self.sliding_window is not None:
            reach_BS = reach_BS.clamp(max=self.sliding_window - 1)
        first_BS = (place_S - reach_BS).clamp(min=0)
        given = q_BSNd, k_BLGd, v_BLGd, first_BS, self.scaling
        return ops.attend_heads(*given, gate_BSN, on_BSN, most)


def heads_on(spec: AttentionSpec, heads: int, kv_heads: int) -> float:
    """Heads of `heads` that have a gate other than 0 per token, on average."""
    if not isinstance(spec, MoHAttention):
        return heads
    units = routed_on(spec) + len(spec.shared_heads)
    return units if spec.granularity == "head" else units * heads / kv_heads


def reach(position_ids: Tensor, attention_mask: Tensor | None, past: int) -> Tensor | None:
    """How many keys before its own each query may see [B, S]: those of its document, or after the
    padding on the left; negative for padding. None where a 2-D mask has holes.
    """
    length = position_ids.shape[1]
    place_S = torch.arange(length, device=position_ids.device)
    if attention_mask is None:
        begin_BS = torch.zeros_like(position_ids)
        if past == 0:  # documents packed into one row count their positions from 0
            again = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
            begin_BS = torch.where(again, place_S, 0).cummax(1).values
        return place_S + past - begin_BS
    there = attention_mask.bool()
    total = there.shape[1]
    begin_B1 = there.int().argmax(1, keepdim=True)
    end_B1 = total - there.int().flip(1).argmax(1, keepdim=True)
    if not bool((there.sum(1, keepdim=True) == end_B1 - begin_B1).all()):
        return None
    return place_S + total - length - begin_B1


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
