"""What calibrated conversion keeps of a model without any training, beside the papers' own ways.

python bench/calibration.py --source SmolLM2-135M-Instruct --data DIR --out bench/results

`--data` holds WikiText-2. A row is one `moe upcycle` or two in a chain, fitted to 16,384 tokens,
and the perplexity of what came out on text that nothing was fitted to: WikiText-2's test file and
modules of Python's library, in windows of 1,024 tokens. What is in `--folder` is not done again.
"""

import argparse
import contextlib
import io
import json
import math
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # no installation is needed

import torch
from calibration_oracle import Oracle
from report import Goal, publish
from study_text import code
from torch import Tensor
from torch.nn import functional as F

from moe import cli
from moe.upcycle.calibrate.parts import Part
from moe.upcycle.calibrate.text import read_windows
from moe.upcycle.receipt import Receipt
from moe.upcycle.recipes.conversion import config_of
from moe.upcycle.source import Source
from moe.upcycle.tokenizer import load_tokenizer
from moe.upcycle.verify import load

WINDOW = 1024
SHORT = 4  # windows of the specification's protocol
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 8 if DEVICE.type == "cuda" else 1  # windows at a time
SPECIFIED_TOKENS = 12_288  # that the specification's rows are fitted to
NEURONS, ALWAYS = 1536, 384  # of SmolLM2's MLPs; in the shared slice


@dataclass(frozen=True, slots=True)
class Row:
    """Options of one `moe upcycle` or of several in a chain, or a part whose oracle is asked."""

    name: str
    kept: str
    steps: tuple[str, ...] = ()
    oracle: Part | None = None
    text: str = "wiki"  # what it is fitted to
    known: float | None = None  # perplexity on the short text, by the specification


def heads(keep: int, *more: str) -> str:
    return " ".join((f"moh --router calibrated --budget threshold --mean-heads {keep}", *more))


def slices(experts: int, *more: str) -> str:
    """Three quarters of an MLP: the shared quarter, and two thirds of the other slices."""
    number = "mean-experts" if BUDGET in more else "mlp-top-k"
    return " ".join(
        (f"uoe --mlp-experts {experts} --{number} {experts * 2 // 3} --router calibrated",
         f"--partition shared-coactivation --shared-neurons {ALWAYS}", *more)
    )  # fmt: skip


def of_heads(keep: float, **more: Any) -> Part:
    return Part(name="attention", units=9, keep=keep, **more)


def of_slices(experts: int, **more: Any) -> Part:
    keep = experts * 2 // 3
    return Part(name="mlp", units=experts, keep=keep, always=ALWAYS, mean="mean_experts", **more)


NORM, REFIT, BUDGET = "--target norm", "--refit", "--mode budget"
TOPK = "moh --router calibrated --budget topk --shared-heads 2 --top-k 5"
SPECIFIED = [  # the specification's rows
    Row("MoH's paper: first 4 shared, query norms", "7 of 9 heads",
        ("moh --router qnorm --shared-heads 4 --top-k 3",), known=87.7),
    Row("2 shared and the top 5 by norm", "7 of 9 heads", (f"{TOPK} {NORM}",), known=22.95),
    Row("the same, refit", "7 of 9 heads", (f"{TOPK} {NORM} {REFIT}",), known=22.52),
    Row("threshold by norm", "7 of 9 heads", (heads(7, NORM),), known=21.79),
    Row("threshold by norm", "6 of 9 heads", (heads(6, NORM),), known=23.72),
    Row("threshold by norm", "5 of 9 heads", (heads(5, NORM),), known=30.65),
    Row("the same, refit", "5 of 9 heads", (heads(5, NORM, REFIT),), known=25.80),
    Row("oracle by norm", "7 of 9 heads", known=21.30,
        oracle=of_heads(7, measure="norm", budget="threshold")),
    Row("oracle by norm", "5 of 9 heads", known=24.49,
        oracle=of_heads(5, measure="norm", budget="threshold")),
    Row("top 16 of 24 slices by norm", "75 % of the MLP", (slices(24, NORM),), known=27.7),
]  # fmt: skip
OURS = [
    *(Row(f"threshold by loss{', refit' if r else ''}", f"{k} of 9 heads",
          (heads(k, *([REFIT] if r else [])),))
      for k in (7, 6, 5) for r in (False, True)),
    Row("a number of heads for each layer, by loss", "7 of 9 heads",
        ("moh --router calibrated --budget layer --mean-heads 7",)),
    *(Row("oracle by loss", f"{k} of 9 heads",
          oracle=of_heads(k, measure="loss", budget="threshold")) for k in (7, 6, 5)),
    Row("top 16 of 24 slices by loss", "75 % of the MLP", (slices(24),)),
    Row("threshold, 24 slices by loss", "75 % of the MLP", (slices(24, BUDGET),)),
    Row("threshold, 96 slices by loss", "75 % of the MLP", (slices(96, BUDGET),)),
    Row("threshold, 96 slices by loss, refit", "75 % of the MLP", (slices(96, BUDGET, REFIT),)),
    Row("oracle, 96 slices by loss", "75 % of the MLP",
        oracle=of_slices(96, measure="loss", budget="threshold")),
    Row("heads, then 96 slices", "7 of 9 heads, 75 % of the MLP", (heads(7), slices(96, BUDGET))),
    Row("heads, then 96 slices, refit", "7 of 9 heads, 75 % of the MLP",
        (heads(7), slices(96, BUDGET, REFIT))),
]  # fmt: skip
MIXED = [
    Row("threshold by loss", "7 of 9 heads", (heads(7),), text="mixed"),
    Row("threshold, 96 slices by loss", "75 % of the MLP", (slices(96, BUDGET),), text="mixed"),
]  # fmt: skip
BOTH = ("", ", refit")
HEADLINES = {  # recipes of which the best counts, and the most percent over dense
    **{tuple((f"threshold by loss{r}", f"{k} of 9 heads") for r in BOTH): most
       for k, most in ((7, 2.0), (6, 7.0), (5, 15.0))},
    tuple((f"threshold, 96 slices by loss{r}", "75 % of the MLP") for r in BOTH): 12.0,
    tuple((f"heads, then 96 slices{r}", "7 of 9 heads, 75 % of the MLP") for r in BOTH): 15.0,
}  # fmt: skip


class Bench:
    """Texts, the source, and what has been found; kept in the folder from row to row."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.source: Path = options.source
        self.folder: Path = options.folder
        self.tokens: int = options.calibration_tokens
        self.seeds: int = options.seeds
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = config_of(Source.open(self.source))
        self.fitted = write_texts(self.folder, options.data)
        tokenizer = load_tokenizer(self.source)
        held_out = {
            "wiki": (options.data / "wikitext2/test.txt").read_text(),
            "code": (self.folder / "code-test.txt").read_text(),
        }
        self.texts = {
            name: windows(tokenizer, text, count)
            for name, text in held_out.items()
            for count in [options.long]
        }
        self.texts = {"short": self.texts["wiki"][:SHORT], **self.texts}
        self.found: dict[str, Any] = {}
        self.record = self.folder / "found.json"
        if self.record.exists():
            self.found = json.loads(self.record.read_text())
        self.parent = self.once("dense", lambda: self.measure(load(self.source), self.texts))

    def once(self, key: str, find: Any) -> Any:
        """What was found before under this key, or is found now."""
        if key not in self.found:
            begin = time.monotonic()
            self.found[key] = find() | {"on": DEVICE.type}
            self.record.write_text(json.dumps(self.found, indent=1))
            print(f"{time.monotonic() - begin:6.1f} s  {key}: {self.found[key]}", flush=True)
        return self.found[key]

    def of(self, row: Row, seed: int = 0) -> dict[str, Any]:
        """Perplexities of a row, units kept, seconds of its calibration."""
        if row.oracle is not None:
            part = row.oracle
            return self.once(f"oracle {part} {row.text}", lambda: self._oracle(part, row))
        return self.once(f"{' + '.join(row.steps)} {row.text} {seed}", lambda: self._row(row, seed))

    def texts_of(self, row: Row, seed: int = 0) -> tuple[str, ...]:
        """Held-out texts a row is asked about: the specification's rows and the spread over other
        calibration texts under the specification's protocol alone; code, where some was fitted to
        or the machine is fast.
        """
        if row.known or seed:
            return ("short",)
        wide = row.text == "mixed" or DEVICE.type == "cuda"
        return tuple(self.texts) if wide else ("short", "wiki")

    def tokens_of(self, row: Row) -> int:
        return SPECIFIED_TOKENS if row.known else self.tokens

    def _row(self, row: Row, seed: int) -> dict[str, Any]:
        now, seconds, peak = self.source, 0.0, 0
        parts: dict[str, Any] = {}
        for number, step in enumerate(row.steps):
            out = self.folder / f"model-{number}"
            shutil.rmtree(out, ignore_errors=True)
            recipe, *more = shlex.split(step)
            if "calibrated" in step:
                more += ["--calibrate", str(self.fitted[row.text, seed]), "--calibration-tokens"]
                more += [str(self.tokens_of(row))]
            given = ["--source", now, "--out", out, "--seed", seed, "--no-verify", "--json"]
            upcycle(recipe, *more, *map(str, given))
            receipt = Receipt.read(out)
            assert receipt is not None
            calibration = receipt.steps[-1].get("calibration") or {}
            seconds += calibration.get("seconds", 0.0)
            peak = max(peak, calibration.get("peak_memory_bytes", 0))
            parts |= {k: v["mean_on"] for k, v in calibration.get("parts", {}).items()}
            now = out
        texts = self.texts_of(row, seed)
        found = self.measure(load(now), texts) | {"seconds": seconds, "peak": peak, "kept": parts}
        for number in range(len(row.steps)):
            shutil.rmtree(self.folder / f"model-{number}")
        return found

    def _oracle(self, part: Part, row: Row) -> dict[str, Any]:
        begin = time.monotonic()
        text = self.fitted[row.text, 0]
        given = read_windows(self.source, text, self.tokens_of(row), self.config)
        best = Oracle(self.source, part, given)
        seconds = time.monotonic() - begin
        model = load(self.source)
        with best.masking(model):
            found = self.measure(model, self.texts_of(row))
        return found | {"seconds": seconds, "peak": 0, "kept": {part.name: best.kept}}

    @torch.no_grad()
    def measure(self, model: Any, texts: Iterable[str]) -> dict[str, float]:
        """Perplexity of each text named; `short` is WikiText-2's first windows alone."""
        model.to(DEVICE)
        found = {}
        for name in texts:
            ids = self.texts[name]
            losses = []
            for together in ids.to(DEVICE).split(BATCH):
                logits = model(together, use_cache=False).logits
                losses += [
                    F.cross_entropy(own[:-1].float(), window[1:]).item()
                    for own, window in zip(logits, together, strict=True)
                ]
            found[name] = math.exp(statistics.mean(losses))
        return found


def windows(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first tokens of a text [count, WINDOW]."""
    ids = tokenizer(text[: 16 * count * WINDOW], add_special_tokens=False)["input_ids"]
    count = min(count, len(ids) // WINDOW)
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def write_texts(folder: Path, data: Path) -> dict[tuple[str, int], Path]:
    """What is fitted to: WikiText-2's validation file from three places on, and that mixed with
    modules of Python's library, every other one; the remaining modules are held out.
    """
    whole = (data / "wikitext2/valid.txt").read_text()
    modules = [text for text in code() if len(text) < 60_000]
    (folder / "code-test.txt").write_text("\n\n".join(modules[1::2]))
    paths = {}
    for seed in (0, 1, 2):
        start = whole.index("\n", seed * len(whole) // 3) if seed else 0
        paths["wiki", seed] = folder / f"wiki-{seed}.txt"
        paths["wiki", seed].write_text(whole[start:] + whole[:start])
        # pieces of both in turn, each a document
        step, own = 8_000, "\n\n".join(modules[seed * 40 :: 2])
        pieces = [
            text[at : at + step]
            for at in range(0, 40 * step, step)
            for text in (whole[start:] + whole[:start], own)
        ]
        paths["mixed", seed] = folder / f"mixed-{seed}.jsonl"
        lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
        paths["mixed", seed].write_text("".join(lines))
    return paths


def upcycle(*arguments: str) -> None:
    """`moe upcycle …` in this process; what it prints is shown when it fails."""
    sys.argv = ["moe", "upcycle", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.call()
    except SystemExit as error:
        if error.code:
            raise SystemExit(f"{' '.join(sys.argv)}\n{said.getvalue()[-3000:]}") from error


def line(bench: Bench, row: Row) -> dict[str, Any]:
    """A row of the table: perplexities, and how much worse than the dense model's in percent."""
    found = bench.of(row)
    kept = ", ".join(f"{v:.2f}" for v in found["kept"].values())
    return {
        "recipe": row.name + (" (fitted to mixed text)" if row.text == "mixed" else ""),
        "keeps": row.kept,
        "found on": kept or "-",
        "specified": row.known or "-",
        "first 4,096": round(found["short"], 2),
        "+%": worse(bench, found, "short"),
        "WikiText-2": round(found["wiki"], 2) if "wiki" in found else "-",
        "+ %": worse(bench, found, "wiki") if "wiki" in found else "-",
        "code": round(found["code"], 2) if "code" in found else "-",
        "+  %": worse(bench, found, "code") if "code" in found else "-",
        "s": round(found["seconds"]),
        "on": found["on"],
    }


def worse(bench: Bench, found: dict[str, Any], text: str) -> float:
    """Percent over the dense model's perplexity."""
    return round(100 * (found[text] / bench.parent[text] - 1), 2)


def goals_of(bench: Bench) -> tuple[list[Goal], list[str]]:
    """Every figure to reach, on the first 4,096 tokens and on all, and the spread over seeds."""
    goals, notes = [], []
    for row in SPECIFIED:
        if row.known:
            ratio = bench.of(row)["short"] / row.known
            goals.append(
                Goal(f"{row.name}, {row.kept}: off the specified", abs(ratio - 1), "≤", 0.05)
            )
    named = {(row.name, row.kept): row for row in OURS}
    for keys, most in HEADLINES.items():
        rows = [named[key] for key in keys]
        for text, which in (("short", "first 4,096 tokens"), ("wiki", "all tokens")):
            row = min(rows, key=lambda r: bench.of(r)[text])
            what = f"{row.kept}, {row.name}: % over dense, {which}"
            goals.append(Goal(what, worse(bench, bench.of(row), text), "≤", most))
            if text == "short" and bench.seeds > 1 and row.kept.endswith("heads"):
                values = [worse(bench, bench.of(row, seed), text) for seed in range(bench.seeds)]
                notes.append(f"{what}, fitted to other texts: {', '.join(map(str, values))}.")
    for row in MIXED:
        found = bench.of(row)
        percent = [worse(bench, found, text) for text in ("wiki", "code")]
        what = f"{row.kept}, {row.name}, fitted to mixed text: % over dense in the worse domain, "
        goals.append(
            Goal(what + "less 1.5 times the other's", max(percent) - 1.5 * min(percent), "≤", 0.0)
        )
    return goals, notes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="SmolLM2-135M's folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of wikitext2")
    parser.add_argument("--folder", type=Path, default=Path(".bench/calibration"))
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--long", type=int, default=64, help="windows of each held-out text")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="texts to fit to")
    parser.add_argument("--others", type=Path, help="JSON rows of other programs, see the README")
    return parser.parse_args()


def others_of(path: Path | None) -> list[dict[str, Any]]:
    """Rows of the same columns that another program found."""
    return json.loads(path.read_text()) if path else []


def main() -> None:
    options = arguments()
    bench = Bench(options)
    for row in (*OURS, *MIXED, *SPECIFIED):  # those that matter most first, if time is short
        bench.of(row)
    rows = [line(bench, row) for row in (*SPECIFIED, *OURS, *MIXED)] + others_of(options.others)
    goals, notes = goals_of(bench)
    parent = bench.parent
    notes = [
        f"The dense model: {parent['short']:.2f} on the first 4,096 tokens of WikiText-2's test "
        f"file, {parent['wiki']:.2f} on {bench.texts['wiki'].numel():,}, {parent['code']:.2f} on "
        f"{bench.texts['code'].numel():,} tokens of Python's library. Fitted to "
        f"{bench.tokens:,} tokens, rows with a specified figure to {SPECIFIED_TOKENS:,}; "
        "s: seconds of the calibration; on: where the row was found.",
        *notes,
    ]
    publish(
        "calibration", "Calibrated conversion, nothing trained", rows, goals, notes, options.out
    )


if __name__ == "__main__":
    main()
