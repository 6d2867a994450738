"""Scores of a model on the files of BLiMP, PIQA and GSM8K, with their commands and intervals.

python bench/eval_smollm2.py --model SmolLM2-135M-Instruct --data DIR --out bench/results

`--data` is the folder of `moe eval --data`. Each part is one `moe eval` in a process of its own,
on the first items of each task, as many as two cores answer in a few minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import publish

ROOT = Path(__file__).resolve().parents[1]
# (tasks, items per task): generating an answer costs as much as forty likelihoods
PARTS = ((("local_blimp",), 150), (("local_piqa",), 800), (("local_gsm8k",), 20))


def evaluate(model: Path, data: Path, tasks: tuple[str, ...], limit: int, out: Path) -> Any:
    """What one `moe eval` wrote into results.json."""
    options = ["--tasks", ",".join(tasks), "--limit", str(limit), "--data", str(data)]
    command = [sys.executable, "-m", "moe", "eval", str(model), *options, "--out", str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    return json.loads((out / "results.json").read_text())


def rows_of(report: Any) -> list[dict[str, Any]]:
    counts = report["results"][0]["n-samples"]
    found = []
    for row in report["rows"]:
        (value,), (error,), (interval,) = row["values"], row["errors"], row["intervals"]
        # a group has no items of its own: those of the tasks that it is the mean of
        inside = counts.get(row["task"])
        items = inside["effective"] if inside else sum(c["effective"] for c in counts.values())
        low, high = (f"{100 * end:.1f}" for end in interval)
        found.append({
            "task": row["task"], "metric": row["metric"], "items": items,
            "%": f"{100 * value:.1f}", "± (standard error)": f"{100 * (error or 0):.1f}",
            "95 %": f"{low} to {high}",
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (tasks, limit) in enumerate(PARTS):
            out = Path(folder) / str(number)
            report = evaluate(options.model, options.data, tasks, limit, out)
            rows += rows_of(report)
            what = f"--tasks {','.join(tasks)} --limit {limit} --data DIR --out …"
            notes.append(f"`moe eval {options.model.name} {what}`")
    notes.append(
        "The first items of each task, so the intervals (Wilson's) are wide; the dtype is the "
        "folder's own. "
        "BLiMP: 8 of its 67 paradigms. GSM8K: 5 shots, greedy, no chat template."
    )
    title = f"{options.model.name} on BLiMP, PIQA and GSM8K"
    packages = ("torch", "transformers", "lm-eval", "moe-stack")
    publish("eval_smollm2", title, rows, [], notes, options.out, packages)


if __name__ == "__main__":
    main()
