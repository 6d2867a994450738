"""One run and one checkpoint for all engines: what one has begun, another goes on with."""

from pathlib import Path

import pytest
import tiny
import toy_run
from harness import run_ranks
from test_ranks import CLOSE, configure, disagreements, out_of, train_case

from moe.engines import deepspeed
from moe.parallel.world import world

pytestmark = pytest.mark.slow
MLP = [
    {**tiny.MOE, "shared_intermediate_size": 16, "z_coef": 0.01},
    {"kind": "uoe", "num_experts": 4, "top_k": 2},
    {**tiny.MOE, "selection_bias": True, "balance_scope": "global"},
]
FROZEN = "train.trainable=['*.experts.*', '*.router.*', '*norm*']"


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return "engine=deepspeed", f"deepspeed.stage={stage}", *more


CASES = {
    "zero 1": zero(1, "parallel.expert=2"),
    "zero 3": zero(3),
    "zero 0": zero(0, "parallel.expert=2", "train.activation_checkpointing=full"),
    "narrow 2": zero(2, "parallel.expert=2", "train.dtype=bfloat16"),
    "narrow 3": zero(3, "train.dtype=bfloat16"),
    "frozen 2": zero(2, FROZEN, "train.dtype=bfloat16"),
    "frozen 3": zero(3, FROZEN),
    "native": ("parallel.expert=2",),
}
# where a checkpoint comes from, what reads it
MOVES = {
    "native to zero 2": ("native", zero(2, "deepspeed.offload=optimizer", "parallel.expert=2")),
    "zero 1 to zero 3": ("zero 1", zero(3, "deepspeed.offload=parameters")),
    "zero 3 to native": ("zero 3", ("parallel.expert=2",)),
    "zero 3 to zero 0": ("zero 3", zero(0)),
    "narrow to zero 1": ("narrow 2", zero(1, "train.dtype=bfloat16")),
    "narrow 3 to native": ("narrow 3", ("train.dtype=bfloat16",)),
    "frozen to frozen 3": ("frozen 2", zero(3, FROZEN)),
}


def carry(toys: toy_run.Toys, folder: Path, size: int, name: str) -> None:
    """Load step 2 of a case in another engine and save it there: nothing but the way is new."""
    from moe.train.loop import Run

    source, overrides = MOVES[name]
    resume = f"train.resume={out_of(folder, 2, source)}/checkpoints/step-2"
    with world() as ranks:
        out = out_of(folder, size, f"carried {name}")
        run = Run(configure(toys, out, *overrides, resume), ranks)
        run.save()
        run.finish_saving()


def on_two(toys: toy_run.Toys, folder: Path) -> None:
    for name, overrides in CASES.items():
        train_case(toys, folder, 2, name, *overrides)
    for name, (source, overrides) in MOVES.items():
        resume = f"train.resume={out_of(folder, 2, source)}/checkpoints/step-2"
        carry(toys, folder, 2, name)
        train_case(toys, folder, 2, name, *overrides, resume)
    lost = zero(1, f"train.resume={out_of(folder, 2, 'zero 1')}/checkpoints/step-2")
    put = deepspeed.Held.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.Held, "put", lambda e, t: e.kind == "parameter" and put(e, t))
        train_case(toys, folder, 2, "moments lost", *lost)


def on_four(toys: toy_run.Toys, folder: Path) -> None:
    resume = f"train.resume={out_of(folder, 2, 'zero 1')}/checkpoints/step-2"
    train_case(toys, folder, 4, "zero 2", *zero(2, "parallel.expert=4"), resume)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    toys = toy_run.make(folder, toy_run.ATTENTION, MLP)
    train_case(toys, folder, 1, "plain")
    train_case(toys, folder, 1, "narrow", "train.dtype=bfloat16")
    train_case(toys, folder, 1, "frozen 3", FROZEN)
    run_ranks(on_two, 2, toys, folder, timeout=600)
    run_ranks(on_four, 4, toys, folder, timeout=300)
    return folder


@pytest.mark.parametrize("name", ["zero 0", "zero 1", "zero 3", "native"])
def test_a_run_is_that_of_one_process(runs, name):
    assert not disagreements(out_of(runs, 2, name), out_of(runs, 1, "plain"), CLOSE)


@pytest.mark.parametrize("name", ["narrow 2", "narrow 3"])
def test_bfloat16_stays_near(runs, name):
    lines = [toy_run.metrics(out_of(runs, *of)) for of in ((2, name), (1, "narrow"))]
    for column, tolerance in (("loss", 5e-3), ("grad_norm", 5e-2)):
        two, one = (toy_run.column(side, column) for side in lines)
        assert (two / one - 1).abs().max() < tolerance, column


@pytest.mark.parametrize("name", MOVES)
def test_every_tensor_arrives_to_the_last_bit(runs, name):
    before = toy_run.checkpoint(out_of(runs, 2, MOVES[name][0]), 2)
    after = toy_run.checkpoint(out_of(runs, 2, f"carried {name}"), 2)
    assert {key.split("/")[0] for key in before} >= {"parameter", "exp_avg", "exp_avg_sq"}
    assert not toy_run.differing(before, after)


@pytest.mark.parametrize("place", [
    (2, "native to zero 2"), (2, "zero 1 to zero 3"), (2, "zero 3 to native"),
    (2, "zero 3 to zero 0"), (4, "zero 2"),
])  # fmt: skip
def test_a_checkpoint_goes_on_in_another_engine(runs, place):
    assert not disagreements(out_of(runs, *place), out_of(runs, 1, "plain"), CLOSE, first=3)


def test_moments_that_are_lost_are_seen(runs):
    """Negative control: the same weights with fresh moments."""
    lost, whole = out_of(runs, 2, "moments lost"), out_of(runs, 1, "plain")
    assert disagreements(lost, whole, 100 * CLOSE, first=3)


@pytest.mark.parametrize("name", ["frozen 2", "frozen 3"])
def test_frozen_weights_are_saved_as_they_came(runs, name):
    first = toy_run.checkpoint(out_of(runs, 1, "plain"), 2)
    at_four, one = (toy_run.checkpoint(out_of(runs, *of), 4) for of in ((2, name), (1, "frozen 3")))
    still = [k for k in at_four if k.endswith(("_proj.weight", "embed_tokens.weight"))]
    assert len(still) > 5
    for key in still:
        assert at_four[key].equal(one[key]), key
        assert not at_four[key].equal(first[key]), "negative control"
    assert at_four.keys() == one.keys()
