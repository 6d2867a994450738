"""2N steps at one go are N steps, SIGKILL, and N steps: to the last bit, in any engine."""

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toy_run
from harness import run_ranks
from moments import Ranks
from torch import distributed

from moe.checkpoint import store
from moe.train import loop
from moe.train.guard import Generators

pytestmark = pytest.mark.slow
OPTIONS = ("train.steps=4", "checkpoint.every=2", "checkpoint.asynchronous=false",
           "schedule.warmup_steps=1", "eval.every=2",
           "eval.sequences=4", "train.selection_bias_rate=0.01")  # fmt: skip
ZERO = "engine=deepspeed"
NARROW = "train.dtype=bfloat16"
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "native": (),
        "native, narrow": (NARROW, "guard.spike=50"),
        "annealed": ("train.anneal_steps=3",),
        "zero 2": (ZERO, "deepspeed.stage=2"),
    },
    2: {
        "native": (),
        "experts apart, narrow": ("parallel.expert=2", NARROW),
        "annealed": ("train.anneal_steps=3",),
        "zero 0": (ZERO, "deepspeed.stage=0"),
        "zero 1, narrow": (ZERO, "deepspeed.stage=1", NARROW),
        "zero 3": (ZERO, "deepspeed.stage=3"),
    },
}
UNION = {"kind": "uoe", "num_experts": 4, "top_k": 2}
MIXTURE = {"kind": "moe", "num_experts": 4, "top_k": 2, "selection_bias": True,
           "balance_scope": "global"}  # fmt: skip
Models = dict[str, toy_run.Toys]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """A mixture and a union of experts, both with dropout in their attention."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "mixture": toy_run.make(folder / "mixture", toy_run.ATTENTION, MIXTURE),
        "union": toy_run.make(folder / "union", {**UNION, "num_experts": 3}, UNION),
    }
    for toys in made.values():
        path = toys.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.2}))
    return made


def overrides(models: Models, case: str, size: int) -> tuple[toy_run.Toys, tuple[str, ...]]:
    toys = models["union" if case == "annealed" else "mixture"]
    return toys, (*OPTIONS, toys.validation, *CASES[size][case])


def train_to_the_end(models: Models, outs: dict[str, Path], size: int) -> dict[str, Any]:
    """Per case the samples that this rank saw in each step, and where its generators end."""
    found = {}
    for case, out in outs.items():
        toys, given = overrides(models, case, size)
        own = out.with_name(f"{out.name} of {distributed.get_rank()}")
        config = toys.config(own, *given).model_copy(update={"out": out})
        seen: dict[int, list[str]] = {}
        forward = loop.Run._forward

        def spied(self: loop.Run, batch: dict[str, torch.Tensor], forward=forward, seen=seen):
            if torch.is_grad_enabled():
                tokens = batch["tokens"].numpy().tobytes()
                seen.setdefault(self.step, []).append(hashlib.sha256(tokens).hexdigest())
            return forward(self, batch)

        with mock.patch.object(loop.Run, "_forward", spied):
            toy_run.run(config)
        state = Generators(torch.device("cpu")).cpu
        found[case] = {"seen": seen, "generator": state.tolist()}
    return found


def hashes(out: Path, step: int) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in toy_run.checkpoint(out, step).items()
    }


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in found]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    """`SIZE, CASE` ran at one go, `SIZE, CASE, killed` in two; `SIZE.json` is what ranks saw."""
    folder = tmp_path_factory.mktemp("exact")
    for size, cases in CASES.items():
        straight = {case: folder / f"{size}, {case}" for case in cases}
        killed = {case: folder / f"{size}, {case}, killed" for case in cases}
        at_one_go = run_ranks(train_to_the_end, size, models, straight, size, timeout=300.0)
        for case, out in killed.items():
            toys, given = overrides(models, case, size)
            place = folder / f"ranks of {out.name}"
            with Ranks(toys.write(out), place, *given, moment="kill step 3", size=size) as ranks:
                codes = [code for code, _, said in ranks.finish()]
            # those that the first leaves behind may say so before they are killed too
            assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}, ranks.said()
            assert store.latest(out).name == "step-2"
        resumed = run_ranks(train_to_the_end, size, models, killed, size, timeout=300.0)
        (folder / f"{size}.json").write_text(json.dumps([at_one_go, resumed]))
    return folder


@pytest.mark.parametrize(("size", "case"), [(n, case) for n in CASES for case in CASES[n]])
def test_a_killed_run_ends_in_the_same_bits(folder, size, case) -> None:
    straight, killed = folder / f"{size}, {case}", folder / f"{size}, {case}, killed"
    found, expected = hashes(killed, 4), hashes(straight, 4)
    assert found == expected
    kinds = {name.split("/")[0] for name in found}
    assert kinds >= {"parameter", "exp_avg", "exp_avg_sq"}
    if case != "annealed":
        assert any("selection_bias" in name for name in found)
        start = hashes(straight, 2)
        assert {n: h for n, h in start.items() if "selection_bias" in n} != {
            n: h for n, h in expected.items() if "selection_bias" in n
        }
    assert lines(killed) == lines(straight)
    assert [line["step"] for line in lines(killed)] == [1, 2, 2, 3, 4, 4], "validation too"
    at_one_go, resumed = json.loads((folder / f"{size}.json").read_text())
    for before, after in zip(at_one_go, resumed, strict=True):
        assert before[case]["generator"] == after[case]["generator"]
        seen = before[case]["seen"]
        assert len({tuple(s) for s in seen.values()}) == 4 and list(after[case]["seen"]) == [
            "2",
            "3",
        ]
        assert {k: seen[k] for k in ("2", "3")} == after[case]["seen"]
    assert hashes(straight, 2) != expected, "the control"


def forget_generators(models: Models, out: Path) -> None:
    toys, given = overrides(models, "native", 1)
    config = toys.config(out, *given)
    with mock.patch.object(torch, "set_rng_state"):
        toy_run.run(config)


def test_a_resume_without_its_generators_ends_elsewhere(models, folder, tmp_path) -> None:
    """Negative control."""
    out = tmp_path / "run"
    shutil.copytree(folder / "1, native", out)
    shutil.rmtree(out / "checkpoints" / "step-4")
    forget_generators(models, out)
    assert hashes(out, 4) != hashes(folder / "1, native", 4)


def test_on_other_ranks_it_is_said_that_dropout_differs(models, folder, tmp_path) -> None:
    printed = {}
    for size in (1, 2):
        out = tmp_path / str(size)
        shutil.copytree(folder / f"{size}, native", out)
        shutil.rmtree(out / "checkpoints" / "step-4")
        toys, given = overrides(models, "native", 1)
        printed[size] = toy_run.run(toys.config(out, *given))
    said = "dropout masks differ from those of the 2 ranks that wrote it"
    assert said in printed[2] and "dropout" not in printed[1]


CHANGES = {
    "seed=7": "seed 0 -> 7",
    "optimizer.betas=[0.8, 0.9]": "optimizer.betas [0.9, 0.95] -> [0.8, 0.9]",
    "schedule.kind=linear": "schedule.kind cosine -> linear",
    "parallel.timeout=60": "parallel.timeout 1800.0 -> 60.0",
    "train.clip=null": "train.clip 1.0 -> None",
    "guard.spike=9": "guard.spike None -> 9.0",
    "train.time_limit=900": "train.time_limit None -> 900.0",
    "train.micro_batch_size=4": "train.micro_batch_size 2 -> 4",
    "checkpoint.keep=1": "checkpoint.keep 3 -> 1",
    "eval.sequences=2": "eval.sequences 4 -> 2",
    "deepspeed.stage=3": "deepspeed.stage 1 -> 3",
}


def test_every_key_that_has_changed_is_said(models, folder, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(folder / "1, native", out)
    toys, given = overrides(models, "native", 1)
    printed = toy_run.run(toys.config(out, *given, *CHANGES))
    for said in CHANGES.values():
        assert f"changed since then: {said}\n" in printed
    assert printed.count("changed since then") == len(CHANGES)
    again = toy_run.run(toys.config(out, *given))
    assert "changed since then" not in again, "the control: nothing was saved meanwhile"
