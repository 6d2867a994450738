"""BLiMP and PIQA before and after `moe upcycle moh --router calibrated`, 7 of 9 heads, untrained.

python bench/calibration_tasks.py --source SmolLM2-135M-Instruct --data DIR --out bench/results

`--data` is the folder of `moe eval --data`, with WikiText-2 to fit to beside it. One `moe upcycle`
and one `moe eval --baseline` per kind of task, on its first items.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from calibration_training import run
from report import Goal, publish

PARTS = (("local_blimp", 300), ("local_piqa", 1000))  # items of each task
HOW = "--router calibrated --budget threshold --mean-heads 7"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    goals, notes = [], []
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "calibrated"
        text = options.data / "wikitext2/valid.txt"
        made = "--source", options.source, "--out", model, "--calibrate", text, "--no-verify"
        run("moe", "upcycle", "moh", *HOW.split(), *made)
        for task, limit in PARTS:
            out = Path(name) / task
            asked = "--tasks", task, "--limit", limit, "--data", options.data
            run("moe", "eval", model, "--baseline", options.source, *asked, "--out", out)
            for row in json.loads((out / "results.json").read_text())["rows"]:
                (ours, dense), (_, error) = row["values"], row["errors"]
                difference = row["differences"][0]
                rows.append({
                    "task": row["task"], "metric": row["metric"], "7 of 9 heads, %": 100 * ours,
                    "dense, %": 100 * dense, "dense ±": 100 * error,
                    "difference": 100 * difference["value"],
                    "its ±": 100 * (difference["error"] or 0),
                })  # fmt: skip
                if row["task"] == task and row["metric"] == "acc":
                    what = f"{task}: accuracy lost, in standard errors of the dense model's"
                    goals.append(Goal(what, (dense - ours) / error, "≤", 1.0))
            notes.append(f"`moe eval calibrated --baseline dense --tasks {task} --limit {limit} …`")
    notes.append(f"`moe upcycle moh {HOW} --calibrate wikitext2/valid.txt`. Paired differences.")
    title = "7 of 9 heads, calibrated, untrained: BLiMP and PIQA"
    packages = ("torch", "transformers", "lm-eval", "moe-stack")
    publish("calibration_tasks", title, rows, goals, notes, options.out, packages)


if __name__ == "__main__":
    main()
