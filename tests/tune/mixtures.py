"""Tiny mixtures of every family whose routers matter: ours and transformers' own.

model = build("deepseek_v3")
ids = tiny.tokens(2, 24)
"""

from typing import Any

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 3,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4, "n_routed_experts": 12,
    "n_group": 4, "topk_group": 2, "head_dim": 8,
}  # fmt: skip
QWEN = {
    "num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1, "num_hidden_layers": 3, "mlp_only_layers": [0],
}  # fmt: skip
NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "qwen2_moe raw": ("qwen2_moe", {**QWEN, "norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 8, "norm_topk_prob": True}),
    "olmoe raw": ("olmoe", {"num_experts": 8, "norm_topk_prob": False}),
    "granitemoe": ("granitemoe", {"num_local_experts": 8}),
    "granitemoeshared": (
        "granitemoeshared", {"num_local_experts": 8, "shared_intermediate_size": 16},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
         "routed_scaling_factor": 2.0},
    ),
    "deepseek_v2 groups": (
        "deepseek_v2",
        {**LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "routed_scaling_factor": 2.5}),
    "deepseek_v3 raw": ("deepseek_v3", {**LATENT, "norm_topk_prob": False}),
    "glm4_moe": (
        "glm4_moe",
        {**LATENT, "num_key_value_heads": 2, "routed_scaling_factor": 1.5},
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 8}),
}  # fmt: skip
MOE = {"kind": "moe", "num_experts": 8, "top_k": 3, "shared_intermediate_size": 16}
OURS: dict[str, dict[str, Any]] = {
    "moe": {"mlp": MOE},
    "moe raw": {"mlp": {**MOE, "renormalise": False}},
    "moe sigmoid": {"mlp": {**MOE, "score": "sigmoid", "weight_scale": 2.5}},
    "moe sigmoid raw": {"mlp": {**MOE, "score": "sigmoid", "renormalise": False}},
    "moe biased": {"mlp": {**MOE, "score": "sigmoid", "selection_bias": True}},
    "moe biased softmax": {"mlp": {**MOE, "renormalise": False, "selection_bias": True}},
    "moe groups": {"mlp": {**MOE, "num_experts": 12, "num_groups": 4, "top_groups": 2}},
    "moe biased groups": {
        "mlp": {**MOE, "score": "sigmoid", "selection_bias": True, "weight_scale": 2.5,
                "num_experts": 12, "num_groups": 4, "top_groups": 2},
    },
    "moh": {"attention": {**tiny.MOH, "routed_scale": 1.5}},
    "moh kv_group": {
        "attention": {"kind": "moh", "shared_heads": [1], "top_k": 1, "granularity": "kv_group"},
    },
    "two_stage": {"attention": tiny.TWO_STAGE},
    "calibrated": {"attention": {**tiny.CALIBRATED, "routed_scale": 1.5}},
    "calibrated threshold": {"attention": {**tiny.THRESHOLD, "routed_scale": 1.5}},
    "calibrated groups": {"attention": tiny.GROUPS_ON},
    "bam expert": {"attention": {"kind": "bam", "num_experts": 3}},
    "bam shared": {"attention": {"kind": "bam", "num_experts": 3, "kv": "shared"}},
    "uoe": {"mlp": {"kind": "uoe", "num_experts": 8, "top_k": 3, "output_scale": 1.5}},
    "uoe soft": {"mlp": {"kind": "uoe", "num_experts": 8, "top_k": 3, "weights": "soft"}},
    "uoe threshold": {"mlp": {"kind": "uoe", "num_experts": 8, "top_k": 3, "mode": "threshold"}},
    "uoe budget": {"mlp": {**tiny.BUDGET, "num_experts": 8, "mean_experts": 3}},
    "uoe biased": {
        "attention": {"kind": "uoe", "num_experts": 3, "top_k": 1, "router_bias": True},
    },
    "uoe sequence": {"mlp": {"kind": "uoe", "num_experts": 8, "top_k": 3, "mode": "sequence"}},
    "uoe expert_choice": {
        "mlp": {"kind": "uoe", "num_experts": 8, "top_k": 3, "mode": "expert_choice"},
    },
    "uoe attention": {
        "attention": {"kind": "uoe", "num_experts": 3, "top_k": 1, "weights": "soft"},
    },
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model in evaluation mode with weights drawn so that every choice shows in the logits."""
    if name in OURS:
        model: Any = tiny.routed_model(tiny.dense_model("llama"), **OURS[name])
        with torch.no_grad():
            for parameter_name, buffer in model.named_buffers():
                if parameter_name.endswith("selection_bias"):
                    buffer.normal_(std=0.1)
        return model.to(dtype)
    family, own = NATIVE[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **own, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(std=0.3)
        for parameter_name, buffer in model.named_buffers():
            if parameter_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.to(dtype)
