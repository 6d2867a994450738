"""Are there domain experts? Branches of one model on code, prose and maths, mixed, ranked, cut.

python bench/tune_domains.py --source DIR --data DIR [--steps 150] [--folder .bench/domains]

`--source` is a dense LLaMA folder, `--data` holds WikiText-2 and GSM8K. Each domain's branch is
trained, `moe upcycle btx` mixes them with the source, the mixture is trained on all three, and for
each domain its experts are ranked on some held-out prompts and switched off on others, beside
control sets. What is in the folder is not done again.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # no installation is needed

import torch
from report import Goal, publish
from study_text import DOMAINS, write_texts

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 0.1  # of the documents


def moe(*arguments: object, environment: dict[str, str] | None = None) -> None:
    """`moe …` in a process of its own; what it prints goes to our output when it fails."""
    command = [sys.executable, "-m", "moe", *map(str, arguments)]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    )  # fmt: skip
    print(f"$ moe {' '.join(map(str, arguments))}", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def split(texts: dict[str, Path], folder: Path, prompts: int, piece: int) -> None:
    """Documents to train on, and prompts out of the others, the same number of each domain."""
    rng, rows = random.Random(0), []
    for domain, path in texts.items():
        documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        rng.shuffle(documents)
        count = max(1, round(HELD_OUT * len(documents)))
        train = [json.dumps({"text": text}) for text in documents[count:]]
        (folder / f"{domain}-train.jsonl").write_text("\n".join(train) + "\n")
        pieces = [
            text[start : start + piece]
            for text in documents[:count]
            for start in range(0, min(len(text), 20 * piece) - piece // 3, piece)
        ]
        rng.shuffle(pieces)
        if len(pieces) < prompts:
            raise SystemExit(f"{domain} has {len(pieces)} held-out pieces, {prompts} are wanted.")
        rows += [{"prompt": piece, "label": domain} for piece in pieces[:prompts]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(name: str, config: str, model: Path, data: str, options: argparse.Namespace) -> Path:
    """The model after training, as a folder."""
    folder: Path = options.folder
    made = folder / name
    if made.exists():
        return made
    where = folder / "runs" / name
    moe(
        "train", ROOT / f"configs/bam/{config}.yaml", f"model={model}", f"out={where}",
        f"data.train={data}", f"data.sequence_length={options.length}",
        f"train.steps={options.steps}", f"train.global_batch_size={options.batch}",
        f"train.micro_batch_size={min(options.batch, 8)}", f"checkpoint.every={options.steps}",
        f"schedule.warmup_steps={options.steps // 10}", f"train.dtype={options.dtype}",
        *getattr(options, config),
    )  # fmt: skip
    last = where / "checkpoints" / f"step-{options.steps}"
    moe("export", last, "--to", "hf", "--out", made, "--dtype", "float32")
    shutil.rmtree(where / "checkpoints")
    return made


def build(options: argparse.Namespace) -> Path:
    """The mixture of the branches and their source, trained on all domains."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = write_texts(folder, options.data)
    if not (folder / "prompts.jsonl").exists():
        split(texts, folder, options.prompts, options.piece)

    def branch(domain: str) -> Path:
        if not (folder / f"{domain}.idx").exists():
            source = folder / f"{domain}-train.jsonl"
            moe("data", "prepare", source, "--tokenizer", options.source, "--out", folder / domain)
        data = f"[{{path: {folder / domain}, weight: 1}}]"
        return train(f"branch-{domain}", "branch", options.source, data, options)

    with at_once() as pool:
        branches = list(pool.map(branch, DOMAINS))
    if not (folder / "btx").exists():
        sources = [word for path in [*branches, options.source] for word in ("--source", path)]
        moe("upcycle", "btx", *sources, "--top-k", 2, "--out", folder / "btx", "--no-verify")
    data = ", ".join(f"{{path: {folder / domain}, weight: 1}}" for domain in DOMAINS)
    return train("mixture", "mix", folder / "btx", f"[{data}]", options)


def at_once() -> ThreadPoolExecutor:
    """All domains side by side on a GPU; one after the other on a CPU, whose cores each fills."""
    return ThreadPoolExecutor(len(DOMAINS) if torch.cuda.is_available() else 1)


def study(mixture: Path, domain: str, options: argparse.Namespace) -> dict[str, Any]:
    """What happens to each domain's perplexity when this one's experts are off."""
    folder: Path = options.folder
    tuning, out = folder / f"tuning-{domain}.json", folder / f"control-{domain}"
    if not tuning.exists():
        moe(
            "tune", "rank", folder / "trace.npz", "--target", domain, "--top", options.top,
            "--out", tuning, "--held-out", 0.5, "--heatmap", folder / f"heatmap-{domain}.png",
            "--semantics", options.semantics,
        )  # fmt: skip
    if not out.exists():
        moe(
            "tune", "control", mixture, "--tuning", tuning, "--prompts", folder / "prompts.jsonl",
            "--seeds", options.seeds, "--batch-size", options.batch_size, "--out", out,
        )  # fmt: skip
    return json.loads((out / "results.json").read_text())


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per (experts that are off, domain that is read)."""
    rows = []
    for off, result in found.items():
        for group in result["groups"]:
            controls = [c for kind in group["controls"].values() for c in kind["values"]]
            rows.append({
                "experts off": off, "text": group["group"], "perplexity": group["plain"],
                "without them": group["tuned"], "least of controls": min(controls),
                "most of controls": max(controls), "control sets": len(controls),
                "prompts": group["prompts"],
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(".bench/domains"))
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--steps", type=int, default=150, help="of each branch and the mixture")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    for phase, what in (("branch", "a branch's"), ("mix", "the mixture's")):
        parser.add_argument(f"--{phase}", action="append", default=[], metavar="KEY=VALUE",
                            help=f"override of {what} training; repeat")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=80, help="of each domain")
    parser.add_argument("--piece", type=int, default=900, help="characters of a prompt")
    parser.add_argument("--top", type=int, default=15, help="experts to switch off")
    parser.add_argument("--seeds", type=int, default=5, help="control sets of each kind")
    parser.add_argument("--semantics", default="post_renorm")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per forward pass")
    options = parser.parse_args()
    mixture = build(options)
    trace = options.folder / "trace.npz"
    if not trace.exists():
        given = "--prompts", options.folder / "prompts.jsonl", "--out", trace
        moe("tune", "record", mixture, *given, "--batch-size", options.batch_size)
    with at_once() as pool:
        results = pool.map(lambda domain: study(mixture, domain, options), DOMAINS)
        found = dict(zip(DOMAINS, results, strict=True))
    rows = rows_of(found)
    goals = []
    for domain in DOMAINS:
        own = next(r for r in rows if r["experts off"] == r["text"] == domain)
        worse = own["without them"] / own["perplexity"]
        control = own["most of controls"] / own["perplexity"]
        goals.append(Goal(f"{domain} without its experts, over the worst control set",
                          worse / control, "≥", 1.0))  # fmt: skip
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    notes = [
        f"{options.top} experts off ({options.semantics}) of {options.source.name} mixed from "
        f"three branches and itself, {options.steps} steps of {options.batch} × {options.length} "
        f"tokens each, on {where}; prompts of {options.piece} characters that ranked nothing.",
        f"branches: {' '.join(options.branch) or 'as configured'}; mixture: "
        f"{' '.join(options.mix) or 'as configured'}",
    ]
    publish("tune_domains", "Domain experts switched off", rows, goals, notes, options.results)
    for domain in DOMAINS:
        shutil.copy(options.folder / f"heatmap-{domain}.png",
                    options.results / f"tune_domains_{domain}.png")  # fmt: skip
        shutil.copy(options.folder / f"control-{domain}" / "dose.png",
                    options.results / f"tune_domains_{domain}_dose.png")  # fmt: skip


if __name__ == "__main__":
    main()
