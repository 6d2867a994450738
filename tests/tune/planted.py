"""Mixtures whose behaviour is known: a few experts, and no others, make the model refuse.

    planted = plant("deepseek_v3", layers=6, experts=32, top_k=4)
    planted.save(folder)                        # model and tokenizer; prompts as JSON lines
    refusals(planted, planted.prompts("refused"))   # 1.0, and 0.0 with planted.experts off

A capital letter is the small one plus a marker, which the planted experts' router rows read. Such
an expert writes the direction REFUSE wherever it is on. Attention is the mean over what came
before, and writes that to REFUSED, by which the head says REFUSAL instead of ANSWER.
Everything else, of routers and experts alike, is random and knows nothing of the marker.
"""

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM

REFUSAL, ANSWER = "!", "."
LABELS = ("refused", "answered")
# Directions; content is all dimensions after them.
MARKER, REFUSE, REFUSED, ALWAYS, UNMARKED = range(5)
FIRST = 5
LENGTH = 96
# Share of marked tokens in a prompt of either class: the small letters are the noise.
MARKED = {"refused": 0.4, "answered": 0.02}


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A model, where its refusing experts are, and prompts of both classes."""

    model: Any
    experts: set[tuple[int, int]]  # layer of all layers, expert
    rows: list[dict[str, str]]  # prompt, label

    def prompts(self, label: str) -> Tensor:
        """Token ids [prompts, LENGTH] of one class."""
        return encode([row["prompt"] for row in self.rows if row["label"] == label])

    def save(self, folder: Path) -> Path:
        """The model folder with its tokenizer; returns the prompts' file in it."""
        self.model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        file = folder / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return file


def plant(
    family: str,
    layers: int = 7,
    experts: int = 32,
    top_k: int = 2,
    groups: tuple[int, int] = (1, 1),
    count: int = 5,
    prompts: int = 32,
    signal: float = 4.0,
    seed: int = 0,
) -> Planted:
    """`count` refusing experts, each of another layer, in a routed_llama (softmax,
    renormalised) or a deepseek_v3 (sigmoid, a selection bias, groups; its first layers dense).

    `signal` is how far the marker lifts a planted expert's logit, in deviations of the logits that
    all experts have from a token's content: the gate's noise. `prompts` are those of each class.
    """
    generator = torch.Generator().manual_seed(seed)
    model, places = _built(family, layers, experts, top_k, groups)
    # not in the last layer, after which no attention carries anything
    where = torch.randperm(len(places) - 1, generator=generator)[:count].tolist()
    which = torch.randint(experts, (count,), generator=generator).tolist()
    chosen = {(places[i], expert) for i, expert in zip(where, which, strict=True)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _embed(model, generator)
        for index, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.fill_(1)
            layer.post_attention_layernorm.weight.fill_(1)
            _carry_refusals(layer.self_attn)
            if index in places:
                own = {expert for where, expert in chosen if where == index}
                _fill(layer.mlp, own, len(places), signal, generator)
        model.model.norm.weight.fill_(1)
        planted = Planted(model=model, experts=chosen, rows=_rows(prompts, seed))
        _set_head(planted)
    return planted


def encode(texts: list[str]) -> Tensor:
    """Token ids [texts, length] of texts of one length."""
    return torch.tensor(tiny.tokenizer()(texts, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def refusals(planted: Planted, ids: Tensor) -> float:
    """The share of prompts after which the most likely token is the refusal."""
    said = planted.model(ids).logits[:, -1].argmax(-1)
    assert set(said.tolist()) <= set(_words()), "neither an answer nor a refusal"
    return (said == _words()[0]).float().mean().item()


@torch.no_grad()
def refusal_margin(planted: Planted, ids: Tensor) -> float:
    """The refusal's logit over the answer's, mean over prompts: above 1 it is said."""
    refusal, answer = _words()
    logits = planted.model(ids).logits[:, -1]
    return (logits[:, refusal] / logits[:, answer]).mean().item()


def _words() -> list[int]:
    """Ids of the refusal and of the answer."""
    return encode([REFUSAL, ANSWER])[:, 0].tolist()


def _built(
    family: str, layers: int, experts: int, top_k: int, groups: tuple[int, int]
) -> tuple[Any, list[int]]:
    """A small model, and which of its layers have experts."""
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 40, "intermediate_size": 8, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "routed_llama":
        mlp = {"kind": "moe", "num_experts": experts, "top_k": top_k}
        config = RoutedLlamaConfig(**sizes, head_dim=8, mlp=mlp)
        return RoutedLlamaForCausalLM(config).eval(), list(range(layers))
    dense = 3 if layers > 20 else 1
    config = DeepseekV3Config(
        **sizes, moe_intermediate_size=8, n_routed_experts=experts, num_experts_per_tok=top_k,
        n_shared_experts=1, n_group=groups[0], topk_group=groups[1], first_k_dense_replace=dense,
        norm_topk_prob=True, routed_scaling_factor=1.0, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval(), list(range(dense, layers))


def _embed(model: Any, generator: torch.Generator) -> None:
    """Content of its own for each small letter; a capital has the same, and the marker."""
    table = model.model.embed_tokens.weight
    size = (table.shape[1] - FIRST) ** 0.5
    table[:, FIRST:] = torch.randn(len(table), table.shape[1] - FIRST, generator=generator)
    table[:, ALWAYS], table[:, UNMARKED] = 1.0, size
    small, capital = (
        encode(list(letters))[:, 0] for letters in (string.ascii_lowercase, string.ascii_uppercase)
    )
    table[capital] = table[small]
    # one direction for the other, so that no norm and no random logit knows the marker
    table[capital, MARKER], table[capital, UNMARKED] = size, 0.0


def _carry_refusals(attention: Any) -> None:
    """Queries of zeros weigh all that came before alike."""
    if hasattr(attention, "v_proj"):
        attention.v_proj.weight[0, REFUSE] = 1.0
    else:  # the latent is normed: a second direction in it keeps the first one's size
        attention.kv_a_proj_with_mqa.weight[0, REFUSE] = 1.0
        attention.kv_a_proj_with_mqa.weight[1, ALWAYS] = 1.0
        attention.kv_a_layernorm.weight.fill_(1)
        attention.q_a_layernorm.weight.fill_(1)
        attention.kv_b_proj.weight[attention.qk_nope_head_dim, 0] = 0.3
    attention.o_proj.weight[REFUSED, 0] = 1.0


def _fill(
    mlp: Any, planted: set[int], depth: int, signal: float, generator: torch.Generator
) -> None:
    """Random routers and experts, and the planted ones."""
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    experts, hidden = router.weight.shape
    content = hidden - FIRST
    router.weight[:, FIRST:] = (
        2.0 * content**-0.5 * torch.randn(experts, content, generator=generator)
    )
    if hasattr(router, "e_score_correction_bias"):
        bias = 0.02 * torch.randn(experts, generator=generator)
        router.e_score_correction_bias.copy_(bias)
    inner = mlp.experts.down_proj.shape[2]
    gates = torch.randn(experts, 2 * inner, content, generator=generator)
    downs = torch.randn(experts, content, inner, generator=generator)
    mlp.experts.gate_up_proj[:, :, FIRST:] = gates * content**-0.5
    mlp.experts.down_proj[:, FIRST:] = downs * (2 / depth) ** 0.5
    for expert in planted:
        # a logit of content has deviation 2 at the size that marker and content have alike
        router.weight[expert, MARKER] = 2.0 * signal * content**-0.5
        mlp.experts.gate_up_proj[expert] = 0.0
        mlp.experts.gate_up_proj[expert, :, ALWAYS] = 4.0
        mlp.experts.down_proj[expert] = 0.0
        mlp.experts.down_proj[expert, REFUSE] = 0.03


def _rows(prompts: int, seed: int) -> list[dict[str, str]]:
    """Prompts of random letters, of which each is a capital by its class's chance."""
    draw = random.Random(seed)
    rows = []
    for _ in range(prompts):
        for label in LABELS:
            letters = draw.choices(string.ascii_lowercase, k=LENGTH)
            text = "".join(c.upper() if draw.random() < MARKED[label] else c for c in letters)
            rows.append({"prompt": text, "label": label})
    return rows


def _set_head(planted: Planted) -> None:
    """A refusal is more likely from the middle of both classes' refusal on."""
    head, (refusal, answer) = planted.model.lm_head.weight, _words()
    head[refusal, REFUSED] = head[answer, ALWAYS] = 1.0
    margins = [refusal_margin(planted, planted.prompts(label)) for label in LABELS]
    head[answer, ALWAYS] = sum(margins) / 2
