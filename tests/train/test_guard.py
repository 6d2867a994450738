"""A step that cannot be trusted is skipped by all ranks alike, and leaves no trace."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toy_run
from harness import run_ranks
from torch import distributed

from moe.checkpoint.progress import Judged
from moe.config import Guard as Settings
from moe.config import RunConfig
from moe.errors import MoeError
from moe.train import loop, starting
from moe.train.guard import FEWEST, Guard

CONSTANT = ("train.steps=4", "schedule.kind=constant", "checkpoint.every=100")
ZERO = "engine=deepspeed"
NARROW = "train.dtype=bfloat16"
# ranks: name: (overrides, what is broken, by which value)
CASES: dict[int, dict[str, tuple[tuple[str, ...], str, float]]] = {
    1: {
        "native": ((), "loss", math.nan),
        "native, narrow": ((NARROW,), "gradient", math.inf),
        "zero 0": ((ZERO, "deepspeed.stage=0"), "gradient", math.nan),
        "zero 1": ((ZERO, "deepspeed.stage=1", NARROW), "loss", math.inf),
        "zero 2": ((ZERO, "deepspeed.stage=2"), "gradient", math.nan),
        "zero 3": ((ZERO, "deepspeed.stage=3"), "loss", math.nan),
    },
    2: {
        "native": ((), "gradient", math.nan),
        "native, replicas": (("parallel.replicate=2",), "loss", math.inf),
        "native, narrow": ((NARROW,), "loss", math.nan),
        "zero 0": ((ZERO, "deepspeed.stage=0"), "loss", math.inf),
        "zero 1": ((ZERO, "deepspeed.stage=1"), "gradient", math.inf),
        "zero 1, narrow": ((ZERO, "deepspeed.stage=1", NARROW), "gradient", math.nan),
        "zero 2": ((ZERO, "deepspeed.stage=2", NARROW), "loss", math.nan),
        "zero 2, offloaded": (
            (ZERO, "deepspeed.stage=2", "deepspeed.offload=optimizer"), "gradient", math.nan,
        ),
        "zero 3": ((ZERO, "deepspeed.stage=3"), "gradient", math.nan),
        "zero 3, offloaded": (
            (ZERO, "deepspeed.stage=3", "deepspeed.offload=parameters"), "loss", math.inf,
        ),
    },
}  # fmt: skip


@contextmanager
def broken(what: str, value: float, rank: int) -> Iterator[None]:
    """The first micro-batch of a rank has a loss, or a gradient alone, of this value."""
    losses, calls = loop.token_losses, []

    def poisoned(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        here = distributed.get_rank() == rank and len(calls) == 1
        if here and what == "gradient":
            logits.register_hook(lambda gradient: gradient + value)
        found = losses(logits, batch)
        return found + value if here and what == "loss" else found

    with mock.patch.object(loop, "token_losses", poisoned):
        yield


class LeftOut:
    """A dataset without a stretch of its samples."""

    def __init__(self, dataset: Any, samples: range) -> None:
        self.dataset, self.samples = dataset, samples

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index + len(self.samples) * (index >= self.samples.start)]


def state(run: Any) -> dict[str, str]:
    """A hash of everything that a step could change."""
    tensors = {f"{e.kind}/{e.name}": toy_run.whole(e.tensor) for e in run.engine.state()}
    tensors["generator"] = torch.get_rng_state()
    for layer, load in enumerate(run.reference or ()):
        tensors |= {f"{layer}/{n}": x for n, x in zip("am", load, strict=True) if x is not None}
    held = {n: t.detach().reshape(-1).contiguous() for n, t in tensors.items()}
    return {n: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()
            for n, t in held.items()} | {"updates": str(run.engine.updates)}  # fmt: skip


def configure(toys: toy_run.Toys, out: Path, *overrides: str) -> RunConfig:
    """Every rank reads its own copy of the file: they must not write over each other's."""
    own = out.with_name(f"{out.name} of {distributed.get_rank()}")
    return toys.config(own, *CONSTANT, *overrides).model_copy(update={"out": out})


def skip_one(toys: toy_run.Toys, out: Path, case: tuple[tuple[str, ...], str, float]) -> Any:
    """Step 2 of 4 is broken: states before and after it and at the end, and at the end of a run
    without its samples.
    """
    overrides, what, value = case
    size = distributed.get_world_size()
    found: dict[str, Any] = {}
    with toy_run.opened(configure(toys, out, *overrides)) as (run, take):
        take()
        found["before"] = state(run)
        with broken(what, value, size - 1):
            taken = take()
        found |= {"after": state(run), "loads": taken.loads, "step": run.step}
        found["numbers"] = (taken.loss, taken.norm)
        found["clean"] = [(take().loss, run.guard.skipped) for _ in range(2)]
        found["end"] = state(run)
    build = starting.build_dataset

    def leave_out(*given: Any, **named: Any) -> LeftOut:
        return LeftOut(build(*given, **named), range(8, 16))

    with mock.patch.object(starting, "build_dataset", leave_out):
        config = configure(toys, out.with_name(f"{out.name}, left out"), *overrides)
        with toy_run.opened(config) as (run, take):
            found["left out"] = [take().loss for _ in range(3)]
            found["expected"] = state(run)
    return found


def skip_all(toys: toy_run.Toys, folder: Path, size: int) -> dict[str, Any]:
    return {
        name: skip_one(toys, folder / f"{size}, {name}", case) for name, case in CASES[size].items()
    }


def unguarded(toys: toy_run.Toys, folder: Path, overrides: tuple[str, ...]) -> int:
    """Tensors that are not finite after a broken step that is taken."""
    with toy_run.opened(configure(toys, folder / "unguarded", *overrides)) as (run, take):
        with broken("gradient", math.nan, 0), mock.patch.object(Guard, "judge", lambda *_: None):
            take()
        return sum(not toy_run.whole(e.tensor).isfinite().all() for e in run.engine.state())


@pytest.fixture(scope="module")
def dropping(toys, tmp_path_factory) -> toy_run.Toys:
    """A model with dropout, so that a step draws random numbers."""
    model = tmp_path_factory.mktemp("dropping") / "model"
    shutil.copytree(toys.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    return toy_run.Toys(model, toys.data)


@pytest.fixture(scope="module")
def skipped(dropping, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("skipped")
    return {n: run_ranks(skip_all, n, dropping, folder, n, timeout=400.0) for n in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(n, name) for n in CASES for name in CASES[n]])
def test_a_skipped_step_leaves_no_trace(skipped, size, name) -> None:
    for rank in skipped[size]:
        found = rank[name]
        assert found["step"] == 2 and found["loads"] is None
        assert not all(math.isfinite(x) for x in found["numbers"])
        assert math.isfinite(found["numbers"][0]) == (CASES[size][name][1] == "gradient")
        assert found["before"] == found["after"]
        assert [count for _, count in found["clean"]] == [1, 1], "no clean step is lost"
        losses = [loss for loss, _ in found["clean"]]
        assert losses == found["left out"][1:]
        assert found["end"] == found["expected"]
        assert found["end"] != found["after"], "the control"
    assert len({json.dumps(rank[name]["numbers"]) for rank in skipped[size]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), (ZERO, "deepspeed.stage=0")])
def test_without_the_guard_nothing_is_left_of_the_weights(dropping, tmp_path, overrides) -> None:
    """Negative control."""
    assert run_ranks(unguarded, 1, dropping, tmp_path, overrides)[0] > 20


def test_run_reports_the_samples_and_their_documents_and_goes_on(toys, tmp_path) -> None:
    out = tmp_path / "run"
    config = toys.config(out, "train.steps=4", "checkpoint.every=2", "train.log_every=2")
    step, number = loop.Run.train_step, []

    def poisoned(self: loop.Run, batches: Any) -> Any:
        number.append(1)
        with ExitStack() as stack:
            if len(number) in (2, 3):
                stack.enter_context(broken("loss", math.nan, 0))
            return step(self, batches)

    with mock.patch.object(loop.Run, "train_step", poisoned):
        printed = toy_run.run(config)
    said = "step      2  skipped: loss is nan; samples 8 to 15, not finite in 8, 9, from "
    assert said + str(toys.data) in printed
    lines = [json.loads(x, parse_constant=pytest.fail) for x in
             (out / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert lines[0]["skipped"] == "loss is nan" and lines[0]["suspects"] == [8, 9]
    assert lines[0]["samples"] == list(range(8, 16)) and "loss" in lines[2]
    with toy_run.opened(config) as (run, _):
        assert run.guard.skipped == 2
        documents = run.dataset.dataset
        for origin in lines[1]["origins"]:
            text = torch.cat([torch.tensor(documents[d].astype(int)) for d in origin["documents"]])
            tokens = run.dataset[origin["sample"]]["tokens"]
            windows = text.unfold(0, len(tokens), 1)
            assert (windows == tokens).all(1).any(), "they hold the sample"


def test_skips_and_window_survive_a_resume(toys, tmp_path) -> None:
    """The third of three in a row comes after the restart."""
    out = tmp_path / "run"
    options = ("checkpoint.every=1", "guard.consecutive=3")
    with mock.patch.object(loop, "token_losses", lambda logits, batch: logits.sum() * math.nan):
        toy_run.run(toys.config(out, "train.steps=2", *options))
        with pytest.raises(MoeError, match=r"step 1: samples 0 to 7; step 2: .*; step 3: samples"):
            toy_run.run(toys.config(out, "train.steps=4", *options))


def test_a_blend_knows_the_documents_of_its_samples(toys, tmp_path) -> None:
    part = f"{{path: {toys.data}}}, {{path: {toys.data}-validation}}"
    with toy_run.opened(toys.config(tmp_path / "run", f"data.train=[{part}]")) as (run, _):
        found = [run.dataset.origin(i) for i in range(8)]
        assert {o["source"] for o in found} == {str(toys.data), f"{toys.data}-validation"}
        assert all(o["documents"] for o in found)


NOISE = [(3.0 + 0.01 * (i % 5), 1.0 + 0.1 * (i % 3)) for i in range(FEWEST)]


def judged(*after: tuple[float, float], before: Any = NOISE, **settings: Any) -> list[bool]:
    """Which of these (loss, norm) are skipped after quiet steps."""
    guard = Guard(Settings(**settings))
    assert not any(guard.judge(*step) for step in before)
    return [guard.judge(*step) is not None for step in after]


def test_spikes_are_skipped_where_they_are_looked_for() -> None:
    spikes = ((3.2, 1.1), (3.02, 2.0), (3.02, 1.1), (1.0, 0.1))
    assert judged(*spikes, spike=4.0) == [True, True, False, False], "what falls is no spike"
    assert judged(*spikes) == [False] * 4
    assert judged((3.2, 1.1), spike=100.0) == [False]
    assert judged((3.2, 1.1), before=NOISE[1:], spike=4.0) == [False], "too few to say"
    assert judged((math.nan, 1.0), before=[], spike=4.0) == [True]


def test_nothing_bad_enters_the_window() -> None:
    """After any number of bad steps a clean one is clean, and a spike one."""
    many = [(math.inf, math.nan)] * 3 + [(9.0, 9.0)] * 4
    assert judged(*many, (3.02, 1.1), (3.2, 1.1), spike=4.0) == [True] * 7 + [False, True]
    settings = Settings(spike=4.0)
    guard = Guard(settings)
    for step in NOISE:
        guard.judge(*step)
    again = Guard(settings)
    again.restore(Judged.model_validate_json(guard.state().model_dump_json()))
    assert again.state() == guard.state()
    assert again.judge(3.2, 1.1) == guard.judge(3.2, 1.1) is not None
    fresh = Guard(settings)
    assert fresh.judge(3.2, 1.1) is None, "the control"


def test_a_run_with_a_spike_goes_on_without_it(toys, tmp_path) -> None:
    out = tmp_path / "run"
    options = ("train.steps=20", "guard.spike=6", "optimizer.lr=1e-5", "checkpoint.every=100")
    step, number = loop.Run.train_step, []

    def poisoned(self: loop.Run, batches: Any) -> Any:
        number.append(1)
        with ExitStack() as stack:
            if len(number) == 18:
                stack.enter_context(broken("loss", 100.0, 0))
            return step(self, batches)

    with mock.patch.object(loop.Run, "train_step", poisoned):
        printed = toy_run.run(toys.config(out, *options))
    assert "step     18  skipped: loss " in printed and printed.count("skipped") == 1
    assert [line["step"] for line in toy_run.metrics(out)] == [*range(1, 18), 19, 20]
