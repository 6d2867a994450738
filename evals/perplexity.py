"""Perplexity of documents in sliding windows, a task per domain.

A window is so many tokens, as the model's positions are; each next one predicts `stride` more, the
last of them with `window - stride` tokens or more before it. A document that fits into one window
is read as a whole. With stride = window it is the harness's own rolling protocol.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe.errors import raise_all
from moe.evals.tasks.loaders import documents

REQUEST = "sliding_windows"  # what the harness calls the adapter's method by
TASK = "local_perplexity"
FORWARD_TOKENS = 1024  # per item of the batch size: its logits bound what a laptop can hold

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
    rows are known before. `local_perplexity_NAME` is one of them. Raises UserError for texts beside
    such folders, which would be in no row.
    """
    text = data / "text" if data else None
    inside = sorted(text.iterdir()) if text is not None and text.is_dir() else []
    domains = [p.name for p in inside if p.is_dir() and p.name[0] != "." and documents(p)]
    if divide and domains and TASK in tasks:
        raise_all(
            [
                f"{p} lies beside folders, which are domains ({', '.join(domains)}): move it into "
                "one, or all of them into one."
                for p in documents(text or Path())
                if p.parent == text
            ]
        )
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
