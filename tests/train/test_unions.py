"""Training BAM and a union of experts: any number of ranks, annealing, resuming."""

from pathlib import Path

import pytest
import toy_run
from harness import run_ranks
from torch import distributed

from moe.errors import UserError
from moe.model.union import UnionRouter
from moe.train.schedule import annealed

UNION = {"kind": "uoe", "num_experts": 3, "top_k": 1}
SLICES = {"kind": "uoe", "num_experts": 4, "top_k": 2}
ATTENTION = [UNION, {"kind": "bam", "num_experts": 2}, {**UNION, "weights": "soft"}]
MLP = [SLICES, {**SLICES, "mode": "threshold"}, {**SLICES, "weights": "soft", "z_coef": 0.01}]
OPTIONS = ("train.anneal_steps=2", "optimizer.eps=1e-4")


@pytest.fixture(scope="module")
def unions(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("unions"), ATTENTION, MLP)


def two_ranks(toys: toy_run.Toys, out: Path) -> None:
    rank = distributed.get_rank()
    config = toys.config(out.with_name(f"{out.name}-{rank}"), *OPTIONS)
    options = {"activation_checkpointing": "full"}
    train = config.train.model_copy(update=options)
    toy_run.run(config.model_copy(update={"out": out, "train": train}))


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(unions, tmp_path):
    toy_run.run(unions.config(tmp_path / "one", *OPTIONS))
    run_ranks(two_ranks, 2, unions, tmp_path / "two")
    left, right = (toy_run.checkpoint(tmp_path / name, 4) for name in ("one", "two"))
    assert toy_run.distance(left, right) < 1e-5
    for name in ("loss", "grad_norm", "heads/balance", "experts/balance"):
        one, two = (toy_run.column(toy_run.metrics(tmp_path / n), name) for n in ("one", "two"))
        assert ((one - two) / two).abs().max() < 1e-5


def test_the_number_of_experts_comes_down(unions, tmp_path, monkeypatch):
    seen: list[int] = []
    choose = UnionRouter._choose

    def spied(router: UnionRouter, *given):
        if router.spec.num_experts == 4 and router.mode == "token_choice":
            seen.append(router.top_k)
        return choose(router, *given)

    monkeypatch.setattr(UnionRouter, "_choose", spied)
    toy_run.run(unions.config(tmp_path / "run", "train.anneal_steps=2"))
    per_step = len(seen) // 4
    assert seen == [4] * per_step + [3] * per_step + [2] * 2 * per_step
    assert [annealed(8, 2, s, 4) for s in range(6)] == [8, 6, 5, 4, 2, 2]
    assert annealed(8, 2, 0, 0) == 2


def test_a_resumed_run_ends_in_the_same_bits(unions, tmp_path):
    options = (*OPTIONS, "train.anneal_steps=4", "checkpoint.every=2", "schedule.kind=constant")
    toy_run.run(unions.config(tmp_path / "straight", *options))
    toy_run.run(unions.config(tmp_path / "half", *options, "train.steps=2", "train.anneal_steps=0"))
    resume = f"train.resume={tmp_path / 'straight'}/checkpoints/step-2"
    toy_run.run(unions.config(tmp_path / "again", *options, resume))
    straight, again, half = (
        toy_run.checkpoint(tmp_path / n, s) for n, s in (("straight", 4), ("again", 4), ("half", 2))
    )
    assert not toy_run.differing(straight, again)
    middle = toy_run.checkpoint(tmp_path / "straight", 2)
    assert toy_run.differing(middle, half), "negative control: without annealing it is another run"


@pytest.mark.slow
def test_loss_falls_and_biases_move(unions, tmp_path):
    out = tmp_path / "run"
    options = ("train.steps=30", "train.anneal_steps=15", "train.log_every=1", "optimizer.lr=3e-3")
    toy_run.run(unions.config(out, *options))
    losses = toy_run.column(toy_run.metrics(out), "loss")
    assert losses[-3:].mean() < losses[:3].mean() - 0.5
    (bias,) = (t for n, t in toy_run.checkpoint(out, 30).items() if "selection_bias" in n)
    assert bias.abs().max() > 0


def test_annealing_asks_for_a_union_and_for_time(unions, tmp_path, toys):
    with pytest.raises(UserError, match=r"train\.anneal_steps=9 exceeds train\.steps=4"):
        unions.config(tmp_path / "run", "train.anneal_steps=9")
    with pytest.raises(UserError, match="no union of experts to anneal"):
        toy_run.run(toys.config(tmp_path / "run", "train.anneal_steps=2"))


def test_a_model_that_looks_ahead_is_not_validated(tmp_path):
    toys = toy_run.make(tmp_path, None, {**SLICES, "mode": "expert_choice"})
    with pytest.raises(UserError, match=r"not causal.*Remove data\.validation"):
        toy_run.run(toys.config(tmp_path / "run", toys.validation))
    toy_run.run(toys.config(tmp_path / "other", "train.steps=1"))
