"""Training BAM and a union of experts: any number of ranks, annealing, resuming."""

import json
from pathlib import Path
from unittest import mock

import pytest
import toy_run
from harness import run_ranks
from tiny import dense_model, routed_model
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


def test_annealing_begins_with_the_dense_model(unions, tmp_path):
    """All slices with weight 1: an output scale for some of them would be wrong for all."""
    scaled = {**SLICES, "output_scale": 2.0}
    router = routed_model(dense_model(), None, scaled).model.layers[0].mlp.router
    assert router.output_scale == 2.0
    scales = []
    for top_k in (4, 3, 2):
        router.use(top_k)
        scales.append(router.output_scale)
    assert scales == [1.0, 1.5, 2.0]
    threshold = routed_model(dense_model(), None, {**scaled, "mode": "threshold"})
    router = threshold.model.layers[0].mlp.router
    router.use(4)
    assert (router.top_k, router.output_scale) == (2, 2.0)


def test_validation_is_of_the_model_that_is_saved(unions, tmp_path):
    options = ("train.anneal_steps=4", "eval.every=2", "checkpoint.every=2", unions.validation)
    toy_run.run(unions.config(tmp_path / "annealed", *options))
    resume = f"train.resume={tmp_path / 'annealed'}/checkpoints/step-2"
    config = unions.config(tmp_path / "plain", unions.validation, "train.anneal_steps=0", resume)
    lines = (tmp_path / "annealed/metrics.jsonl").read_text().splitlines()
    values = [m["validation_loss"] for m in map(json.loads, lines) if "validation_loss" in m]
    with toy_run.opened(config) as (saved, _):
        assert saved.step == 2
        assert abs(saved.validate() - values[0]) < 1e-6
        for router in saved.unions:  # negative control: what the next step would train
            router.use(annealed(router.spec.num_experts, router.spec.top_k, 2, 4))
        with mock.patch.object(UnionRouter, "use"):
            assert abs(saved.validate() - values[0]) > 1e-5


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
