"""The same training from the paper's mixture of heads and from the calibrated one.

python bench/calibration_training.py --source DIR --data DIR --steps 60 --out bench/results

`--data` holds WikiText-2 and GSM8K. Both keep 7 of 9 heads. They see the same tokens in the same
order; what is told is the perplexity of WikiText-2's test file, which neither was trained on, and
the tokens after which it is the dense model's again.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # no installation is needed

from matplotlib.figure import Figure
from report import publish
from study_text import code, maths

ROOT = Path(__file__).resolve().parents[1]
SIDES = {
    "MoH's paper": "--router qnorm --shared-heads 4 --top-k 3",
    "calibrated": "--router calibrated --budget threshold --mean-heads 7 --calibrate {text}",
}


def run(*command: object) -> None:
    """A command of ours in a process of its own; what it prints is shown when it fails."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    print(f"$ {' '.join(map(str, command))}", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def prepare(options: argparse.Namespace) -> None:
    """Text to train on in three files, to measure on in a fourth, tokenised."""
    folder, data = options.folder, options.data
    texts = {
        "prose": [(data / "wikitext2/valid.txt").read_text()],
        "test": [(data / "wikitext2/test.txt").read_text()],
        "code": list(code())[: options.files],
        "maths": list(maths(data))[: 20 * options.files],
    }
    for name, documents in texts.items():
        if (folder / f"{name}.json").exists():
            continue
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        given = folder / f"{name}.jsonl", "--tokenizer", options.source, "--out", folder / name
        run("moe", "data", "prepare", *given)


def train(name: str, how: str, options: argparse.Namespace) -> list[tuple[int, float]]:
    """Perplexity of the test text after so many tokens, before any at first."""
    folder = options.folder
    short = name.split()[-1]
    model, out = folder / f"model-{short}", folder / f"run-{short}"
    if not model.exists():
        more = how.format(text=options.data / "wikitext2/valid.txt").split()
        given = "--source", options.source, "--out", model, "--no-verify", *more
        run("moe", "upcycle", "moh", *given)
    if not (out / "metrics.jsonl").exists():
        launch(model, out, options, options.steps, options.lr)
    tokens = options.batch * options.length
    return [(step * tokens, value) for step, value in validated(out)]


def launch(model: Path, out: Path, options: argparse.Namespace, steps: int, lr: float) -> None:
    """One run of the trainer."""
    folder = options.folder
    sets = ", ".join(f"{{path: {folder / n}}}" for n in ("prose", "code", "maths"))
    command = [
        "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m", "moe.train",
        ROOT / "configs/train/demo.yaml", f"model={model}", f"out={out}",
        f"data.train=[{sets}]", f"data.validation=[{{path: {folder / 'test'}}}]",
        f"data.sequence_length={options.length}", f"train.steps={steps}",
        f"train.global_batch_size={options.batch}", f"train.micro_batch_size={options.micro}",
        f"train.dtype={options.dtype}", f"optimizer.lr={lr}",
        f"schedule.warmup_steps={max(1, steps // 20)}", "train.log_every=10",
        f"eval.every={min(options.every, steps)}", f"eval.sequences={options.sequences}",
        f"checkpoint.every={steps}",
    ]  # fmt: skip
    run(*command)


def validated(out: Path) -> list[tuple[int, float]]:
    """Perplexity of the test text after so many steps."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found = {r["step"]: r["validation_loss"] for r in lines if "validation_loss" in r}
    return [(step, math.exp(loss)) for step, loss in sorted(found.items())]


def before(model: Path, options: argparse.Namespace) -> float:
    """Perplexity of the test text, in the samples that training validates on: after a step that
    changes nothing.
    """
    out = options.folder / f"untrained-{model.name}"
    if not (out / "metrics.jsonl").exists():
        launch(model, out, options, 1, 1e-12)
    return validated(out)[0][1]


def regained(curve: list[tuple[int, float]], dense: float) -> int | None:
    """Tokens after which the dense model's perplexity is reached, None where it is not."""
    return next((tokens for tokens, value in curve if value <= dense), None)


def draw(curves: dict[str, list[tuple[int, float]]], dense: float, path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), marker in zip(curves.items(), "so", strict=True):
        axes.plot(*zip(*curve, strict=True), marker=marker, markersize=3, label=name)
    axes.axhline(dense, color="0.3", linestyle="--", label="dense, untrained")
    axes.set(xlabel="tokens trained on", ylabel="perplexity, WikiText-2 test", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=200)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(".bench/calibration-training"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between validations")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64, help="to validate on")
    parser.add_argument("--files", type=int, default=100, help="modules of Python to train on")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options)
    dense = before(options.source, options)
    curves = {name: train(name, how, options) for name, how in SIDES.items()}
    for name, curve in curves.items():
        curve.insert(0, (0, before(options.folder / f"model-{name.split()[-1]}", options)))
    rows = [
        {"tokens": points[0][0], **{n: p[1] for n, p in zip(curves, points, strict=True)}}
        for points in zip(*curves.values(), strict=True)
    ]
    notes = [f"Dense, untrained: {dense:.2f}. 7 of 9 heads; tokens, order and seed are the same."]
    for name, curve in curves.items():
        at = regained(curve, dense)
        notes.append(
            f"{name}: {'not regained' if at is None else f'regained after at most {at:,} tokens'}."
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(curves, dense, options.out / "calibration_training.png")
    title = "Training from the paper's conversion and from the calibrated one"
    publish("calibration_training", title, rows, [], notes, options.out)


if __name__ == "__main__":
    main()
