"""What reporting costs a training step, and how often it makes the host wait for the device.

python bench/metrics.py --out bench/results

The same run takes steps with all that is measured and reported, and without, in turn.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import report
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe.config import parse
from moe.data.prepare import prepare
from moe.data.sampler import Batches
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.parallel.world import world
from moe.train import loop
from moe.train.guard import Generators, Guard
from moe.train.loads import LoadMeter
from moe.train.metrics import PICTURES, Pace, Reporter

SYNCS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


def model(folder: Path, hidden: int, layers: int) -> None:
    """A mixture of heads and of 8 experts, with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = RoutedLlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2,
        attention={"kind": "moh", "shared_heads": [0, 1], "top_k": 4},
        mlp={"kind": "moe", "num_experts": 8, "top_k": 2},
    )  # fmt: skip
    RoutedLlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(folder)


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Loads are not added up, nothing is judged, no random state is kept."""

    class Empty:
        def reference(self) -> None:
            return None

        def selections(self, config: Any) -> tuple[list[Tensor], list[Tensor]]:
            return [], []

    with (
        mock.patch.object(LoadMeter, "add", lambda *_: None),
        mock.patch.object(LoadMeter, "total", lambda *_: Empty()),
        mock.patch.object(Guard, "judge", lambda *_: None),
        mock.patch.object(Generators, "__init__", lambda *_: None),
    ):
        yield


@contextlib.contextmanager
def timed(spent: list[float]) -> Iterator[None]:
    """Add the seconds that measuring takes."""

    def timing(right: Any) -> Any:
        def called(*given: Any) -> Any:
            begin = time.process_time()
            found = right(*given)
            spent.append(time.process_time() - begin)
            return found

        return called

    with contextlib.ExitStack() as stack:
        for place, name in ((LoadMeter, "add"), (LoadMeter, "total"), (Guard, "judge"),
                            (Generators, "__init__")):  # fmt: skip
            patch = mock.patch.object(place, name, timing(getattr(place, name)))
            stack.enter_context(patch)
        yield


class Steps:
    """A run whose steps can be timed with and without what is measured in them."""

    def __init__(self, run: loop.Run) -> None:
        config = run.config
        self.run = run
        self.batches = Batches(
            run.dataset, global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
        )  # fmt: skip
        self.reporter = Reporter(config.out, config.to_yaml(), 0, config.train.steps)
        self.pace = Pace(config, run.model_config, run.ranks, 0)
        self.last: Any = None

    def on(self) -> None:
        self.last = self.run.train_step(self.batches)

    def off(self) -> None:
        with unreported():
            self.run.train_step(self.batches)

    def report(self) -> None:
        """What rank 0 does of the last step, every train.log_every steps."""
        loss, norm, lr, loads = self.last
        found = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
        metrics = {"step": self.run.step, **found, **self.pace.take(self.run.step)}
        with contextlib.redirect_stdout(io.StringIO()):
            here = loads.cpu()
            self.reporter.report(metrics | here.summary(), here)

    def seconds(self, name: str) -> float:
        """Of this process, which others on the machine do not disturb."""
        begin = time.process_time()
        getattr(self, name)()
        return time.process_time() - begin


def syncs(steps: Steps) -> int:
    """Calls in one step that wait for the device, made by moe's own code."""
    found = []

    def counting(name: str, right: Any) -> Any:
        def called(tensor: Tensor, *given: Any, **named: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("moe.train"):
                found.append(f"{caller}.{name}")
            return right(tensor, *given, **named)

        return called

    with contextlib.ExitStack() as stack:
        for name in SYNCS:
            right = getattr(Tensor, name)
            stack.enter_context(mock.patch.object(Tensor, name, counting(name, right)))
        steps.run.train_step(steps.batches)
    return len(found)


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[report.Goal]]:
    model(folder / "model", options.hidden, options.layers)
    (folder / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 4000)
    prepare([str(folder / "text.txt")], str(folder / "model"), folder / "data", workers=1,
            quiet=True)  # fmt: skip
    values = {
        "model": str(folder / "model"), "out": str(folder / "run"),
        "data": {"train": [{"path": str(folder / "data")}], "sequence_length": options.length},
        "train": {"steps": 1000, "global_batch_size": 4, "micro_batch_size": 2,
                  "dtype": "float32"},
        "schedule": {"warmup_steps": 0},
    }  # fmt: skip
    (folder / "run").mkdir()
    with world() as ranks:
        run = loop.Run(parse(values, "bench"), ranks)
        steps = Steps(run)
        sides: dict[str, list[float]] = {"on": [], "off": []}
        for round_ in range(options.repeats + 2):
            for name in ("on", "off") if round_ % 2 else ("off", "on"):
                spent = steps.seconds(name)
                if round_ >= 2:
                    sides[name].append(spent)
        reports = [steps.seconds("report") for _ in range(6)][1:]
        inside: list[float] = []
        with timed(inside):
            for _ in range(5):
                steps.on()
        waits = syncs(steps)
        steps.batches.close()
        steps.reporter.close()
    return row(sides, sum(inside) / 5, reports, waits, options.log_every)


def row(
    sides: dict[str, list[float]], inside: float, reports: list[float], waits: int, every: int
) -> tuple[dict[str, Any], list[report.Goal]]:
    step = statistics.median(sides["off"])
    # neighbours in time differ by the metrics and by noise, which the median takes out
    pairs = zip(sides["on"], sides["off"], strict=True)
    measuring = statistics.median(on - off for on, off in pairs) / step
    reporting = statistics.median(reports) / every / step
    found = {
        "step ms": 1000 * step,
        "with less without, %": 100 * measuring,
        "its own calls, %": 100 * inside / step,
        "one report ms": 1000 * statistics.median(reports),
        f"a report every {every}, %": 100 * reporting,
        "waits per step": waits,
    }
    # the difference of two steps is noise, if not for many of them: it must not hide a cost
    total = 100 * (max(measuring, inside / step) + reporting + PICTURES)
    return found, [
        report.Goal("metrics, % of step time", total, "≤", 1.0),
        report.Goal("waits for the device per step", float(waits), "≤", 3.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for metrics.json and .md")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="metrics-") as folder:
        found, goals = measure(Path(folder), options)
    note = (
        f"One process, float32, {options.threads} threads: {options.layers} layers of "
        f"{options.hidden}, 8 heads (2 shared, 4 of 6), 8 experts (2 of 8), 4 × {options.length} "
        "tokens in two micro-batches. Seconds are of CPU time. Loads, guard and random state are "
        f"measured in every step: `with less without` is the median over {options.repeats} pairs "
        "of neighbouring steps, `its own calls` the time inside these functions. A report "
        "prints, appends a line, and writes scalars and histograms for TensorBoard; pictures are "
        f"drawn as rarely as {100 * PICTURES:g} % of the time allows, which the sum includes."
    )
    report.publish("metrics", "What metrics cost", [found], goals, [note], options.out)


if __name__ == "__main__":
    main()
