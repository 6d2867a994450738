"""A suite of tasks while training: what the saved model says, and a run that does not notice."""

import gc
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
import toy_run
import toy_tasks
from harness import run_ranks
from moments import Ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.errors import UserError
from moe.evals import live
from moe.evals.adapter import MoeLM
from moe.evals.harness import Prompting, ask, load
from moe.evals.run import find_tasks
from moe.train.guard import Generators

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
ATTENTION = [{**tiny.MOH, "shared_heads": [0, 5]}, {"kind": "dense"}, tiny.TWO_STAGE]
MLP = [
    {**tiny.MOE, "shared_intermediate_size": 16},
    {"kind": "uoe", "num_experts": 4, "top_k": 2},
    {**tiny.MOE, "selection_bias": True},
]
CASES = {
    "sharded": (),
    "experts": ("parallel.expert=2", "train.anneal_steps=3"),
    "tensor": ("parallel.tensor=2",),
    "narrow": ("train.dtype=bfloat16",),
    "zero 3": ("engine=deepspeed", "deepspeed.stage=3"),
}
STEPS = 3


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    """A model that draws in training."""
    folder = tmp_path_factory.mktemp("toys")
    return toy_run.make(folder, ATTENTION, MLP, attention_dropout=0.2, **SIZES)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return toy_tasks.write(tmp_path_factory.mktemp("suite") / "own")


def train(toys: toy_run.Toys, out: Path, suite: Path | None, *overrides: str) -> list[Any]:
    """What the model has answered at steps 2 and 3, if it was asked."""
    own = [] if suite is None else [f"eval.suite={suite}", "eval.suite_every=2"]
    own_file = out.with_name(f"{out.name} of {os.getpid()}")
    config = toys.config(own_file, f"train.steps={STEPS}", *own, *overrides)
    found = []

    def listen(*given: Any) -> Any:
        result = ask(*given)
        found.append(answers(result))
        return result

    with mock.patch.object(live, "ask", listen):
        toy_run.run(config.model_copy(update={"out": out}))
    return found


def answers(result: Any) -> dict[tuple[str, int], Any]:
    return {
        (task, sample["doc_id"]): sample["resps"]
        for task, samples in result["samples"].items()
        for sample in samples
    }


def of_checkpoint(out: Path, suite: Path) -> dict[tuple[str, int], Any]:
    """What the model says once it is saved, with `moe eval`'s adapter."""
    tasks = find_tasks(toy_tasks.TASKS, suite.parent, None)
    lm = MoeLM(out / "checkpoints" / f"step-{STEPS}", 4)
    return answers(ask(lm, load(toy_tasks.TASKS, tasks), None, Prompting()))


def same(left: dict[Any, Any], right: dict[Any, Any], rel: float) -> None:
    """Texts and choices are the same, likelihoods as close as this."""
    assert left.keys() == right.keys() and len(left) == len(toy_tasks.TASKS) * toy_tasks.ITEMS
    for key, value in left.items():
        if key[0] == "toy_say":
            assert value == right[key], key
        else:
            numbers = [torch.tensor(x, dtype=torch.float64) for x in (value, right[key])]
            torch.testing.assert_close(*numbers, rtol=rel, atol=1e-4, msg=str(key))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_does_not_notice(toys, suite, tmp_path) -> None:
    """Weights, moments, losses and random states are those of a run that was never asked."""
    states = []
    for name, asked in (("plain", None), ("asked", suite)):
        random.seed(5)
        np.random.seed(6)
        found = train(toys, tmp_path / name, asked)
        states.append((random.getstate(), np.random.get_state()[1].tolist()))
    assert len(found) == 2
    plain, asked = (toy_run.checkpoint(tmp_path / n, STEPS) for n in ("plain", "asked"))
    assert toy_run.differing(plain, asked) == []
    assert states[0] == states[1]
    losses = [toy_run.column(toy_run.metrics(tmp_path / n), "loss") for n in ("plain", "asked")]
    assert torch.equal(*losses)
    same(found[-1], of_checkpoint(tmp_path / "asked", suite), 1e-5)
    assert found[0] != found[-1], "nothing was learnt between: nothing is tested"
    reported = {x["step"]: x["evaluation"] for x in lines(tmp_path / "asked") if "evaluation" in x}
    assert reported.keys() == {2, 3} and reported[3].keys() == toy_tasks.METRICS
    assert reported[3]["toy_choice/acc"]["error"] is not None
    board = EventAccumulator(str(tmp_path / "asked" / "tensorboard")).Reload()
    for name, measured in reported[3].items():
        scalars = board.Scalars(f"evaluation/{name}")
        assert [s.step for s in scalars] == [2, 3]
        assert scalars[-1].value == pytest.approx(measured["value"], rel=1e-6)


def test_without_its_random_states_it_would(toys, suite, tmp_path) -> None:
    """Negative control: the harness sets them, and dropout draws."""
    train(toys, tmp_path / "plain", None)
    with mock.patch.object(Generators, "restore"):
        train(toys, tmp_path / "asked", suite)
    plain, asked = (toy_run.checkpoint(tmp_path / n, STEPS) for n in ("plain", "asked"))
    assert toy_run.differing(plain, asked)


def held() -> int:
    """Tensors that are alive."""
    gc.collect()
    return sum(torch.is_tensor(o) for o in gc.get_objects())


@pytest.mark.parametrize("leaking", [False, True])
def test_nothing_of_an_evaluation_stays(leaking, toys, suite, tmp_path) -> None:
    """No tensor, and no request; the count does see logits that somebody keeps."""
    grown, kept = [], []
    measure, call = live.Suite.measure, live.Live.__call__

    def counted(self: live.Suite, *given: Any) -> Any:
        before = held()
        found = measure(self, *given)
        grown.append(held() - before)
        assert all(t._instances is None for t in self.loaded["tasks"].values())
        return found

    def keeping(self: live.Live, input_ids: torch.Tensor) -> Any:
        logits = call(self, input_ids)
        if leaking:
            kept.append(logits)
        return logits

    patches = mock.patch.object(live.Suite, "measure", counted)
    with patches, mock.patch.object(live.Live, "__call__", keeping):
        train(toys, tmp_path / "run", suite)
    assert len(grown) == 2 and (min(grown) > 10 if leaking else grown == [0, 0]), grown


def on_two(toys: toy_run.Toys, folder: Path, suite: Path) -> dict[str, list[Any]]:
    found = {}
    for name, overrides in CASES.items():
        train(toys, folder / f"plain {name}", None, *overrides)
        found[name] = train(toys, folder / name, suite, *overrides)
    return found


def test_every_engine_and_mesh_in_step(toys, suite, tmp_path) -> None:
    """Uneven requests, generation of uneven length, two ranks, one spawn."""
    first, second = run_ranks(on_two, 2, toys, tmp_path, suite, timeout=420)
    for name in CASES:
        plain, asked = (toy_run.checkpoint(tmp_path / n, STEPS) for n in (f"plain {name}", name))
        assert toy_run.differing(plain, asked) == [], name
        assert first[name] == second[name] and len(first[name]) == 2, name
        # bfloat16 computes in it here, and what is saved is float32
        if name != "narrow":
            same(first[name][-1], of_checkpoint(tmp_path / name, suite), 1e-4)


def test_it_leaves_within_a_forward_pass(toys, suite, tmp_path) -> None:
    """Real ranks, a real signal to one of them; what was due is done when the run goes on."""
    out = tmp_path / "run"
    config = toys.write(out)
    options = (f"train.steps={STEPS}", f"eval.suite={suite}", "eval.suite_every=2")
    with Ranks(config, tmp_path / "ranks", *options, moment="evaluation") as ranks:
        ranks.wait_until_there()
        ranks.signal([1], signal.SIGTERM)
        ranks.let_go()
        ends = ranks.finish()
    assert [code for code, _, _ in ends] == [85, 85], ends
    assert (out / "checkpoints" / "step-2").is_dir()
    assert not any("evaluation" in line for line in lines(out))
    with Ranks(config, tmp_path / "again", *options) as ranks:
        ends = ranks.finish(timeout=120)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [x["step"] for x in lines(out) if "evaluation" in x] == [2, 3]
    with Ranks(toys.write(tmp_path / "straight"), tmp_path / "third", *options) as ranks:
        ranks.finish(timeout=120)
    straight = [x for x in lines(tmp_path / "straight") if "evaluation" in x]
    assert [x for x in lines(out) if "evaluation" in x] == straight


def test_what_cannot_be_answered_is_said_before_the_model_is_loaded(toys, suite, tmp_path) -> None:
    def refused(*overrides: str, model: Path | None = None) -> str:
        name = tmp_path / f"run {len(list(tmp_path.iterdir()))}"
        config = toys.config(name, *overrides)
        with (
            mock.patch("moe.train.loop.load_model", side_effect=AssertionError),
            pytest.raises(UserError) as error,
        ):
            toy_run.run(config.model_copy(update={"model": model or toys.model}))
        return str(error.value)

    assert "suite smok: there is none" in refused("eval.suite=smok")
    assert "from a data folder" in refused("eval.suite=smoke")
    assert "does not exist: put" in refused("eval.suite=smoke", f"eval.data={tmp_path}")
    drawn = suite.parent / "drawn.yaml"
    drawn.write_text(toy_tasks.of_tasks(exact_match="drawn_say"))
    task = (
        (suite.parent / "toy_say.yaml").read_text().replace("do_sample: false", "do_sample: true")
    )
    (suite.parent / "drawn_say.yaml").write_text(task.replace("toy_say", "drawn_say"))
    assert "task drawn_say draws its answers" in refused(f"eval.suite={drawn}")
    bare = Path(shutil.copytree(toys.model, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "has no tokenizer" in refused(f"eval.suite={suite}", model=bare)
