"""What recipes of slices share that are fitted to text: defaults, and options that go together."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from moe.upcycle.calibrate.parts import Measure, Part
from moe.upcycle.rearrange import Order
from moe.upcycle.recipes.seam import Target

Router = Literal["random", "calibrated"]
Partition = Literal["contiguous", "random", "kmeans", "activation", "shared-coactivation"]
COACTIVATION: Partition = "shared-coactivation"
KEPT = 0.75  # of an MLP's neurons that are on, by default


def with_defaults(recipe: Any) -> Any:
    """A recipe with its router, partition and target spelled out."""
    router = recipe.router or "random"
    fitted = router == "calibrated"
    partition = recipe.partition or (COACTIVATION if fitted else "contiguous")
    reads = fitted or partition == COACTIVATION
    target: Measure | None = recipe.target or ("loss" if reads else None)
    return dataclasses.replace(recipe, router=router, partition=partition, target=target)


def option_problems(recipe: Any, given: Any) -> list[str]:
    """Options of fitting where nothing is fitted; of a recipe with its defaults, and as given."""
    wrong = {"--refit": ""} if given.refit and recipe.router != "calibrated" else {}
    if given.target and recipe.router != "calibrated" and not by_coactivation(recipe):
        wrong["--target"] = given.target
    return [
        f"{option} {value}".strip() + " is for --router calibrated. Leave it out, or give --router "
        "calibrated and --calibrate FILE."
        for option, value in wrong.items()
    ]


def by_coactivation(recipe: Any) -> bool:
    """Whether neurons go together by when they are active."""
    return recipe.partition == COACTIVATION


def shared_by_default(recipe: Any, width: int, experts: int | None) -> int:
    """Neurons always on: where co-activation finds them, nearest to a quarter that the experts
    divide the others; else none.
    """
    if recipe.shared_neurons is not None:
        return recipe.shared_neurons
    if not by_coactivation(recipe) or experts is None or not 1 <= experts <= width:
        return 0
    each = round((width - width / 4) / experts)
    return width - max(1, each) * experts


def kept_by_default(width: int, shared: int, experts: int) -> float:
    """Slices on per token so that KEPT of the neurons are."""
    each = max(1, (width - shared) // experts)
    return min(max((KEPT * width - shared) / each, 1.0), float(experts))


def fit_slices(
    target: Target, recipe: Any, experts: int, orders: dict[int, Order], **own: Any
) -> None:
    """Have an MLP's slices fitted. `orders` fills as they are cut."""
    if recipe.router != "calibrated" and not by_coactivation(recipe):
        return

    def order(layer: int) -> Sequence[int]:
        return orders[layer].indices()

    target.fit(
        Part(
            name="mlp",
            units=experts,
            measure=recipe.target,
            always=recipe.shared_neurons,
            order=None if by_coactivation(recipe) else order,
            routes=recipe.router == "calibrated",
            refit=recipe.refit,
            mean="mean_experts",
            noun="slices",
            drawn=True,
            **own,
        )
    )


def refit_statement(recipe: Any, text: str) -> str:
    """What a refit adds to what an inexact conversion changes."""
    if not recipe.refit:
        return text
    return (
        f"{text}; the output projections are fitted again to what is on, so that with all parts on "
        "(top-k = all) the model no longer equals the dense one"
    )
