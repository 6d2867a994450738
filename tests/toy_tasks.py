"""A suite of four small tasks in letters: choices, texts, generation, and texts in windows that
overlap, which only our adapter knows; each with uneven requests.

path = write(folder)        # the suite's YAML file, its tasks and their data beside it
"""

import json
import random
from pathlib import Path

import tiny
import yaml

from moe.evals.run import ROOT

PLAIN = ("toy_choice", "toy_text", "toy_say")  # what the harness's own model can answer
TASKS = (*PLAIN, "toy_windows")
ITEMS = 7  # not a multiple of ranks or of a batch
METRICS = {
    "toy_choice/acc", "toy_choice/acc_norm", "toy_text/bits_per_byte", "toy_text/byte_perplexity",
    "toy_text/word_perplexity", "toy_say/exact_match", "toy_windows/bits_per_byte",
    "toy_windows/byte_perplexity", "toy_windows/word_perplexity", "toy_windows/token_perplexity",
}  # fmt: skip


def write(folder: Path) -> Path:
    """Write it all."""
    folder.mkdir(parents=True)
    draw = random.Random(3)

    def letters(least: int, most: int) -> str:
        return "".join(draw.choices(tiny.LETTERS[:62], k=draw.randint(least, most)))

    rows = []
    for item in range(ITEMS):
        # choices of one letter are read off the same logits, others are not
        choices = [letters(1, 1) for _ in range(3)] if item % 2 else [letters(2, 9) for _ in "abc"]
        page = letters(5, 30) + " " + letters(5, 30)
        row = {"q": letters(3, 40), "choices": choices, "label": item % 3, "page": page}
        rows.append({**row, "answer": letters(1, 4)})
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }

    def metrics(*names: str) -> list[dict[str, object]]:
        return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]

    choice = {
        "output_type": "multiple_choice",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": metrics("acc", "acc_norm"),
    }
    text = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": n} for n in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    }
    say = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "Z"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": metrics("exact_match"),
    }
    windows = {
        "include": str(ROOT / "tasks" / "perplexity.yaml"),
        "custom_dataset": None,
        "metadata": {"window": 11, "stride": 4},
    }
    for name, fields in zip(TASKS, (choice, text, say, windows), strict=True):
        task = {**common, "task": name, **fields}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    suite = folder / "suite.yaml"
    suite.write_text(of_tasks(acc="toy_choice", word_perplexity="toy_text", exact_match="toy_say",
                              token_perplexity="toy_windows"))  # fmt: skip
    return suite


def of_tasks(**tasks: str) -> str:
    """A suite's file: a task for each metric."""
    entries = [{"name": task, "task": task, "metric": metric} for metric, task in tasks.items()]
    return yaml.safe_dump({"about": "Toys.", "entries": entries})
