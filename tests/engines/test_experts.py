"""Expert parallelism in the native engine: the same numbers on one process and on any mesh."""

from typing import Any

import pytest
import tiny
import torch
import toy_run
from harness import run_ranks
from torch.nn import functional as F

from moe.config import parse
from moe.engines import build, native, parameters
from moe.errors import UserError
from moe.parallel.world import world

MODELS: dict[str, tuple[Any, Any]] = {
    "moe": (None, {**tiny.MOE, "shared_intermediate_size": 16}),
    "moh+moe": (tiny.MOH, {**tiny.MOE, "score": "sigmoid", "selection_bias": True}),
    "bam+moe": ({"kind": "bam", "num_experts": 2}, tiny.MOE),
    "uoe": (
        {"kind": "uoe", "num_experts": 3, "top_k": 2},
        {"kind": "uoe", "num_experts": 4, "top_k": 2},
    ),
}
TOKENS = tiny.tokens(4, 12)
Found = dict[str, Any]


def take_steps(
    name: str, expert: int, width: str, case: str, options: dict[str, Any], broken: bool = False
) -> Found:
    """Three clipped steps of one model: losses, first norm and gradients, and the last state."""
    with world() as ranks:
        model = tiny.routed_model(tiny.dense_model(), *MODELS[name]).to(getattr(torch, width))
        for key, parameter in model.named_parameters():
            if case != "balanced" and key.endswith("mlp.router.weight"):
                parameter.data[-1] = -9 * parameter.data[0]  # an expert that few want, or none
        native.DTYPES["float32"] = getattr(torch, width)
        values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}}
        train = {"dtype": "float32", **options}
        config = parse({**values, "train": train, "parallel": {"expert": expert}}, "test")
        engine = build(model, config, ranks)
        engine.train(True)
        if broken:
            for module in engine.model.modules():
                if isinstance(module, native.FSDPModule):  # torch's own default
                    module.set_gradient_divide_factor(float(ranks.size))
        found: Found = {"losses": []}
        mine = TOKENS.chunk(ranks.size)[ranks.rank]
        for step in range(3):
            logits = engine.forward(input_ids=mine).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum")
            loss = losses / (4 * 11)
            engine.backward(loss, True)
            found["losses"].append(ranks.sum(loss.detach().clone()))
            norm = engine.grad_norm()
            if step == 0:
                named = engine.model.named_parameters()
                grads = ((n, p.grad) for n, p in named if p.grad is not None)
                found |= {f"gradient/{n}": toy_run.whole(g).clone() for n, g in grads}
                found["norm"] = norm.clone()
            engine.step(1e-2, (0.5 / norm).clamp(max=1.0))
        found |= {f"{e.kind}/{e.name}": toy_run.whole(e.tensor).clone() for e in engine.state()}
        found["losses"] = torch.stack(found["losses"])
        return found


def error(found: Found, expected: Found) -> float:
    assert found.keys() == expected.keys()
    return max(
        ((found[n] - wanted).norm() / wanted.norm().clamp(min=1e-5)).item()
        for n, wanted in expected.items()
    )


def case(
    name: str, size: int, expert: int, distribution: str, options: Any = None, *marks: Any
) -> Any:
    values = name, size, expert, distribution, options or {}
    return pytest.param(values, id="-".join(map(str, values)), marks=marks)


@pytest.mark.parametrize("values", [
    case("moe", 2, 2, "balanced", None, pytest.mark.slow),
    case("moh+moe", 4, 2, "skewed", None, pytest.mark.slow),
    case("bam+moe", 2, 2, "skewed", {"activation_checkpointing": "full"}, pytest.mark.slow),
    case("uoe", 4, 4, "balanced", None, pytest.mark.slow),
    case("moe", 4, 4, "skewed", {"activation_checkpointing": "experts"}, pytest.mark.slow),
    *(case(n, s, e, d, None, pytest.mark.full)
      for n in MODELS for s, e in ((2, 1), (2, 2), (4, 2), (4, 4)) for d in ("balanced", "skewed")),
])  # fmt: skip
def test_any_mesh_gives_the_numbers_of_one_process(values):
    name, size, expert, distribution, options = values
    one = run_ranks(take_steps, 1, name, 1, "float64", distribution, {})[0]
    for found in run_ranks(take_steps, size, name, expert, "float64", distribution, options):
        assert error(found, one) < 1e-10


@pytest.mark.slow
def test_a_hidden_division_is_found():
    """Negative control: gradients that are divided by the number of ranks, as FSDP2 does."""
    one = run_ranks(take_steps, 1, "moe", 1, "float64", "balanced", {})[0]
    two = run_ranks(take_steps, 2, "moe", 2, "float64", "balanced", {}, True)[0]
    assert error(two, one) > 0.1


@pytest.mark.slow
def test_float32_differs_by_the_order_of_sums_alone():
    """At most four times what another order in one process gives, or 1e-6."""
    one, wide = (
        run_ranks(take_steps, 1, "moe", 1, w, "balanced", {})[0] for w in ("float32", "float64")
    )
    own = error({n: t.double() for n, t in one.items()}, wide)
    two = run_ranks(take_steps, 2, "moe", 2, "float32", "balanced", {})[0]
    assert error(two, one) < max(4 * own, 1e-6)


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
