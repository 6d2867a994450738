"""A training step of a RoutedLlama against the same Mixtral weights in transformers: tokens/s.

python bench/train_step.py --out bench/results
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from report import Goal, interleave, publish
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM

TOLERANCE = 1e-4


class Shape(NamedTuple):
    """A model and a batch."""

    name: str
    experts: int
    top_k: int
    inner: int
    hidden: int = 512
    layers: int = 4
    batch: int = 2
    length: int = 512


SHAPES = [Shape("mixtral-like", 8, 2, 1792), Shape("fine-grained", 64, 8, 128)]
PEERS = ("grouped_mm", "eager")


def peer(shape: Shape, implementation: str) -> MixtralForCausalLM:
    """Mixtral with one of its experts implementations; the same weights every time."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8192,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    config._experts_implementation = implementation
    return MixtralForCausalLM(config)


def ours(shape: Shape, mixtral: MixtralForCausalLM) -> RoutedLlamaForCausalLM:
    """The same model in our layers."""
    dense = mixtral.config
    config = RoutedLlamaConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        max_position_embeddings=dense.max_position_embeddings,
        rope_parameters=dense.rope_parameters,
        rms_norm_eps=dense.rms_norm_eps,
        tie_word_embeddings=True,
        mlp={
            "kind": "moe",
            "num_experts": shape.experts,
            "top_k": shape.top_k,
            "balance_coef": 0.0,
        },
    )
    model = RoutedLlamaForCausalLM(config)
    weights = {
        name.replace(".mlp.gate.", ".mlp.router."): tensor
        for name, tensor in mixtral.state_dict().items()
    }
    model.load_state_dict(weights)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Forward, backward, clip, update."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def check(models: dict[str, nn.Module], ids: Tensor) -> float:
    """Largest relative difference of logits. Raises SystemExit where the models differ."""
    with torch.no_grad():
        logits = {
            name: model(input_ids=ids, use_cache=False).logits for name, model in models.items()
        }
    expected = logits["eager"]
    worst = max(((x - expected).norm() / expected.norm()).item() for x in logits.values())
    if not worst <= TOLERANCE:
        raise SystemExit(f"the models' logits differ by {worst:.1e}, more than {TOLERANCE:g}")
    return worst


def measure(shape: Shape, repeats: int) -> tuple[dict[str, object], Goal]:
    """One row of the table and its goal."""
    models: dict[str, nn.Module] = {name: peer(shape, name) for name in PEERS}
    models = {"ours": ours(shape, models["eager"]), **models}
    ids = torch.randint(0, 8192, (shape.batch, shape.length))
    error = check(models, ids)
    runs: dict[str, Callable[[], float]] = {}
    for name, model in models.items():
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        runs[name] = partial(step, model, optimizer, ids)
    seconds = interleave(runs, repeats)
    rates = {name: ids.numel() / s for name, s in seconds.items()}
    best = max(rates[name] for name in PEERS)
    row: dict[str, object] = {
        "model": f"{shape.name} E{shape.experts} k{shape.top_k} I{shape.inner}",
        **{f"{name} tok/s": round(rate) for name, rate in rates.items()},
        "ours/best peer": rates["ours"] / best,
        "ours/eager": rates["ours"] / rates["eager"],
        "error": f"{error:.0e}",
    }
    return row, Goal(
        f"{shape.name} tokens/s, ours/best of transformers", rates["ours"] / best, "≥", 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for train_step.json and .md")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, goals = zip(*(measure(shape, options.repeats) for shape in SHAPES), strict=True)
    note = (
        f"float32, {options.threads} threads; forward, backward, clipping, fused AdamW on 2 × 512 "
        "tokens; hidden 512, 4 layers, 8 heads over 2 KV heads, vocabulary 8192, tied. No balance "
        f"loss on either side. Medians of {options.repeats} steps of every side in turn after 2 to "
        "warm up. `error`: largest relative difference of logits before the first step."
    )
    publish("train_step", "Training step", rows, goals, [note], options.out)


if __name__ == "__main__":
    main()
