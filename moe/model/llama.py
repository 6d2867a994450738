"""RoutedLlama: a LLaMA whose layers choose their attention and their MLP.

model = RoutedLlamaForCausalLM.from_pretrained(folder)
output = model(input_ids, labels=input_ids)   # .loss, .router_loss, .routing
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moe.errors import UserError
from moe.kernels import ops
from moe.model.attention import RoutedAttention, reach
from moe.model.cache import CACHE
from moe.model.config import RoutedLlamaConfig
from moe.model.experts import Experts, RoutedMLP, memory_of
from moe.model.losses import LayerLoad, LayerRouting, RoutingLoad, weighed
from moe.model.router import CalibratedRouter, ExpertRouter, SoftRouter
from moe.model.spec import DenseMLP, UoEAttention, routed_on
from moe.model.union import UnionRouter
from moe.model.union_attention import UnionAttention


@dataclass
class RoutedModelOutput(BaseModelOutputWithPast):
    """Base output and what every layer's routers did."""

    routing: tuple[LayerRouting, ...] | None = None


@dataclass
class RoutedCausalLMOutput(CausalLMOutputWithPast):
    """Causal LM output, the routers' loss and what they did.

    `loss` is the mean cross entropy over labelled tokens, plus `router_loss` in training mode.
    """

    router_loss: Tensor | None = None
    routing: tuple[LayerRouting, ...] | None = None


class RoutedDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm decoder layer with the attention and MLP that the config names for it."""

    def __init__(self, config: RoutedLlamaConfig, layer: int) -> None:
        super().__init__()
        attention_spec, mlp_spec = config.attention_spec(layer), config.mlp_spec(layer)
        attention = UnionAttention if isinstance(attention_spec, UoEAttention) else RoutedAttention
        self.self_attn = attention(config, layer)
        if isinstance(mlp_spec, DenseMLP):
            self.mlp: RoutedMLP | LlamaMLP = LlamaMLP(config)
        else:
            self.mlp = RoutedMLP(config, mlp_spec)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = None  # a parallel block has one norm
        if config.block == "sequential":
            self.post_attention_layernorm = LlamaRMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )

    def forward(
        self,
        x_BSH: Tensor,
        valid_T: Tensor | None = None,
        reference: LayerLoad | None = None,
        places_BS: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, LayerRouting]:
        """Hidden states [B, S, H] and the layer's routing; places count tokens but no padding."""
        attention_reference, mlp_reference = reference or LayerLoad(None, None)
        union = {"places_BS": places_BS} if isinstance(self.self_attn, UnionAttention) else {}
        normed_BSH = self.input_layernorm(x_BSH)
        attended_BSH, _, attention_load = self.self_attn(
            normed_BSH,
            valid_T=valid_T,
            reference_R=attention_reference,
            **union,
            **kwargs,
        )
        x_BSH = x_BSH + attended_BSH
        if self.post_attention_layernorm is not None:
            normed_BSH = self.post_attention_layernorm(x_BSH)
        mlp_load: RoutingLoad | None = None
        if isinstance(self.mlp, RoutedMLP):
            memory = memory_of(self.mlp, kwargs.get(CACHE), self.self_attn.layer_idx)
            y_BSH, mlp_load = self.mlp(normed_BSH, valid_T, mlp_reference, memory)
        else:
            y_BSH = self.mlp(normed_BSH)
        return x_BSH + y_BSH, LayerRouting(attention_load, mlp_load)


class RoutedLlamaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, place, checkpoint and cache these models."""

    config_class = RoutedLlamaConfig
    config: RoutedLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RoutedDecoderLayer"]  # noqa: RUF012  (transformers' protocol)
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": RoutedDecoderLayer,
        "attentions": OutputRecorder(RoutedAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        routers = CalibratedRouter, ExpertRouter, SoftRouter, UnionRouter
        if isinstance(module, (Experts, *routers)):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, CalibratedRouter | UnionRouter) and module.bias is not None:
            init.constant_(module.bias, self._first_bias(module))
        if isinstance(module, ExpertRouter | UnionRouter) and module.selection_bias is not None:
            init.zeros_(module.selection_bias)

    def _first_bias(self, router: CalibratedRouter | UnionRouter) -> float:
        """0, or for a threshold the bias with which a fresh router keeps its budget: the scores of
        a normed input of H numbers have deviation std · √H.
        """
        if not router.thresholds:
            return 0.0
        share = min(routed_on(router.spec) / len(router.weight), 0.999)  # all of them: not infinite
        std = self.config.initializer_range * math.sqrt(self.config.hidden_size)
        return std * NormalDist().inv_cdf(share)


class RoutedLlamaModel(RoutedLlamaPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: RoutedLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            RoutedDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        reference_load: Sequence[LayerLoad] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RoutedModelOutput:
        """Hidden states [B, S, H], cache, and the routing of every layer.

        attention_mask is 2-D (1 token, 0 padding), or a mask per layer type already prepared; only
        a 2-D mask tells padding from tokens, so without one every position counts in the loads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        length = inputs_embeds.shape[1]
        places_BS = position_ids
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        valid_T = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            valid_T = attention_mask[:, -length:].reshape(-1).bool()
            if places_BS is None:  # padding on the left is in the positions, as in any LLaMA
                places_BS = (attention_mask.long().cumsum(-1) - 1)[:, -length:]
        masks = self._masks(inputs_embeds, attention_mask, cache, position_ids)
        reach_BS = self._reach(inputs_embeds, attention_mask, cache, position_ids)
        x_BSH = inputs_embeds
        position_embeddings = self.rotary_emb(x_BSH, position_ids)
        routing = []
        assert self.config.layer_types is not None
        for index, layer in enumerate(self.layers):
            x_BSH, layer_routing = layer(
                x_BSH,
                valid_T=valid_T,
                reference=None if reference_load is None else reference_load[index],
                attention_mask=masks[self.config.layer_types[index]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                places_BS=position_ids if places_BS is None else places_BS,
                reach_BS=reach_BS,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
            routing.append(layer_routing)
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        return RoutedModelOutput(last_hidden_state=self.norm(x_BSH), routing=tuple(routing), **kept)

    def _reach(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> Tensor | None:
        """What our own attention takes in place of a mask [B, S]; None where it does not run."""
        if not (attention_mask is None or isinstance(attention_mask, Tensor)):
            return None
        planar = attention_mask is None or attention_mask.ndim == 2
        drops = self.training and self.config.attention_dropout
        preallocated = getattr(cache, "is_compileable", False)  # its last keys are not the newest
        given = inputs_embeds.device, inputs_embeds.dtype
        runs = ops.triton_runs(*given) or ops.sparse_share(*given, inputs_embeds.shape[1]) > 0
        sdpa = self.config._attn_implementation == "sdpa"
        if not planar or drops or preallocated or not runs or not sdpa:
            return None
        past = 0 if cache is None else cache.get_seq_length()
        return reach(position_ids.expand(len(inputs_embeds), -1), attention_mask, past)

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> dict[str, Any]:
        """The mask of each layer type in use; `generate` may have prepared them already."""
        if isinstance(attention_mask, dict):
            return dict(attention_mask)
        build = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        return {
            kind: build[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
            for kind in dict.fromkeys(self.config.layer_types or ())
        }


class RoutedLlamaForCausalLM(RoutedLlamaPreTrainedModel, GenerationMixin):
    """RoutedLlama with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RoutedLlamaConfig) -> None:
        super().__init__(config)
        self.model = RoutedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reference_load: Sequence[LayerLoad] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RoutedCausalLMOutput:
        """Logits [B, S, V], and with labels [B, S] the loss (-100 is not counted).

        reference_load gives, per layer, the fraction of tokens that chose each head and expert over
        the previous whole step, which parts of balance scope `global` take as their load.
        """
        output: RoutedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            reference_load=reference_load,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        x_BSH = output.last_hidden_state
        assert x_BSH is not None and output.routing is not None
        if isinstance(logits_to_keep, Tensor):
            x_BSH = x_BSH[:, logits_to_keep]
        elif logits_to_keep:
            x_BSH = x_BSH[:, -logits_to_keep:]
        logits = self.lm_head(x_BSH)
        router_loss = self.router_loss(output.routing)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                loss = loss + router_loss.to(loss.device)
        return RoutedCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_loss=router_loss,
            routing=output.routing,
            **{CACHE: output.get(CACHE)},
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As GenerationMixin's. Raises UserError where experts choose among tokens to come."""
        modes = {
            getattr(self.config.mlp_spec(i), "mode", "") for i in range(len(self.model.layers))
        }
        if "expert_choice" in modes:
            raise UserError(
                "mlp.mode=expert_choice is not causal: an expert picks among all tokens of a "
                "sequence, later ones included. Generate with mode token_choice or threshold."
            )
        return super().generate(*args, **kwargs)

    def router_loss(self, routing: Sequence[LayerRouting]) -> Tensor:
        """Balance and z losses with their coefficients: the mean over layers that route heads, plus
        the mean over layers that route experts (MoH's training code averages over layers too).
        """
        heads, experts = [], []
        for index, (attention, mlp) in enumerate(routing):
            if attention is not None:
                heads.append(weighed(attention, self.config.attention_spec(index)))
            if mlp is not None:
                experts.append(weighed(mlp, self.config.mlp_spec(index)))
        total = torch.zeros((), device=self.lm_head.weight.device)
        for losses in (heads, experts):
            if losses:
                total = total + torch.stack([x.to(total.device) for x in losses]).mean()
        return total  # float32, or wider in a wider model
