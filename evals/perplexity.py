"""Perplexity of documents in sliding windows, a task per domain, intervals over documents.

A window is so many tokens, as the model's positions are; each next one predicts `stride` more, the
last of them with `window - stride` tokens or more before it. A document that fits into one window
is read as a whole. With stride = window it is the harness's own rolling protocol.
"""

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe.errors import raise_all

REQUEST = "sliding_windows"  # what the harness calls the adapter's method by
TASK = "local_perplexity"
DRAWS, LEVEL = 1000, 0.95  # of the bootstrap; of its intervals
FORWARD_TOKENS = 1024  # per item of the batch size: its logits bound what a laptop can hold
BITS = {"bits_per_byte"}  # of the ratios; the others are perplexities

Window = tuple[list[int], list[int]]  # what is known, what is predicted


def sizes(positions: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride in tokens: by default the model's positions, and half the window.

    Raises UserError with all that is wrong with them.
    """
    chosen = positions if window is None else window
    step = max(1, chosen // 2) if stride is None else stride
    problems = []
    if not 1 <= chosen <= positions:
        problems.append(f"window={chosen}: the model has {positions} positions. Use 1 to that.")
    if not 1 <= step <= chosen:
        problems.append(f"stride={step} with window={chosen}: use 1 to the window.")
    raise_all(problems)
    return chosen, step


def windows_of(tokens: list[int], prefix: int, window: int, stride: int) -> list[Window]:
    """A document's windows, which predict each of its tokens once; `prefix` comes before all."""
    pairs = get_rolling_token_windows(tokens, prefix, window, window - stride + 1)
    return [make_disjoint_window(pair) for pair in pairs]


class SlidingPerplexity(ConfigurableTask):
    """A task whose documents are `page`s; `window` and `stride` are in its metadata."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: v for key, v in config.items() if key != "class"})
        self.OUTPUT_TYPE = REQUEST

    @property
    def windows(self) -> tuple[int | None, int | None]:
        settings: dict[str, Any] = self.config.metadata or {}
        return settings.get("window"), settings.get("stride")

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **more: Any) -> Instance:
        arguments = (doc["page"], *self.windows)
        return Instance(REQUEST, doc, arguments, 0, metadata=more["metadata"])


@contextlib.contextmanager
def domain_tasks(
    tasks: Sequence[str], data: Path | None, divide: bool = True
) -> Iterator[tuple[list[str], list[Path]]]:
    """The tasks, and folders to find them in too.

    `local_perplexity` becomes a task per subfolder of `text/` in the data, where it has any: rows
    per domain instead of one number for all; not so where not to `divide`, as in a suite, whose
    rows are known before. `local_perplexity_NAME` is one of them.
    """
    text = data / "text" if data else None
    inside = sorted(text.iterdir()) if text is not None and text.is_dir() else []
    domains = [p.name for p in inside if p.is_dir()]
    names = []
    for task in tasks:
        every = divide and task == TASK and domains
        names += [f"{TASK}_{d}" for d in domains] if every else [task]
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            if name.startswith(f"{TASK}_"):
                fields = {
                    "include": str(Path(__file__).parent / "tasks" / "perplexity.yaml"),
                    "task": name,
                    "dataset_kwargs": {"domain": name.removeprefix(f"{TASK}_")},
                }
                (Path(temporary) / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        yield names, [Path(temporary)]


def resample(results: Sequence[Any], task: str, metric: str) -> np.ndarray | None:
    """A metric of several models [models, draws] in the same bootstrap samples of a task's
    documents; None where it is no ratio of sums over documents, where there are fewer than two, or
    where a draw has nothing to divide by.
    """
    sums: list[np.ndarray] = []
    for result in results:
        samples = sorted(result.get("samples", {}).get(task, []), key=lambda s: s["doc_id"])
        values = [sample.get(metric) for sample in samples]
        if len(values) < 2 or not all(isinstance(v, tuple | list) and len(v) == 2 for v in values):
            return None
        sums.append(np.array(values, dtype=np.float64))
    documents = len(sums[0])
    if any(len(s) != documents for s in sums):
        return None
    generator = np.random.default_rng(0)
    counts = generator.multinomial(documents, np.full(documents, 1 / documents), size=DRAWS)
    if any((counts @ s[:, 1] == 0).any() for s in sums):
        return None
    losses = np.stack([-(counts @ s[:, 0]) / (counts @ s[:, 1]) for s in sums])
    if metric in BITS:
        return losses / math.log(2)
    return np.exp(np.minimum(losses, math.log(sys.float_info.max)))


def interval(draws: np.ndarray) -> tuple[float, float]:
    """What LEVEL of one model's draws lie within."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
