"""Routers a mixture of branches may begin with: drawn, from prompts' hidden states, calibrated.

python bench/branch_routers.py --sources DIR DIR DIR --data DIR [--tokens 8192] [--folder …]

`--sources` are branches of one model in folders that end in -DOMAIN; `--data` has each domain's
DOMAIN.jsonl and DOMAIN-train.jsonl, as bench/tune_domains.py leaves them: routers are made from the
latter, and everything is measured on documents that are in the former alone. Nothing is trained.
A mixture that is in the folder is not made again.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # no installation is needed

import torch
from report import publish
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe.model.experts import RoutedMLP
from moe.progress import quiet_libraries
from moe.upcycle.recipes import BTX
from moe.upcycle.run import Request, run

LENGTH = 512
PIECE = 1500  # characters of a document, at most: so that there are many of them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def domain_of(source: Path) -> str:
    return source.name.rpartition("-")[2]


def write_labelled(options: argparse.Namespace) -> Path:
    """Training documents of all domains in one shuffled file, each with its branch's name."""
    path: Path = options.folder / "labelled.jsonl"
    rng, rows = random.Random(options.seed), []
    for source in options.sources:
        found = documents(options.data / f"{domain_of(source)}-train.jsonl")
        rng.shuffle(found)
        rows += [{"text": text[:PIECE], "label": source.name} for text in found[:500]]
    rng.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def held_out(options: argparse.Namespace) -> dict[str, list[Tensor]]:
    """Windows [1, LENGTH] of each domain, of documents that no branch was trained on."""
    tokenizer, found = AutoTokenizer.from_pretrained(options.sources[0]), {}
    for source in options.sources:
        domain = domain_of(source)
        known = set(documents(options.data / f"{domain}-train.jsonl"))
        fresh = [t for t in documents(options.data / f"{domain}.jsonl") if t not in known]
        random.Random(options.seed).shuffle(fresh)
        text = "\n\n".join(fresh)[: 16 * options.windows * LENGTH]
        ids = torch.tensor(tokenizer(text)["input_ids"])
        found[domain] = [w[None].to(DEVICE) for w in ids.split(LENGTH)[: options.windows]]
    return found


def convert(options: argparse.Namespace, out: Path, **own: Any) -> float:
    """A mixture in a folder; returns the seconds that it took."""
    begin, fitted = time.monotonic(), own.get("router") == "calibrated"
    request = Request(
        source=options.sources, out=out, seed=options.seed, verify=False,
        calibrate=options.folder / "labelled.jsonl" if fitted else None,
        calibration_tokens=options.tokens if fitted else None,
    )  # fmt: skip
    run(BTX(**own), request)
    return time.monotonic() - begin


@torch.no_grad()
def from_prompts(options: argparse.Namespace, given: Path, out: Path) -> float:
    """`given`, a mixture with drawn routers, with others, whose row for a branch is the direction
    of the mean hidden state at that layer over its domain's text: what mergekit calls hidden.
    """
    begin = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(given).to(DEVICE).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(given), []
    lines = [json.loads(line) for line in (options.folder / "labelled.jsonl").open()]
    for source in options.sources:
        total, count = 0.0, 0
        for line in lines:
            left = options.tokens // len(options.sources) - count
            if line["label"] != source.name or left < 2:
                continue
            ids = torch.tensor(tokenizer(line["text"][: 16 * left])["input_ids"][:left])
            for window in ids.split(LENGTH):
                seen = model(window[None].to(DEVICE), output_hidden_states=True, use_cache=False)
                total = total + torch.stack([x_BSH[0].sum(0) for x_BSH in seen.hidden_states[:-1]])
                count += len(window)
        rows.append(F.normalize(torch.as_tensor(total) / count, dim=-1))
    partial_ = out.with_name(out.name + ".partial")
    shutil.copytree(given, partial_)
    weights = load_file(partial_ / "model.safetensors")
    for layer, weight_EH in enumerate(torch.stack(rows, 1)):
        name = f"model.layers.{layer}.mlp.router.weight"
        weights[name] = weight_EH.to(weights[name]).contiguous()
    save_file(weights, partial_ / "model.safetensors", {"format": "pt"})
    partial_.rename(out)
    return time.monotonic() - begin


@torch.no_grad()
def measure(folder: Path, windows: dict[str, list[Tensor]]) -> dict[str, float]:
    """Perplexity of each domain, and the share of its tokens whose heaviest expert is its branch,
    over all layers.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    chosen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, choice: Any) -> None:
        heaviest_T1 = choice.weights_TK.argmax(1, keepdim=True)
        chosen.append(choice.indices_TK.gather(1, heaviest_T1).flatten())

    for layer in model.model.layers:
        if isinstance(layer.mlp, RoutedMLP):
            layer.mlp.router.register_forward_hook(keep)
    found: dict[str, float] = {}
    for expert, (domain, own) in enumerate(windows.items()):
        chosen.clear()
        losses = [
            F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:]) for ids in own
        ]
        found[domain] = math.exp(torch.stack(losses).mean().item())
        if chosen:
            right = torch.cat(chosen) == expert
            found[f"{domain} to its own"] = right.float().mean().item()
    return found


def row_of(name: str, found: dict[str, float], seconds: float, domains: Sequence[str]) -> Any:
    """Perplexities, their geometric mean, and the shares of tokens in percent."""
    logs = [math.log(found[domain]) for domain in domains]
    shares = [found.get(f"{domain} to its own") for domain in domains]
    row: dict[str, Any] = {"model": name}
    row |= {domain: f"{found[domain]:.3f}" for domain in domains}
    row["mean"] = f"{math.exp(sum(logs) / len(logs)):.3f}"
    for domain, share in zip(domains, shares, strict=True):
        row[f"% {domain} to its own"] = "" if share is None else f"{100 * share:.1f}"
    row["seconds"] = f"{seconds:.0f}" if seconds else ""
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="to make routers from")
    parser.add_argument("--windows", type=int, default=8, help="of each domain, to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".bench/branch-routers"))
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    quiet_libraries()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_labelled(options)
    windows = held_out(options)
    domains = list(windows)
    rows = [row_of(source.name, measure(source, windows), 0, domains) for source in options.sources]
    for top_k in (1, 2):
        drawn = options.folder / f"random-{top_k}"
        calibrated = {"top_k": top_k, "router": "calibrated"}
        makers = {
            "random": partial(convert, options, drawn, top_k=top_k),
            "hidden": partial(from_prompts, options, drawn, options.folder / f"hidden-{top_k}"),
        } | {
            target: partial(convert, options, options.folder / f"{target}-{top_k}",
                            target=target, **calibrated)
            for target in ("label", "loss")
        }  # fmt: skip
        for name, make in makers.items():
            out = options.folder / f"{name}-{top_k}"
            took = out.with_suffix(".seconds")
            if not out.exists():
                took.write_text(str(make()))
            found, seconds = measure(out, windows), float(took.read_text())
            rows.append(row_of(f"top-{top_k}, {name}", found, seconds, domains))
            print(rows[-1], flush=True)
    notes = [
        f"btx of {', '.join(s.name for s in options.sources)}, untrained, routers from "
        f"{options.tokens} tokens of training text, the same of each domain, seed {options.seed}; "
        f"perplexity on {options.windows} windows of {LENGTH} held-out tokens a domain. `to its "
        "own`: tokens whose heaviest expert is their domain's branch, over all layers; chance is "
        f"{100 / len(domains):.0f} %. hidden: a "
        "row is the direction of the mean hidden state over its domain's text. Seconds to make the "
        "mixture.",
    ]
    publish("branch_routers", "Routers between branches", rows, [], notes, options.results)


if __name__ == "__main__":
    main()
