"""Tiny models for tests: O(1) activations, odd head counts, every family."""

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from moe.hf.families import routed_config
from moe.model import RoutedLlamaForCausalLM

LETTERS = string.printable[:90]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"sliding_window": 7}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
}

MOH = {"kind": "moh", "shared_heads": [0, 1, 4], "top_k": 3}
TWO_STAGE = {**MOH, "router": "two_stage"}
CALIBRATED = {**MOH, "router": "calibrated"}
THRESHOLD = {"kind": "moh", "router": "calibrated", "budget": "threshold", "shared_heads": [1],
             "mean_heads": 5.5}  # fmt: skip
BUDGET = {"kind": "uoe", "num_experts": 4, "mode": "budget", "mean_experts": 2, "router_bias": True}
GROUPS_ON = {**THRESHOLD, "granularity": "kv_group", "mean_heads": 2}
MOE = {"kind": "moe", "num_experts": 4, "top_k": 2}


def dense_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Config of a 3-layer model with 9 query heads over 3 KV heads, as SmolLM2 has."""
    config_class, own = FAMILIES[family]
    sizes: dict[str, Any] = {
        "hidden_size": 72,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 97,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config_class(**{**sizes, **own, **overrides})


def dense_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A dense model whose weights make every part matter: logits of O(1)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(dense_config(family, **overrides)).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name and parameter.ndim == 2:
            parameter.data.mul_(4)
        elif "bias" in name or "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def routed_model(
    dense: PreTrainedModel, attention: Any = None, mlp: Any = None, seed: int = 1, **overrides: Any
) -> RoutedLlamaForCausalLM:
    """A routed model with the dense weights where names agree, the rest drawn at O(1) scale."""
    torch.manual_seed(seed)
    fields = {**routed_config(dense.config).to_dict(), "attention": attention, "mlp": mlp}
    config = type(routed_config(dense.config)).from_dict({**fields, **overrides})
    model = RoutedLlamaForCausalLM(config).to(dense.dtype).eval()
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.data.normal_(std=0.2)
        elif ".experts." in name or "_proj.weight" in name:
            parameter.data.mul_(4)
    own = model.state_dict()
    same = {n: t for n, t in dense.state_dict().items() if n in own and own[n].shape == t.shape}
    model.load_state_dict(same, strict=False)
    return model


def copy_experts(model: RoutedLlamaForCausalLM, dense: PreTrainedModel) -> None:
    """Make every expert of every routed MLP the dense model's MLP."""
    for routed, source in zip(model.model.layers, dense.model.layers, strict=True):
        if hasattr(routed.mlp, "experts"):
            mlp = source.mlp
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            routed.mlp.experts.gate_up_proj.data.copy_(gate_up)
            routed.mlp.experts.down_proj.data.copy_(mlp.down_proj.weight)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """A letter a token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter: i for i, letter in enumerate(LETTERS, start=3)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
