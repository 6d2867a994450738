"""What is to be fitted in each layer, and what came of it: the seam between recipes and fitting.

U units (heads, KV groups or slices), H hidden, D inputs of a part's output projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Name = Literal["attention", "mlp"]
Measure = Literal["norm", "loss"]
"""What a unit is worth to a token: the norm of what it adds, or that by the loss's curvature."""

Budget = Literal["topk", "layer", "threshold"]
"""Units on per token: the same number in each layer, a number a layer, or by one threshold."""

MODULES = {"attention": "self_attn", "mlp": "mlp"}
OUTPUTS = {"attention": "o_proj", "mlp": "down_proj"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Units of a layer's attention or MLP that are to be chosen per token.

    Heads lie as they are, `units` of one size; some may be found to be `shared`, always on. Of an
    MLP, `always` neurons are in no unit; the others go to units by `order` of a layer, or by when
    they are active together.
    """

    name: Name
    units: int
    keep: float  # units on per token, shared ones included
    measure: Measure = "loss"
    budget: Budget = "threshold"
    shared: int = 0  # units always on
    first: bool = False  # they are the first ones, not those of largest mean
    always: int = 0
    order: Callable[[int], Sequence[int]] | None = None
    intercept: bool = True
    spread: float | None = None  # weights of the chosen are within so much of even ones
    routes: bool = True  # False: only shared units are sought
    refit: bool = False
    mean: str = "mean_heads"  # the specification's field for the measured mean
    noun: str = field(default="heads", repr=False)  # its units, in words
    drawn: bool = field(default=False, repr=False)  # the paper's router for these is a drawn one

    @property
    def relative(self) -> bool:
        """Whether contributions of different layers are compared as shares of the stream's norm."""
        return self.measure == "norm" and self.budget != "topk"

    def output(self, layer: int) -> str:
        """Name of the output projection."""
        return f"model.layers.{layer}.{MODULES[self.name]}.{OUTPUTS[self.name]}.weight"

    def router(self, layer: int, kind: str) -> str:
        """Name of the router's weight or bias."""
        return f"model.layers.{layer}.{MODULES[self.name]}.router.{kind}"

    def describe(self) -> str:
        """In words, for a plan."""
        found = [f"what {self.units} {self.noun} of each {self.name} are worth, by {self.measure}"]
        found += [f"the {self.shared} shared ones"] if self.shared and not self.first else []
        if self.name == "mlp" and self.order is None:
            found.append(f"which neurons belong together, {self.always} of them always on")
        if self.routes:
            found.append(f"a router, budget {self.budget}, {self.keep:g} on per token")
        found += ["the output projection"] if self.refit else []
        return "; ".join(found)


@dataclass(slots=True)
class Branches:
    """A mixture's sources, between which the routers of these parts of its layers are to choose.

    `labels` and `target` come with the text, where the target was not asked for.
    """

    parts: Sequence[Name]
    count: int
    target: Literal["label", "loss"] | None
    labels: list[int] = field(default_factory=list)  # the source of each window

    def router(self, part: Name, layer: int) -> str:
        """Name of a router's weight."""
        return f"model.layers.{layer}.{MODULES[part]}.router.weight"

    def describe(self) -> str:
        """In words, for a plan."""
        aims = {"label": "the text's labels", "loss": "what each source loses on a token"}
        aim = aims[self.target] if self.target else "the text's labels where it has some"
        where = " and ".join(self.parts)
        return f"{where} routers between {self.count} sources, layer by layer, to {aim}"


@dataclass(slots=True)
class Fits:
    """What recipes want to know (`parts` of one source, or `branches`), and what calibration says
    of it.
    """

    parts: list[Part] = field(default_factory=list)
    branches: Branches | None = None
    dtype: torch.dtype = torch.float32  # that routers are rounded to
    tensors: dict[str, Tensor] = field(default_factory=dict)
    orders: dict[int, Sequence[int]] = field(default_factory=dict)  # of an MLP's neurons
    changes: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # of specifications
    known: dict[tuple[Name, int], Any] = field(default_factory=dict)  # for comparing choices
    bars: dict[Name, float] = field(default_factory=dict)  # that a unit's true worth must reach

    @property
    def wanted(self) -> Sequence[Part | Branches]:
        """All that is to be fitted."""
        return [*self.parts, *([self.branches] if self.branches else [])]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A tensor that calibration gives (an expression of a plan)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    what: str
    fits: Fits = field(compare=False, repr=False)

    def rows(self, start: int, stop: int) -> Tensor:
        whole = self.fits.tensors[self.name].to(self.dtype)
        return (whole if whole.ndim > 1 else whole[:, None])[start:stop]

    def __str__(self) -> str:
        return f"{self.what}, fitted to text"


@dataclass(frozen=True, slots=True)
class FittedOrder:
    """An order of a layer's neurons that calibration gives."""

    layer: int
    fits: Fits = field(compare=False, repr=False)

    def indices(self) -> Sequence[int]:
        return self.fits.orders[self.layer]

    def __str__(self) -> str:
        return "neurons by shared-coactivation"
