"""Routed attention in which what is not selected gives no key and no value either.

An expert is a run of whole KV groups: its query heads, keys and values. B sequences, S tokens, E
experts, P (token, expert) pairs of one expert, N query heads, G KV heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import rotate_half

from moe.kernels import ops
from moe.model.attention import RoutedAttention
from moe.model.cache import RaggedLayer, kept, pack, places, ragged
from moe.model.config import RoutedLlamaConfig
from moe.model.losses import RoutingLoad
from moe.model.spec import UoEAttention
from moe.model.union import UnionRouter


class UnionAttention(RoutedAttention):
    """UoE attention: each expert attends over the tokens that selected it, at their own positions.

    `MOE_KERNELS=naive` takes the specification: dense keys and values, and a mask over them.
    """

    def __init__(self, config: RoutedLlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        spec = config.attention_spec(layer)
        assert isinstance(spec, UoEAttention)
        self.spec = spec
        self.router: UnionRouter = UnionRouter(spec, config.hidden_size)

    def forward(  # type: ignore[override]  # returns the load too
        self,
        x_BSH: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        valid_T: Tensor | None = None,
        reference_R: Tensor | None = None,
        cache: Cache | None = None,
        places_BS: Tensor | None = None,
        reach_BS: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, RoutingLoad]:
        """Output [B, S, H], no attention weights, and the experts' load."""
        cache = past_key_values if cache is None else cache
        batch, length, _ = x_BSH.shape
        assert places_BS is not None
        sinks_T = (places_BS < self.spec.sink_tokens).expand(batch, length).reshape(-1)
        choice = self.router(x_BSH, valid_T, reference_R, forced_T=sinks_T)
        mask_TE = choice.mask_TE if valid_T is None else choice.mask_TE & valid_T[:, None]
        mask_BSE = self.split.take(mask_TE.view(batch, length, -1))
        weights_BSE = self.split.take(choice.weights_TE.view(batch, length, -1))
        if attention_mask is not None and attention_mask.ndim != 4:
            attention_mask = None  # flash attention's: padding, which is never selected
        x_BSH = self.split.enter(x_BSH)
        given = x_BSH, mask_BSE, weights_BSE, position_embeddings, attention_mask, cache
        if ops.forced_backend() == "naive":
            return self._masked(*given), None, choice.load
        return self._compact(*given, reach_BS), None, choice.load

    def _masked(
        self,
        x_BSH: Tensor,
        mask_BSE: Tensor,
        weights_BSE: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """The specification: every key is there, and those not selected are masked."""
        batch, length, _ = x_BSH.shape
        query, key, value = (t.transpose(1, 2) for t in self._project(x_BSH))
        cos, sin = (t[:, None] for t in position_embeddings)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        keys_BLE = mask_BSE
        if cache is not None:
            held = kept(cache, self.layer_idx)
            earlier = [held["selected"]] if "selected" in held else []
            held["selected"] = keys_BLE = torch.cat([*earlier, mask_BSE], 1)
            key, value = cache.update(key, value, self.layer_idx)
        keys_BLE = keys_BLE[:, -key.shape[2] :]
        if not bool(keys_BLE.all()):  # else the mask of the dense model, for its very bits
            attention_mask = self._mask(keys_BLE, length, attention_mask)
        heads_BSNd, _ = sdpa_attention_forward(
            self, query, key, value, attention_mask, dropout=self._dropout, scaling=self.scaling
        )
        gate_BSN = weights_BSE.repeat_interleave(self._heads_per_expert, -1)
        heads_BSNd = ops.gate_heads(heads_BSNd, gate_BSN)
        return self.o_proj(heads_BSNd.reshape(batch, length, -1))

    def _mask(self, keys_BLE: Tensor, length: int, attention_mask: Tensor | None) -> Tensor:
        """[B, N, S, L], True where a query sees a key; its own always, or it would see nothing."""
        total = keys_BLE.shape[1]
        slots = torch.arange(total, device=keys_BLE.device)
        own_SL = slots[-length:, None] == slots
        allowed = (slots[-length:, None] >= slots)[None, None]
        if attention_mask is not None:
            allowed = allowed & _boolean(attention_mask)
        keys_BNL = keys_BLE.transpose(1, 2).repeat_interleave(self._heads_per_expert, 1)
        return (allowed & keys_BNL[:, :, None]) | own_SL

    def _compact(
        self,
        x_BSH: Tensor,
        mask_BSE: Tensor,
        weights_BSE: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        reach_BS: Tensor | None,
    ) -> Tensor:
        """Only selected tokens are projected, stored and attended to, expert by expert."""
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "a static cache keeps a place for every token, and a union of attention experts "
                "keeps those that were selected: use a dynamic cache, transformers' default."
            )
        batch, length, hidden = x_BSH.shape
        experts = mask_BSE.shape[-1]
        layer = RaggedLayer() if cache is None else ragged(cache, self.layer_idx)
        cos_BSd, sin_BSd = (t.expand(batch, length, -1) for t in position_embeddings)
        held = [self.split.held(p) for p in (self.q_proj, self.k_proj, self.v_proj)]
        weight, bias = self.split.held(self.o_proj)
        parts = [_split(*pair, experts) for pair in held]
        columns = weight.view(hidden, experts, -1).unbind(1)
        wide = torch.promote_types(x_BSH.dtype, torch.float32)
        y_TH = x_BSH.new_zeros(batch * length, hidden, dtype=wide)
        for expert in range(experts):
            batch_P, step_P = mask_BSE[..., expert].nonzero(as_tuple=True)
            if not len(batch_P):
                continue
            x_PH = x_BSH[batch_P, step_P]
            q, k, v = (
                F.linear(x_PH, w[expert], b and b[expert]).view(len(x_PH), -1, self.head_dim)
                for w, b in parts
            )
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            cos, sin = (t[batch_P, step_P][:, None] for t in (cos_BSd, sin_BSd))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            rows = k, v, layer.seen + step_P
            fresh = expert not in layer.experts
            if fresh and reach_BS is not None and not self._dropout and ops.attends_heads(q):
                heads_PNd = self._attend_in_a_row(q, k, v, batch_P, step_P, reach_BS)
                if cache is not None:
                    layer.append(expert, batch, batch_P, rows)
            else:
                heads_PNd = self._attend(q, layer, expert, batch, batch_P, rows, attention_mask)
            gate_P = weights_BSE[batch_P, step_P, expert]
            heads_PNd = ops.gate_heads(heads_PNd, gate_P[:, None].expand(heads_PNd.shape[:2]))
            out_PH = F.linear(heads_PNd.flatten(1), columns[expert])
            y_TH = y_TH.index_add(0, batch_P * length + step_P, out_PH.to(wide))
        layer.seen += length
        used = [t for pair in held for t in pair if t is not None]
        used += [p for norm in (self.q_norm, self.k_norm) if norm for p in norm.parameters()]
        y_BSH = y_TH.to(x_BSH.dtype).view_as(x_BSH)
        y_BSH = self.split.leave(y_BSH, x_BSH, weights_BSE, weight, *used)
        return y_BSH if bias is None else y_BSH + bias

    def _attend(
        self,
        q_PNd: Tensor,
        layer: RaggedLayer,
        expert: int,
        batch: int,
        batch_P: Tensor,
        rows: tuple[Tensor, Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Heads [P, N, d] of one expert, over its tokens of now and before."""
        fresh = expert not in layer.experts
        count_B = batch_P.bincount(minlength=batch)
        place_P, longest = places(batch_P, count_B), int(count_B.max())
        keys, values, slots_BL = layer.append(expert, batch, batch_P, rows)
        query = pack(q_PNd, batch_P, place_P, batch, longest)
        mask = None
        if not fresh or attention_mask is not None:
            slot_BQ = pack(rows[2], batch_P, place_P, batch, longest)
            mask = self._compact_mask(slot_BQ, slots_BL, layer.seen, attention_mask)
        query, keys, values = (t.transpose(1, 2) for t in (query, keys, values))
        heads, _ = sdpa_attention_forward(
            self, query, keys, values, mask, dropout=self._dropout, scaling=self.scaling
        )
        return heads[batch_P, place_P]

    def _attend_in_a_row(
        self,
        q_PNd: Tensor,
        k_PGd: Tensor,
        v_PGd: Tensor,
        batch_P: Tensor,
        step_P: Tensor,
        reach_BS: Tensor,
    ) -> Tensor:
        """Heads [P, N, d] of one expert's tokens, all sequences in one row: no padding, no mask.

        A token sees those before it from its own sequence, window and document on.
        """
        length = reach_BS.shape[1]
        reach_P = reach_BS[batch_P, step_P]
        if self.sliding_window is not None:
            reach_P = reach_P.clamp(max=self.sliding_window - 1)
        order_P = batch_P * length + step_P
        first_P = torch.searchsorted(order_P, order_P - torch.minimum(reach_P, step_P))
        q, k, v = (t[None] for t in (q_PNd, k_PGd, v_PGd))
        return ops.attend_heads(q, k, v, first_P[None], self.scaling)[0]

    def _compact_mask(
        self, slot_BQ: Tensor, slot_BL: Tensor, seen: int, attention_mask: Tensor | None
    ) -> Tensor:
        """[B, 1, Q, L], True where a selected query sees a selected key.

        `attention_mask` [B, 1, S, L'] is the dense model's, its last column the newest token.
        """
        slot_BQ1, slot_B1L = slot_BQ[:, :, None], slot_BL[:, None]
        allowed = (slot_B1L >= 0) & (slot_B1L <= slot_BQ1)
        if attention_mask is not None:
            given = _boolean(attention_mask)[:, 0].expand(len(slot_BQ), -1, -1)
            first = seen + given.shape[1] - given.shape[2]  # the slot of its first column
            row = torch.arange(len(slot_BQ), device=slot_BQ.device)[:, None, None]
            column = slot_B1L - first
            seen_BQL = given[row, (slot_BQ1 - seen).clamp(min=0), column.clamp(min=0)]
            allowed = allowed & seen_BQL & (column >= 0)
        # rows of padding see something, or they would be nan
        return (allowed | ~allowed.any(-1, keepdim=True))[:, None]

    def _project(self, x_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, S, heads, d] of every token, normed where the model does."""
        q, k, v = (
            p(x_BSH).unflatten(-1, (-1, self.head_dim))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    @property
    def _heads_per_expert(self) -> int:
        return self.config.num_attention_heads // self.spec.num_experts

    @property
    def _dropout(self) -> float:
        return float(self.attention_dropout or 0.0) if self.training else 0.0


def _split(weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Any, Any]:
    """A projection's rows per expert: weights, and biases or None."""
    return (
        weight.view(parts, -1, weight.shape[1]).unbind(0),
        None if bias is None else bias.view(parts, -1).unbind(0),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def _boolean(mask: Tensor) -> Tensor:
    """True where a query may see a key; eager attention's masks are added to the scores."""
    return mask if mask.dtype == torch.bool else mask == 0
