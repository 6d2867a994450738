"""Saving a training state: what hashing costs, how long a step waits, and against torch's own.

python bench/checkpoint.py --out bench/results

One process, float32, a mixture with its Adam moments. Every side writes to the same disk and waits
for it (fsync). A stall is what a save adds to the steps around it: the copy, and what the writing
thread takes from the steps meanwhile.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import Goal, publish
from torch.distributed import checkpoint as dcp
from torch.nn import functional as F

from moe.checkpoint import pieces, store
from moe.checkpoint.disk import sync_tree
from moe.config import parse
from moe.engines import build
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.parallel.world import world

BATCH, LENGTH, STEPS = 4, 256, 6
NOTES = (
    "A stall in steps: the time that save() takes to return (`call`), and what the steps until the "
    "checkpoint is published take longer than the median of six before, over that median.",
    "Blocks are hashed while they are written: `hashing` is the time that the writer waits for "
    "that, `hash work` the time inside xxh3, both over the time of a save during which training "
    "waits. torch's distributed checkpoint (DCP) hashes nothing; its files are synced here too.",
)


class Hashing(ThreadPoolExecutor):
    """What hashes while blocks are written: its work, and the waiting for it, timed."""

    work = waits = 0.0

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future:
        def work() -> None:
            Hashing.work += timed(lambda: call(*given, **named))

        future = super().submit(work)
        right = future.result

        def result(timeout: float | None = None) -> None:
            Hashing.waits += timed(right)

        future.result = result  # type: ignore[method-assign]
        return future


def model(hidden: int) -> RoutedLlamaForCausalLM:
    torch.manual_seed(0)
    mlp = {"kind": "moe", "num_experts": 8, "top_k": 2, "intermediate_size": hidden}
    config = RoutedLlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        mlp=mlp,
    )
    return RoutedLlamaForCausalLM(config)


class Training:
    """An engine that steps on random tokens, and its state."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.tokens = torch.randint(8192, (BATCH, LENGTH))
        self.step()

    def step(self) -> None:
        logits = self.engine.forward(input_ids=self.tokens).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        self.engine.backward(loss, True)
        self.engine.step(1e-4, torch.ones(()))

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{e.kind}/{e.name}": e.tensor for e in self.engine.state()}


def alone(value: Any) -> list[Any]:
    return [value]


NONE = store.Progress(step=0, consumed_samples=0, updates=0, config={"data": {}}, reference=None)


def no_files(folder: Path) -> None:
    """Config and tokenizer are not what is measured."""


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def background(training: Training, out: Path, number: int, saver: store.Saver) -> dict[str, float]:
    """Steps with a save among them."""
    step = statistics.median(timed(training.step) for _ in range(STEPS))
    call = timed(lambda: saver.save(number, training.engine.state(), NONE, no_files))
    busy = []
    while not busy or saver._thread.is_alive():  # type: ignore[union-attr]
        busy.append(timed(training.step))
    saver.finish()
    return {"call": call, "stall": (call + sum(busy)) / step - len(busy), "step": step}


def at_once(training: Training, out: Path, number: int) -> dict[str, float]:
    """The same while training waits; how much of it is hashing."""
    saver = store.Saver(out, 0, alone, keep=1, asynchronous=False)
    Hashing.work = Hashing.waits = 0.0
    with mock.patch.object(pieces, "ThreadPoolExecutor", Hashing):
        written = timed(lambda: saver.save(number, training.engine.state(), NONE, no_files))
    found = {"work": Hashing.work, "waits": Hashing.waits}
    return {"written": written} | {name: 100 * s / written for name, s in found.items()}


def peer(training: Training, out: Path, number: int) -> float:
    """torch's distributed checkpoint, into a fresh folder, on disk."""

    def save() -> None:
        dcp.save(training.state(), checkpoint_id=out / f"step-{number}", no_dist=True)
        sync_tree(out)

    return timed(save)


def measure(hidden: int, repeats: int, work: Path) -> dict[str, list[float]]:
    values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}}
    config = parse({**values, "train": {"dtype": "float32"}}, "bench")
    found: dict[str, list[float]] = {}
    with world() as ranks:
        training = Training(build(model(hidden), config, ranks))
        saver = store.Saver(work / "ours", 0, alone, keep=1)
        found["bytes"] = [float(sum(t.nbytes for t in training.state().values()))]
        for number in range(repeats + 1):
            os.sync()
            once = at_once(training, work / "once", number)
            os.sync()
            later = background(training, work / "ours", number, saver)
            os.sync()
            theirs = {"DCP": peer(training, work / "dcp", number)}
            shutil.rmtree(work / "dcp")
            if number:  # the first warms caches and makes buffers
                for name, value in {**once, **later, **theirs}.items():
                    found.setdefault(name, []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for checkpoint.json and .md")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows, goals = [], []
    for hidden in (256, 512):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            found = measure(hidden, options.repeats, Path(folder))
        median = {name: statistics.median(values) for name, values in found.items()}
        size = f"{median['bytes'] / 1e6:.0f} MB"
        rows.append(
            {
                "state": size,
                "step s": median["step"],
                "call s": median["call"],
                "stall, steps": median["stall"],
                "written at once, s": median["written"],
                "GB/s": median["bytes"] / median["written"] / 1e9,
                "hashing %": median["waits"],
                "hash work %": median["work"],
                "DCP, s": median["DCP"],
            }
        )
        goals.append(Goal(f"stall in steps, {size}", median["stall"], "≤", 1))
        goals.append(Goal(f"call in steps, {size}", median["call"] / median["step"], "≤", 1))
        goals.append(Goal(f"hashing in % of a save, {size}", median["waits"], "≤", 2))
    publish("checkpoint", "Saving a training state", rows, goals, NOTES, options.out)


if __name__ == "__main__":
    main()
