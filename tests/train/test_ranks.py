"""Any number of ranks, in any mesh, sees the same samples and computes the same numbers."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from harness import RankFailed, run_ranks
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule

from moe.checkpoint import pieces, store
from moe.config import RunConfig
from moe.engines.native import NativeEngine
from moe.train import loop

# a larger eps: without it Adam turns the sign of a gradient that is rounding alone into a step
OPTIONS = ("train.steps=4", "checkpoint.every=2", "optimizer.eps=1e-4")
CLOSE = 1e-5  # float32 sums in another order, relative to each tensor's largest value
NARROW = "train.dtype=bfloat16"
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "plain": (),
        "narrow": (NARROW,),
        "frozen": ("train.trainable=['*.experts.*', '*.router.*']",),
    },
    2: {
        "plain": ("train.activation_checkpointing=full",),
        "narrow": (NARROW,),
        "frozen": ("train.trainable=['*.experts.*', '*.router.*']", "parallel.replicate=2"),
    },
    4: {
        "plain": (),
        "narrow": (NARROW, "parallel.replicate=2"),
        "plain, two replicas": ("parallel.replicate=2",),
    },
}


def out_of(folder: Path, ranks: int, case: str) -> Path:
    return folder / f"{ranks} {case}"


def configure(toys: toy_run.Toys, out: Path, *overrides: str) -> RunConfig:
    """Every rank reads its own copy of the file: they must not write over each other's."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    options = (*OPTIONS, toys.validation, "eval.every=4", "eval.sequences=7")
    config = toys.config(out.with_name(f"{out.name} of {rank}"), *options, *overrides)
    return config.model_copy(update={"out": out})


def train_case(toys: toy_run.Toys, folder: Path, ranks: int, case: str, *more: str) -> list[Any]:
    """Run one case; the tokens of this rank's first step, a list per micro-batch."""
    seen: list[Any] = []
    forward = NativeEngine.forward

    def spied(self: NativeEngine, **inputs: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return forward(self, **inputs)

    overrides = CASES[ranks].get(case, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeEngine, "forward", spied)
        toy_run.run(configure(toys, out_of(folder, ranks, case), *overrides, *more))
    return seen[: 4 // ranks]


def average_gradients(patch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: the mean over ranks of gradients that are to be added."""
    divide = FSDPModule.set_gradient_divide_factor
    patch.setattr(
        FSDPModule,
        "set_gradient_divide_factor",
        lambda module, factor: divide(module, 2.0 * factor),
    )


def normalise_per_rank(patch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: every micro-batch of every rank weighs the same."""
    losses = loop.token_losses

    def own_mean(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return losses(logits, batch) * batch["loss_mask"].mean().reciprocal()

    patch.setattr(loop, "token_losses", own_mean)


WRONG = {"averaged": average_gradients, "normalised per rank": normalise_per_rank}


class Stopped(BaseException):
    """What stands for the scheduler that ends a job."""


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    save = loop.Run.save

    def stop(self: loop.Run) -> None:
        save(self)
        if self.step == step:
            raise Stopped

    patch.setattr(loop.Run, "save", stop)


def die_in_the_middle(path: Path, *_: Any) -> None:
    path.write_bytes(b"\0" * 100)
    os.kill(os.getpid(), signal.SIGKILL)


def two_ranks(toys: toy_run.Toys, folder: Path) -> None:
    """All that two ranks do, in one spawn; what they find is left in the folder."""
    rank = distributed.get_rank()
    samples = [train_case(toys, folder, 2, case) for case in CASES[2]]
    (folder / f"samples of 2, {rank}.json").write_text(json.dumps(samples))
    for name, breaks in WRONG.items():
        with pytest.MonkeyPatch.context() as patch:
            breaks(patch)
            train_case(toys, folder, 2, name)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        for case in ("stopped", "killed"):
            with pytest.raises(Stopped):
                train_case(toys, folder, 2, case, "train.activation_checkpointing=full")
    train_case(toys, folder, 2, "stopped", "train.activation_checkpointing=full")
    (folder / f"done of {rank}").touch()
    if rank == 1:
        pieces.write = die_in_the_middle
    train_case(toys, folder, 2, "killed")


def four_ranks(toys: toy_run.Toys, folder: Path) -> None:
    rank = distributed.get_rank()
    samples = [train_case(toys, folder, 4, case) for case in CASES[4]]
    (folder / f"samples of 4, {rank}.json").write_text(json.dumps(samples))
    resume = f"train.resume={out_of(folder, 2, 'plain')}/checkpoints/step-2"
    train_case(toys, folder, 4, "from two", resume)


@pytest.fixture(scope="module")
def runs(toys, tmp_path_factory) -> Path:
    """The folder of all runs on one, two and four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    samples = [train_case(toys, folder, 1, case) for case in CASES[1]]
    (folder / "samples of 1, 0.json").write_text(json.dumps(samples))
    with pytest.raises(RankFailed) as failure:
        run_ranks(two_ranks, 2, toys, folder)
    assert (folder / "done of 0").exists(), failure.value
    assert (folder / "done of 1").exists(), failure.value
    run_ranks(four_ranks, 4, toys, folder)
    resume = f"train.resume={out_of(folder, 2, 'plain')}/checkpoints/step-2"
    train_case(toys, folder, 1, "from two", resume)
    return folder


def disagreements(left: Path, right: Path, tolerance: float, first: int = 1) -> list[str]:
    """Metrics and tensors of the last checkpoint in which two runs differ, with the worst error."""
    found = {}
    lines = [[m for m in toy_run.metrics(out) if m["step"] >= first] for out in (left, right)]
    for name in ("step", "loss", "grad_norm", "lr", "tokens", "heads/balance", "experts/balance"):
        values = [toy_run.column(side, name) for side in lines]
        found[name] = float(((values[0] - values[1]) / values[1].clamp(min=1e-9)).abs().max())
    validated = [toy_run.validation(out) for out in (left, right)]
    found["validation"] = abs(validated[0] / validated[1] - 1)
    tensors = [toy_run.checkpoint(out, 4) for out in (left, right)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        found[name] = toy_run.distance({name: value}, {name: tensors[1][name]})
    return [f"{name}: {error:.1e}" for name, error in found.items() if not error <= tolerance]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_samples_of_a_step(runs, ranks) -> None:
    alone = json.loads((runs / "samples of 1, 0.json").read_text())[0]
    assert len(alone) == 4
    parts = [json.loads((runs / f"samples of {ranks}, {r}.json").read_text()) for r in range(ranks)]
    for case in range(len(parts[0])):
        in_turn = [micro for turn in zip(*(p[case] for p in parts), strict=True) for micro in turn]
        assert in_turn == alone
        assert parts[0][case] != parts[1][case], "each has its own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "case"), [(2, "plain"), (2, "frozen"), (4, "plain"), (4, "plain, two replicas")]
)
def test_ranks_compute_what_one_rank_computes(runs, ranks, case) -> None:
    alone = out_of(runs, 1, case.partition(",")[0])
    assert not disagreements(out_of(runs, ranks, case), alone, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_in_bfloat16_stay_near(runs, ranks) -> None:
    lines = [toy_run.metrics(out_of(runs, n, "narrow")) for n in (ranks, 1)]
    for name, tolerance in (("loss", 5e-3), ("grad_norm", 5e-2)):
        many, one = (toy_run.column(side, name) for side in lines)
        assert torch.allclose(many, one, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_sums_over_ranks_are_noticed(runs, wrong) -> None:
    """Negative controls."""
    found = disagreements(out_of(runs, 2, wrong), out_of(runs, 1, "plain"), CLOSE)
    assert any("grad_norm" in line for line in found)
    assert any("exp_avg/" in line for line in found)


@pytest.mark.slow
def test_two_ranks_stopped_and_resumed_end_in_the_same_bits(runs) -> None:
    stopped, straight = out_of(runs, 2, "stopped"), out_of(runs, 2, "plain")
    assert not toy_run.differing(toy_run.checkpoint(stopped, 4), toy_run.checkpoint(straight, 4))
    assert not disagreements(stopped, straight, 0.0)
    assert disagreements(out_of(runs, 4, "plain"), straight, 0.0), "negative control"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_checkpoint_of_two_ranks_is_taken_up_by_others(runs, ranks) -> None:
    taken = out_of(runs, ranks, "from two")
    assert [line["step"] for line in toy_run.metrics(taken)] == [3, 4]
    assert not disagreements(taken, out_of(runs, 2, "plain"), CLOSE, first=3)
    names = sorted(p.name for p in (taken / "checkpoints" / "step-4").glob("rank-*"))
    assert names == [f"rank-{rank:05}.safetensors" for rank in range(ranks)]


@pytest.mark.slow
def test_rank_killed_while_saving_leaves_the_checkpoint_before(toys, runs) -> None:
    out = out_of(runs, 2, "killed")
    latest, whole, partial = sorted((out / "checkpoints").iterdir())
    assert (latest.name, whole.name) == ("latest", "step-2")
    assert partial.name.startswith("step-4.") and partial.name.endswith(".partial")
    assert store.latest(out) == out / "checkpoints" / "step-2"
    assert not store.is_checkpoint(partial)
    toy_run.run(configure(toys, out))
    assert not disagreements(out, out_of(runs, 2, "plain"), CLOSE)
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["latest", "step-2", "step-4"]
