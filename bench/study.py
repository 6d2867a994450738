"""What upcycling is worth, on text at hand: BTX against BAM, MoH and UoE against their parent.

python bench/study.py --data DIR [--size 3M|15M|150M] [--seeds 2] [--folder .bench/study] [--out …]

A small LLaMA is trained from scratch on code, prose and maths, branched, mixed and trained on; and
converted into mixtures that are trained on beside it. What is finished in the folder is not done
again, so the command can be stopped and called again. `--data` holds WikiText-2 and GSM8K.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from report import publish
from study_text import DOMAINS, train_tokenizer, write_texts
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe.config import parse
from moe.data.dataset import build_dataset
from moe.data.prepare import prepare
from moe.hf.export import export
from moe.hf.families import routed_config
from moe.hf.inspect import inspect
from moe.model.accounting import flops_per_token
from moe.progress import duration, quiet_libraries
from moe.train.loop import train
from moe.upcycle.recipes import BAM, BTX, MoH, UoE
from moe.upcycle.run import Request, run
from moe.upcycle.source import read_config

VOCABULARY = 4096
LENGTH = 256
BATCH = 8  # sequences per step
HELD_OUT = 48  # sequences a domain is measured on
GENERAL = {"prose": 0.5, "code": 0.25, "maths": 0.25}  # what the seed is trained on


@dataclass(frozen=True, slots=True)
class Size:
    """A LLaMA, and the tokens of one phase; the seed sees three phases' worth."""

    hidden: int
    layers: int
    heads: int
    inner: int
    tokens: int
    lr: float  # peak for the seed; half of it afterwards, as in BAM's paper

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


SIZES = {
    "tiny": Size(64, 2, 8, 128, 16_384, 2e-3),  # seconds: does the study run?
    "3M": Size(192, 6, 8, 512, 425_984, 2e-3),  # two seeds: some 80 minutes on two cores
    "15M": Size(384, 8, 8, 1024, 5_242_880, 1e-3),
    "150M": Size(1024, 12, 16, 2816, 52_428_800, 6e-4),
}


class Study:
    """One seed's models in a folder of their own."""

    def __init__(self, root: Path, size: Size, seed: int, data: Path) -> None:
        self.root, self.size, self.seed = root, size, seed
        self.folder = root / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = data

    @cached_property
    def prefixes(self) -> dict[str, Path]:
        """Prepared data per domain, with a held-out part beside each."""
        tokenizer = self.root / "tokenizer"
        paths = write_texts(self.root, self.data)
        if not tokenizer.exists():
            train_tokenizer(paths, VOCABULARY).save_pretrained(tokenizer)
        prefixes = {d: self.root / f"data-{d}" for d in DOMAINS}
        for domain, prefix in prefixes.items():
            if not prefix.with_suffix(".json").exists():
                prepare([str(paths[domain])], str(tokenizer), prefix, validation=0.05, quiet=True)
        return prefixes

    def model(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder of a model, made unless it is there."""
        path = self.folder / name
        if not path.exists():
            begin = time.monotonic()
            make(path)
            print(f"seed {self.seed}: {name} took {duration(time.monotonic() - begin)}", flush=True)
        return path

    def blank(self) -> Path:
        """A LLaMA that was never trained."""

        def make(path: Path) -> None:
            torch.manual_seed(self.seed)
            partial = path.with_name("blank.partial")
            LlamaForCausalLM(self.size.config()).save_pretrained(partial)
            assert self.prefixes  # the tokenizer comes with the data
            for file in (self.root / "tokenizer").iterdir():
                (partial / file.name).write_bytes(file.read_bytes())
            partial.rename(path)

        return self.model("blank", make)

    def trained(
        self, name: str, start: Path, mix: dict[str, float], tokens: float, lr: float, **more: Any
    ) -> Path:
        """`start` trained on so many tokens of a mix of domains."""
        steps = max(2, round(tokens / (BATCH * LENGTH)))

        def make(path: Path) -> None:
            out = self.folder / "runs" / name
            values: dict[str, Any] = {
                "model": str(start),
                "out": str(out),
                "seed": self.seed,
                "data": {
                    "train": [{"path": str(self.prefixes[d]), "weight": w} for d, w in mix.items()],
                    "sequence_length": LENGTH,
                },
                "train": {
                    "steps": steps,
                    "global_batch_size": BATCH,
                    "micro_batch_size": BATCH,
                    "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
                    "log_every": max(1, steps // 4),
                    **more,
                },
                "optimizer": {"lr": lr},
                "schedule": {"warmup_steps": max(1, steps // 20), "final_ratio": 0.1},
                "checkpoint": {"every": steps, "keep": 1},
            }
            train(parse(values, name))
            export(out / "checkpoints" / f"step-{steps}", path)

        return self.model(name, make)

    def converted(self, name: str, recipe: Any, sources: Sequence[Path]) -> Path:
        """Models converted by a recipe. Nothing is verified: perplexities are measured below."""
        request = Request(
            source=list(sources), out=self.folder / name, seed=self.seed, verify=False
        )
        return self.model(name, lambda path: run(recipe, request))

    @torch.no_grad()
    def measure(self, folder: Path) -> dict[str, float]:
        """Held-out perplexity of each domain, kept once measured.

        Not in the model's folder: what lies there comes along in conversions and exports.
        """
        kept = self.folder / "measured" / f"{folder.name}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        result = {}
        for domain, prefix in self.prefixes.items():
            held = build_dataset(
                [(prefix.with_name(prefix.name + "-validation"), 1.0)],
                sequence_length=LENGTH, num_samples=None, seed=0, cache=self.root / "cache",
            )  # fmt: skip
            losses = []
            for index in range(min(HELD_OUT, len(held))):
                sample = {k: torch.as_tensor(v)[None].to(device) for k, v in held[index].items()}
                logits: Tensor = model(sample["tokens"], use_cache=False).logits[0]
                losses.append(F.cross_entropy(logits, sample["labels"][0]).item())
            result[domain] = math.exp(statistics.mean(losses))
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result))
        return result

    def facts(self, folder: Path) -> dict[str, float]:
        """Parameters, and training FLOPs per token at the study's length."""
        found = inspect(folder)
        flops = flops_per_token(routed_config(read_config(folder)), LENGTH)
        return {
            "total": found["total_parameters"] / 1e6,
            "active": found["active_parameters"] / 1e6,
            "flops": flops / 1e6,
        }

    def seed_model(self) -> Path:
        tokens = 3 * self.size.tokens
        return self.trained("seed", self.blank(), GENERAL, tokens, self.size.lr)

    def branches(self) -> dict[str, Path]:
        """Copies of the seed, each trained on its domain with a tenth of general text."""
        seed, branches = self.seed_model(), {}
        for domain in DOMAINS:
            mix = {d: 0.1 * w for d, w in GENERAL.items()}
            mix[domain] += 0.9
            name = f"branch-{domain}"
            branches[name] = self.trained(name, seed, mix, self.size.tokens, self.size.lr / 2)
        return branches

    def mixtures(self) -> dict[str, tuple[Path, float]]:
        """Everything of the first table: name to model and the tokens of its last phase."""
        tokens, seed, branches = self.size.tokens, self.seed_model(), self.branches()
        models = {"seed": (seed, 3.0 * tokens)}
        models |= {name: (path, float(tokens)) for name, path in branches.items()}
        sources = [*branches.values(), seed]
        quarter = {d: (1 + GENERAL[d]) / 4 for d in DOMAINS}  # a quarter each, the seed's text too
        recipes = {"BTX": BTX(), "BAM": BAM(), "BAM shared KV": BAM(kv="shared")}
        cost = 0.0
        for name, recipe in recipes.items():
            key = name.replace(" ", "-").lower()
            start = self.converted(f"{key}-0", recipe, sources)
            models[f"{name}, untrained"] = start, 0.0
            flops = self.facts(start)["flops"]
            cost = cost or flops
            done = self.trained(key, start, quarter, tokens, self.size.lr / 2)
            models[f"{name}, same data"] = done, float(tokens)
            if flops != cost:
                less = tokens * cost / flops
                done = self.trained(f"{key}-cm", start, quarter, less, self.size.lr / 2)
                models[f"{name}, same compute"] = done, less
        return models

    def conversions(self) -> dict[str, tuple[Path, float]]:
        """Everything of the second table: the seed trained on, and converted and trained on."""
        tokens, seed, heads = self.size.tokens, self.seed_model(), self.size.heads
        models = {"dense": (seed, 0.0)}
        done = self.trained("dense-on", seed, GENERAL, tokens, self.size.lr / 2)
        models["dense, trained on"] = done, float(tokens)
        recipes = {
            "MoH 75 %": MoH(shared_heads=heads // 2, top_k=heads // 4),
            "MoH 50 %": MoH(shared_heads=heads // 4, top_k=heads // 4),
            "UoE MLP k=E/2": UoE(mlp_experts=8),
            "UoE attention k=E/2": UoE(attention_experts=heads // 2),
            "UoE both k=E/2": UoE(mlp_experts=8, attention_experts=heads // 2),
        }
        for name, recipe in recipes.items():
            key = name.replace(" ", "-").replace("=", "").replace("/", "").replace("%", "").lower()
            start = self.converted(f"{key}-0", recipe, [seed])
            models[f"{name}, untrained"] = start, 0.0
            done = self.trained(key, start, GENERAL, tokens, self.size.lr / 2)
            models[f"{name}, trained on"] = done, float(tokens)
            if "both" in name:
                steps = max(1, round(tokens / (BATCH * LENGTH)) // 2)
                done = self.trained(
                    f"{key}-annealed", start, GENERAL, tokens, self.size.lr / 2, anneal_steps=steps
                )
                models[f"{name}, annealed"] = done, float(tokens)
        return models


def rows(
    studies: Sequence[Study], tables: Sequence[dict[str, tuple[Path, float]]]
) -> list[dict[str, Any]]:
    """A row per model: perplexities as mean ± half the range over the seeds, then what it costs."""
    result = []
    for name in tables[0]:
        found = [s.measure(t[name][0]) for s, t in zip(studies, tables, strict=True)]
        row: dict[str, Any] = {"model": name}
        for domain in DOMAINS:
            row[domain] = spread([f[domain] for f in found])
        row["mean"] = spread([statistics.geometric_mean(f.values()) for f in found])
        path, tokens = tables[0][name]
        facts = studies[0].facts(path)
        row |= {
            "M parameters": round(facts["total"], 2),
            "M active": round(facts["active"], 2),
            "MFLOPs/token": round(facts["flops"], 1),
            "k tokens": round(tokens / 1e3),
        }
        result.append(row)
    return result


def spread(values: Sequence[float]) -> str:
    middle, half = statistics.mean(values), (max(values) - min(values)) / 2
    return f"{middle:.2f} ± {half:.2f}" if len(values) > 1 else f"{middle:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2, gsm8k")
    parser.add_argument("--size", choices=SIZES, default="3M")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".bench/study"))
    parser.add_argument("--out", type=Path, help="folder for study-SIZE-….json and .md")
    options = parser.parse_args()
    quiet_libraries()
    size, root = SIZES[options.size], options.folder / options.size
    root.mkdir(parents=True, exist_ok=True)
    studies = [Study(root, size, seed, options.data) for seed in range(options.seeds)]
    begin = time.monotonic()
    for title, name, collect in (
        ("BTX against BAM", "mixtures", Study.mixtures),
        ("MoH and UoE against their dense parent", "conversions", Study.conversions),
    ):
        tables = [collect(study) for study in studies]
        notes = [
            f"Held-out perplexity per domain and their geometric mean, over {HELD_OUT} sequences "
            f"of {LENGTH} tokens each, {options.seeds} seeds: mean ± half the range. "
            f"{asdict(size)}; vocabulary {VOCABULARY}, {BATCH} × {LENGTH} tokens a step, half the "
            "seed's peak learning rate after it, cosine to a tenth.",
            f"`k tokens` of the last phase; MFLOPs per token forward and backward at {LENGTH} "
            "tokens. Same compute: tokens in inverse proportion to them.",
        ]
        publish(
            f"study-{options.size}-{name}", title, rows(studies, tables), [], notes, options.out
        )
    print(f"this call took {duration(time.monotonic() - begin)}")


if __name__ == "__main__":
    main()
