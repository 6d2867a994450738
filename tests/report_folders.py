"""Folders that `moe report` reads, written by hand: a run of three steps, results of two models.

run = write_run(folder / "a", lines=[step(1, 4.0), validation(2, 3.5)])
"""

import json
from pathlib import Path
from typing import Any

import tiny


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    """A logged step."""
    return {"step": number, "loss": loss, "grad_norm": 1.5, "lr": 1e-3, "tokens": 256 * number,
            "tokens_per_second": 1000.0, "mfu": None, **more}  # fmt: skip


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "validation_loss": loss}


def score(number: int, **metrics: tuple[float, float | None]) -> dict[str, Any]:
    """An evaluation during training, of metrics task__metric=(value, error)."""
    found = {n.replace("__", "/"): {"value": v, "error": e} for n, (v, e) in metrics.items()}
    return {"step": number, "evaluation": found}


def loads(number: int, **parts: list[list[int]]) -> dict[str, Any]:
    """A line of loads.jsonl, of each layer's loads in percent of their mean."""

    def layer(load: list[int]) -> dict[str, Any]:
        dead = sum(x == 0 for x in load) / len(load)
        return {"max_over_mean": max(load) / 100, "dead_share": dead, "entropy_share": 0.5,
                "load_entropy": 0.9, "load": load}  # fmt: skip

    return {"step": number} | {
        noun: {str(i): layer(x) for i, x in enumerate(of)} for noun, of in parts.items()
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, lines: list[dict[str, Any]], **config: Any) -> Path:
    """A run folder without checkpoints. A key of the configuration is given as section__key."""
    folder.mkdir(parents=True)
    values: dict[str, Any] = {"model": "gone", "train": {"steps": 3}}
    for key, value in config.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    (folder / "config.yaml").write_text(json.dumps(values, indent=1))  # JSON is YAML
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def write_results(folder: Path, rows: list[dict[str, Any]], models: list[Path | str]) -> Path:
    """What `moe eval` writes."""
    folder.mkdir(parents=True)
    results = [{"n-samples": {row["task"]: {"effective": 50}}} for row in rows[:1]]
    found = {"models": [{"path": str(m)} for m in models], "tuning": None, "rows": rows,
             "results": results}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def row(
    task: str, values: list[float], error: float | None, p: float | None = None
) -> dict[str, Any]:
    """A task's accuracy; differences are paired with half the error, and have one p."""
    half = None if error is None else error / 2
    return {
        "task": task, "metric": "acc", "values": values, "errors": [error] * len(values),
        "differences": [
            {"value": values[0] - v, "error": half, "p": p, "of": "acc",
             "why": "too few items (3)" if p is None else None}
            for v in values[1:]
        ],
    }  # fmt: skip


def write_model(folder: Path, mlp: Any = None) -> Path:
    """A toy's configuration; a report reads no weights."""
    model = tiny.routed_model(tiny.dense_model(), None, mlp)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    return folder
