"""What a recipe works on, and what every recipe needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moe.errors import UserError
from moe.model import RoutedLlamaConfig
from moe.upcycle.calibrate.parts import Branches, Fits, Fitted, Name, Part
from moe.upcycle.expression import Draw, Expression
from moe.upcycle.partition import Activations

Purpose = Literal["train", "serve"]
MAX_EXPERTS = 4096  # a slip of the keyboard is not worth a plan of a million tensors
ROUTER_STD = 0.02  # small, so that tokens spread: loads within ±30 % of even at 4 to 8 experts

Plan = dict[str, Expression]


@dataclass(kw_only=True, slots=True)
class Target:
    """The model to be, changed in place by a recipe: its config and plan, of the first source at
    the start; the plans of all sources; the layers to convert; the seed of what is drawn.
    """

    config: RoutedLlamaConfig
    plan: Plan
    sources: Sequence[Plan]
    layers: Sequence[int]
    seed: int
    activations: Activations | None = None  # of the first source, on text to calibrate with
    dtype: torch.dtype | None = None  # of the result, where it is not the sources'
    fits: Fits = field(default_factory=Fits)  # what is to be fitted, empty where nothing is

    def set_parts(self, part: str, spec: dict[str, Any]) -> None:
        """Give the layers a specification; one entry for all layers where all are equal."""
        given = getattr(self.config, part)
        count = self.config.num_hidden_layers
        now = given if isinstance(given, list) else [given] * count
        specs = [spec if i in set(self.layers) else now[i] for i in range(count)]
        setattr(self.config, part, specs[0] if all(s == specs[0] for s in specs) else specs)
        if problems := self.config.problems():
            raise UserError("\n".join(problems))

    def draw_router(self, name: str, rows: int, std: float) -> None:
        """Put a router's weight [rows, H] of normal numbers into the plan."""
        shape = (rows, self.config.hidden_size)
        dtype = self.plan["model.norm.weight"].dtype
        self.plan[name] = Draw(shape, dtype, std, f"{self.seed}/{name}")

    def fit(self, part: Part) -> None:
        """Have a part fitted in each layer: its router, and its output projection where asked."""
        self.fits.parts.append(part)
        dtype = self.fits.dtype = self.dtype or self.plan["model.norm.weight"].dtype
        hidden = self.config.hidden_size
        routed = part.units - part.shared
        for layer in self.layers:
            if part.routes:
                weight, bias = (part.router(layer, kind) for kind in ("weight", "bias"))
                what = "ridge router"
                self.plan[weight] = Fitted(weight, (routed, hidden), dtype, what, self.fits)
                if part.intercept:
                    self.plan[bias] = Fitted(bias, (routed,), dtype, what, self.fits)
            if part.refit:
                name = part.output(layer)
                shape = self.plan[name].shape
                self.plan[name] = Fitted(name, shape, dtype, "least squares", self.fits)

    def fit_branches(self, branches: Branches, part: Name, layer: int) -> None:
        """Have the router between the sources fitted in one part of a layer."""
        self.fits.branches = branches
        dtype = self.fits.dtype = self.dtype or self.plan["model.norm.weight"].dtype
        name, shape = branches.router(part, layer), (branches.count, self.config.hidden_size)
        self.plan[name] = Fitted(name, shape, dtype, "ridge router", self.fits)

    def pop_mlp(self, layer: int) -> tuple[Expression, Expression, Expression]:
        """Take a layer's gate, up and down matrices out of the plan."""
        at = f"model.layers.{layer}.mlp"
        gate, up, down = (self.plan.pop(f"{at}.{n}_proj.weight") for n in ("gate", "up", "down"))
        return gate, up, down


def balance(purpose: Purpose) -> float:
    """Coefficient of a balance loss."""
    return 0.01 if purpose == "train" else 0.0


def router_std(text: str) -> float:
    """Deviation that `normal:STD` or `zero` asks for. Raises UserError."""
    if text == "zero":
        return 0.0
    return number(text, "--router-init", ("normal",), "normal:STD or zero")[1]


def choice_problems(num_experts: int, top_k: int) -> list[str]:
    """What is impossible about choosing `top_k` of `num_experts`."""
    found, most = [], MAX_EXPERTS
    if 1 <= num_experts <= MAX_EXPERTS:
        most = num_experts
    else:
        found.append(f"--num-experts {num_experts} must be between 1 and {MAX_EXPERTS}.")
    if not 1 <= top_k <= most:
        found.append(f"--top-k {top_k} must be between 1 and {most}.")
    return found


def group_problems(
    num_experts: int, top_k: int, groups: int, top_groups: int | None, granularity: int = 1
) -> list[str]:
    """What is impossible about `groups` of these experts, of which a token uses `top_groups`.

    With a `granularity` there are `num_experts` copies of so many experts each, which `top_k`
    counts; a group has whole copies.
    """
    if groups < 1 or num_experts % groups:
        noun = "experts" if granularity == 1 else "copies"
        return [
            f"--groups {groups} does not divide the {num_experts} {noun}. Use one of "
            f"{divisors(num_experts)}."
        ]
    if top_groups is None:
        return []
    if not 1 <= top_groups <= groups:
        return [f"--top-groups {top_groups} must be between 1 and --groups {groups}."]
    size = num_experts * granularity // groups
    if top_k > top_groups * size:
        return [
            f"--top-k {top_k}: --top-groups {top_groups} of {size} experts each leave "
            f"{top_groups * size} to choose from. Use at least --top-groups {-(-top_k // size)}."
        ]
    return []


def divisors(number: int) -> str:
    """`1, 2, 4`: for messages that list what is legal."""
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def number(text: str, option: str, kinds: Sequence[str], forms: str) -> tuple[str, float]:
    """Kind and amount of an option like `noise:0.1`, at least 0. Raises UserError."""
    kind, _, amount = text.partition(":")
    try:
        value = float(amount)
    except ValueError:
        value = float("nan")
    if kind not in kinds or not 0 <= value < float("inf"):
        given = text.removeprefix("x:")
        raise UserError(f"{option} {given!r} is not understood. Use {forms}.")
    return kind, value
