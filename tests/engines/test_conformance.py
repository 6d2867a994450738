"""The same numbers on one process, on any mesh and in any engine."""

from itertools import product

import pytest
import tiny
from conformance import DISTRIBUTIONS, MODELS, Case, bounds, check, error, take_all
from harness import run_ranks

from moe.config import parse
from moe.engines import parameters
from moe.errors import UserError

ROUTERS = ["*.router.*"]


def native(*given, **options) -> Case:
    model, size, expert, distribution = given
    return Case(model, "native", size, expert, distribution, options=options)


def zero(*given, accumulate=1, width="float32", **options) -> Case:
    model, size, expert, distribution, stage = given
    place = size, expert, distribution, width, stage, accumulate
    return Case(model, "deepspeed", *place, options)


@pytest.mark.slow
def test_native_engine_on_two_ranks():
    check([
        native("dense", 2, 1, "balanced"),
        native("moe", 2, 2, "balanced"),
        native("bam+moe", 2, 2, "skewed", activation_checkpointing="full"),
        native("uoe", 2, 1, "empty"),
        native("budgets", 2, 2, "balanced"),
        native("budgets", 2, 2, "empty", activation_checkpointing="full"),
    ])  # fmt: skip


@pytest.mark.slow
def test_native_engine_on_four_ranks():
    check([
        native("moh+moe", 4, 2, "empty"),
        native("uoe", 4, 4, "balanced"),
        native("moe", 4, 4, "skewed", activation_checkpointing="experts"),
        native("bam+moe", 4, 1, "balanced"),
    ])  # fmt: skip


@pytest.mark.slow
def test_deepspeed_on_two_ranks():
    check([
        zero("dense", 2, 1, "balanced", 1),
        zero("moe", 2, 2, "balanced", 1, accumulate=2),
        zero("moe", 2, 2, "skewed", 0),
        zero("moh+moe", 2, 2, "empty", 2, activation_checkpointing="full"),
        zero("bam+moe", 2, 1, "balanced", 3),
        zero("uoe", 2, 1, "empty", 3, accumulate=2, activation_checkpointing="full"),
        zero("moe", 2, 2, "balanced", 2, accumulate=2, offload="optimizer"),
        zero("moe", 2, 1, "skewed", 3, offload="parameters"),
        zero("moe", 2, 2, "balanced", 1, accumulate=2, width="bfloat16"),
        zero("moe", 2, 2, "empty", 2, width="bfloat16"),
        zero("moe", 2, 1, "balanced", 3, width="bfloat16"),
        zero("moe", 2, 2, "balanced", 1, trainable=ROUTERS),
        zero("moe", 2, 2, "balanced", 2, trainable=["*.experts.*"], accumulate=2),
        zero("moh+moe", 2, 1, "balanced", 3, trainable=["*.experts.*"]),
        zero("uoe", 2, 1, "balanced", 3, trainable=ROUTERS, accumulate=2),
        zero("budgets", 2, 1, "balanced", 3),
    ])  # fmt: skip


@pytest.mark.slow
def test_deepspeed_on_four_ranks():
    check([
        zero("bam+moe", 4, 2, "skewed", 1),
        zero("uoe", 4, 4, "balanced", 2),
        zero("moh+moe", 4, 2, "balanced", 0),
        zero("dense", 4, 1, "balanced", 3),
    ])  # fmt: skip


MESHES = ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))


def grid(size: int) -> list[tuple[str, int, int, str]]:
    meshes = [m for m in MESHES if m[0] == size]
    return [
        (name, *mesh, distribution)
        for name, mesh, distribution in product(MODELS, meshes, DISTRIBUTIONS)
        if name != "dense" or (mesh[1] == 1 and distribution == "balanced")
    ]


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_the_whole_grid_of_the_native_engine(size):
    check([native(*place) for place in grid(size)])


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_the_whole_grid_of_deepspeed(size, stage):
    check([zero(*place, stage) for place in grid(size) if stage < 3 or place[2] == 1])


@pytest.mark.full
def test_compiled_layers_with_experts_apart():
    check([
        Case("moe", size=2, expert=2, width="float32", options={"compile": True}),
        zero("moe", 2, 2, "balanced", 1, compile=True),
    ])  # fmt: skip


@pytest.mark.slow
def test_what_engines_get_wrong_is_found():
    """Negative controls: FSDP2's own division, and clipping by what one rank sees."""
    cases = [
        Case("moe", size=2, expert=2, broken="division"),
        Case("moe", size=2, expert=2, broken="clip"),
    ]
    one, bound = bounds(cases[:1])[0]
    divided, clipped = run_ranks(take_all, 2, cases)[0]
    gradient = {n: t for n, t in divided.items() if n.startswith("gradient/")}
    expert = {n for n in gradient if ".mlp.experts." in n}
    assert error(divided, one)[0] > 0.1
    for name, found in gradient.items():
        factor = 2.0 if name in expert else 1.0  # as often too large as there are expert ranks
        assert error({name: found}, {name: factor * one[name]})[0] < bound, name
    assert error({"losses": divided["losses"][:1]}, {"losses": one["losses"][:1]})[0] < bound
    whole = {n: t for n, t in clipped.items() if n.startswith(("gradient/", "norm"))}
    assert error(whole, {n: one[n] for n in whole})[0] < bound
    assert error(clipped, one)[0] > 1e-3


def test_experts_that_cannot_be_divided_are_refused():
    model = tiny.routed_model(tiny.dense_model(), None, tiny.MOE)
    with pytest.raises(UserError, match="does not divide the experts of every layer"):
        parameters.check_experts(model, 3, 6)
    with pytest.raises(UserError, match="cannot cut their rows evenly"):
        parameters.check_experts(model, 1 + 1, 22)
    with pytest.raises(UserError, match="has no routed MLP"):
        parameters.check_experts(tiny.routed_model(tiny.dense_model(), tiny.MOH), 2, 2)
    values = {
        "model": "m",
        "out": "o",
        "data": {"train": [{"path": "p"}]},
        "parallel": {"expert": 3},
    }
    with pytest.raises(
        UserError, match=r"does not divide the 4 ranks there are\. Use one of 1, 2, 4"
    ):
        parse(values, "test").check_world(4)
