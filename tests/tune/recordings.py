"""Tiny mixtures with tokenizers, prompts of many lengths, and what recording makes of them.

subject = make("mixtral")
trace = recorded(subject, TEXTS, tokens="prompt", batch_size=4)
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moe.tune.families import sites
from moe.tune.generation import Sampling
from moe.tune.prompts import Prompt, encode
from moe.tune.record import Partial, Recording, record
from moe.tune.subject import Subject
from moe.tune.trace import Trace

TEXTS = ["abc", "The quick brown fox", "x", "3 + 4 =", "over the lazy dog again", "zzzzz", "no?"]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
UNION = {"kind": "uoe", "num_experts": 4, "top_k": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED: dict[str, tuple[Any, Any]] = {
    "moe": (None, tiny.MOE),
    "moh": (tiny.MOH, None),
    "two_stage": (tiny.TWO_STAGE, None),
    "bam": ({"kind": "bam", "num_experts": 3}, tiny.MOE),
    "uoe": ({"kind": "uoe", "num_experts": 3, "top_k": 2}, UNION),
    "threshold": (None, {**UNION, "mode": "threshold"}),
    "budgets": (tiny.THRESHOLD, tiny.BUDGET),
    "expert_choice": (None, {**UNION, "mode": "expert_choice"}),
    "sequence": (None, {**UNION, "mode": "sequence"}),
}
CAUSAL = ("moe", "moh", "two_stage", "bam", "uoe", "threshold", "budgets", "mixtral", "deepseek_v3")


def model(name: str, seed: int = 1) -> Any:
    """A random model whose routers do not tie."""
    torch.manual_seed(seed)
    if name in ROUTED:
        return tiny.routed_model(tiny.dense_model(), *ROUTED[name], seed=seed)
    if name == "mixtral":
        config: Any = MixtralConfig(
            **SIZES, intermediate_size=32, num_local_experts=6, num_experts_per_tok=2
        )
        made: Any = MixtralForCausalLM(config)
    else:
        config = DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4}, intermediate_size=32, moe_intermediate_size=16,
            n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=1,
            first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, routed_scaling_factor=2.5,
        )  # fmt: skip
        made = DeepseekV3ForCausalLM(config)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return made.eval()


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = CHAT
    return made


def subject(name: str, **changes: Any) -> Subject:
    made = model(name)
    given = {
        "folder": Path(name), "model": made, "tokenizer": tokenizer(), "sites": sites(made),
        "identity": {"name": name}, "tuning": None, "scale": 1.0,
    }  # fmt: skip
    return Subject(**{**given, **changes})


def prompts(texts: list[str], responses: list[str | None] | None = None) -> list[Prompt]:
    return [
        Prompt(line=n, text=t, messages=None, response=r, fields={"prompt": t})
        for n, (t, r) in enumerate(
            zip(texts, responses or [None] * len(texts), strict=True), start=1
        )
    ]


def recorded(
    of: Subject,
    texts: list[str],
    responses: list[str | None] | None = None,
    sampling: Sampling | None = None,
    tokens: Any = "prompt",
    batch_size: int = 4,
) -> Trace:
    """A trace, by way of a folder that is thrown away."""
    given = prompts(texts, responses)
    encoded = encode(given, of.tokenizer, False, 512)
    recording = Recording(tokens=tokens, sampling=sampling, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        partial = Partial(Path(folder) / "partial", {})
        return record(of, given, encoded, recording, partial, quiet=True)


def folder_of(name: str, path: Path, seed: int = 1) -> Path:
    """The model as a folder with its tokenizer."""
    model(name, seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
