"""The balance loss means the same however a global batch is divided: router gradients say so.

Scope micro works on the load of each micro-batch, so it depends on their size and on nothing else;
scope global works on the load of the whole step before, and depends on nothing at all.
"""

from pathlib import Path

import pytest
import tiny
import toy_run
from harness import run_ranks
from test_ranks import configure
from torch import Tensor

pytestmark = pytest.mark.slow
HEAVY = {"balance_coef": 20.0, "z_coef": 1.0}  # so that little else is in the gradient
ATTENTION = {**tiny.MOH, "balance_coef": 20.0}
MLP = [
    {**tiny.MOE, **HEAVY, "balance_scope": "micro", "shared_intermediate_size": 16},
    {**tiny.MOE, **HEAVY, "balance_scope": "global"},
    {"kind": "uoe", "num_experts": 4, "top_k": 2, **HEAVY, "balance_scope": "global"},
]
OVERALL = [{**spec, "balance_scope": "global"} for spec in MLP]
STILL = "optimizer.lr=1e-12"  # a first step has no global load yet: it must not move the second
FULL = "train.activation_checkpointing=full"
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "alone": (),
        "recomputed": (FULL,),
        "global": (STILL,),
        "global, at once": (STILL, "train.micro_batch_size=8"),
        "at once": ("train.micro_batch_size=8",),
    },
    2: {
        "two": (FULL,),
        "experts apart": ("parallel.expert=2",),
        "zero 2": ("engine=deepspeed", "deepspeed.stage=2", "parallel.expert=2"),
        "zero 3": ("engine=deepspeed", "deepspeed.stage=3", FULL),
        "global, at once": (STILL, "train.micro_batch_size=4", "parallel.expert=2"),
    },
    4: {
        "four": (),
        "experts apart": ("parallel.expert=4", FULL),
        "two times two": ("parallel.expert=2", "parallel.replicate=2"),
    },
}
Gradients = dict[str, Tensor]
Place = tuple[int, str]


def second_step(
    toys: tuple[toy_run.Toys, toy_run.Toys], folder: Path, size: int
) -> dict[Place, Gradients]:
    """Every case's gradients in the step that has a global load to go by."""
    found = {}
    for name, overrides in CASES[size].items():
        model = toys[name.startswith("global")]
        with toy_run.opened(configure(model, folder / name, *overrides)) as (_, take):
            take()
            found[size, name] = take().gradients
    return found


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> dict[Place, Gradients]:
    folder = tmp_path_factory.mktemp("balance")
    specs = {
        "mixed": (ATTENTION, MLP),
        "global": ({**ATTENTION, "balance_scope": "global"}, OVERALL),
        "light": (ATTENTION, [{k: v for k, v in s.items() if k not in HEAVY} for s in MLP]),
    }
    toys = {}
    for name, (attention, mlp) in specs.items():
        (folder / name).mkdir()
        toys[name] = toy_run.make(folder / name, attention, mlp)
    pair, found = (toys["mixed"], toys["global"]), {}
    for size in CASES:
        given = pair, folder / f"of {size}", size
        (folder / f"of {size}").mkdir()
        found |= run_ranks(second_step, size, *given)[0] if size > 1 else second_step(*given)
    (folder / "light of 1").mkdir()
    light = second_step((toys["light"], toys["light"]), folder / "light of 1", 1)
    return found | {(1, "light"): light[1, "alone"]}


def distance(left: Gradients, right: Gradients) -> float:
    return max(((left[n] - g).norm() / g.norm()).item() for n, g in right.items())


def routers(found: Gradients) -> Gradients:
    return {n: g for n, g in found.items() if n.endswith("mlp.router.weight")}


PLACES = [(s, n) for s, cases in CASES.items() for n in cases]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_routers_get_the_gradient_of_one_process(gradients, place):
    found = gradients[place]
    alone = gradients[1, "global" if place[1].startswith("global") else "alone"]
    assert found.keys() == alone.keys() and len(routers(found)) == 3
    if place == (1, "at once"):  # negative control: micro-batches of another size, another loss
        assert distance(routers(found), routers(alone)) > 0.01
    else:
        assert distance(found, alone) < 2e-5


def test_the_losses_are_in_the_gradient(gradients):
    """Negative control: with the usual coefficients it is another one."""
    light, heavy = (routers(gradients[1, name]) for name in ("light", "alone"))
    for name, gradient in heavy.items():
        assert distance({name: light[name]}, {name: gradient}) > 0.5, name
