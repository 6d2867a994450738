"""What recording a mixture's routing costs: a forward pass that is watched against a plain one.

python bench/tune_record.py --out bench/results

Random weights, SmolLM2-135M's hidden size and heads. Both sides pad a batch and run the decoder
without logits; the watched one puts its hooks on, adds up counts and gate mass, brings them to the
host and takes the hooks off. Both run in turn, medians of CPU time in one thread, which what else
runs on the machine hardly touches. Bytes per prompt are those of files.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Goal, interleave, publish
from transformers import MixtralConfig, MixtralForCausalLM

from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.tune.families import Site, sites
from moe.tune.generation import pad
from moe.tune.intervene import watching
from moe.tune.prompts import Encoded
from moe.tune.record import Meter, observe
from moe.tune.trace import Trace

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MOE = {"kind": "moe", "num_experts": 16, "top_k": 2}
MOH = {"kind": "moh", "shared_heads": [0, 1, 2, 3], "top_k": 3}
BAM = {"kind": "bam", "num_experts": 2}


class Timed(Meter):
    """A meter that knows the seconds spent in it."""

    spent = 0.0

    def _timed(self, name: str, *given: Any) -> Any:
        start = time.process_time()
        result = getattr(Meter, name)(self, *given)
        self.spent += time.process_time() - start
        return result

    def begin(self, *given: Any) -> None:
        self._timed("begin", *given)

    def see(self, *given: Any) -> None:
        self._timed("see", *given)

    def end(self) -> Any:
        return self._timed("end")


def models() -> dict[str, Any]:
    """Makers of the models, one per row."""
    mixtral = MixtralConfig(**SIZES, num_local_experts=16, num_experts_per_tok=2)

    def routed(**parts: Any) -> Any:
        return RoutedLlamaForCausalLM(RoutedLlamaConfig(**SIZES, **parts))

    return {
        "RoutedLlama MoE, 16 experts, top-2": partial(routed, mlp=MOE),
        "RoutedLlama MoH and BAM in turn, MoE": partial(routed, attention=[MOH, BAM] * 6, mlp=MOE),
        "transformers' Mixtral, 16 experts, top-2": partial(MixtralForCausalLM, mixtral),
    }


@torch.no_grad()
def plain(model: Any, batch: list[Encoded]) -> None:
    model.get_decoder()(**pad([entry.prompt for entry in batch], model.device), use_cache=False)


def watched(model: Any, found: list[Site], batch: list[Encoded], kind: type[Meter] = Meter) -> Any:
    """The meter, after a batch."""
    meter = kind(found, torch.device("cpu"))
    with watching(model, found, meter.see):
        observe(model, meter, batch, "prompt")
    return meter


def measure(name: str, make: Any, prompts: int, tokens: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # an even load, as a trained router has
            parameter.data.normal_(std=0.04)
    found = sites(model)
    # lengths from half of `tokens` on, so that there is padding
    lengths = torch.linspace(tokens // 2, tokens, prompts).long().tolist()
    batch = [Encoded(torch.randint(3, 8192, (n,)).tolist(), None) for n in lengths]
    seconds = interleave(
        {
            "plain": partial(plain, model, batch),
            "watched": partial(watched, model, found, batch),
        },
        repeats,
        warmup=1,
        clock=time.process_time,
    )
    inside = [watched(model, found, batch, Timed).spent for _ in range(3)]
    meter = float(np.median(inside))
    return {
        "model": name,
        "M parameters": round(sum(p.numel() for p in model.parameters()) / 1e6),
        "routers": len(found),
        "plain, CPU ms": round(1e3 * seconds["plain"]),
        "recorded, CPU ms": round(1e3 * seconds["watched"]),
        "over, %": 100 * (seconds["watched"] / seconds["plain"] - 1),
        "in the meter, CPU ms": round(1e3 * meter, 1),
        "of plain, %": 100 * meter / seconds["plain"],
    }


def bytes_per_prompt(layers: int, experts: int) -> float:
    """Growth of a trace's file from 8 prompts to 24, of one question each."""
    found = [
        Site(layer=n, part="mlp", experts=experts, top_k=8, kind="sigmoid", module=f"layers.{n}")
        for n in range(layers)
    ]
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for prompts in (8, 24):
            row = {"id": "0" * 32, "prompt": "What happened here then?", "label": "REFUSED"}
            trace = Trace(
                sites=found,
                counts=np.ones((prompts, layers * experts), np.uint32),
                mass=np.ones((prompts, layers * experts), np.float32),
                tokens=np.ones(prompts, np.uint32),
                rows=[row] * prompts,
                settings={},
            )
            path = Path(folder) / "trace.npz"
            trace.write(path)
            sizes[prompts] = path.stat().st_size
    return (sizes[24] - sizes[8]) / 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for tune_record.json and .md")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    how = options.prompts, options.tokens, options.repeats
    rows = [measure(name, make, *how) for name, make in models().items()]
    goals = [
        Goal(f"{row['model']}: recording over plain, %", row["over, %"], "≤", 5) for row in rows
    ]
    kilobytes = bytes_per_prompt(58, 256) / 1e3
    goals.append(Goal("trace of 58 × 256 experts, kB per prompt", kilobytes, "≤", 119))
    notes = [
        f"float32, one thread, {options.prompts} prompts of {options.tokens // 2} to "
        f"{options.tokens} tokens in one batch, padded on the left; medians of {options.repeats} "
        "runs of both sides in turn after 1 to warm up. `in the meter`: time inside the "
        "recorder's own calls, median of 3 runs, which the noise of a forward pass does not touch.",
        "Counts (uint32) and gate mass (float32) of 58 × 256 experts are 14 848 × 2 × 4 B = "
        "118 784 B; the rest is the prompt's row.",
    ]
    publish("tune_record", "Recording a mixture's routing", rows, goals, notes, options.out)


if __name__ == "__main__":
    main()
