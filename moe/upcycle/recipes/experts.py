"""Experts from one MLP: copies of it, fine-grained copies, or slices of it."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moe.errors import UserError, problem, raise_all
from moe.model import RoutedLlamaConfig
from moe.model.spec import MoEMLP, to_dict
from moe.upcycle.calibrate.parts import FittedOrder, Measure
from moe.upcycle.expression import Concat, Expression, Noise, Redraw, Stack
from moe.upcycle.partition import order_of
from moe.upcycle.rearrange import Given, Order, Rows, Take, scaled
from moe.upcycle.recipes.fitted import (
    COACTIVATION,
    Partition,
    Router,
    fit_slices,
    option_problems,
    refit_statement,
    shared_by_default,
    with_defaults,
)
from moe.upcycle.recipes.seam import (
    ROUTER_STD,
    Purpose,
    Target,
    balance,
    choice_problems,
    divisors,
    group_problems,
    number,
    router_std,
)

SPREAD = 0.01  # of calibrated weights about even ones
MLP = tuple[Expression, Expression, Expression]  # gate, up, down


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Each MLP copied into `num_experts` experts, `top_k` per token, weights summing to 1."""

    name: ClassVar[str] = "copy"
    parts: ClassVar[tuple[str, ...]] = ("mlp",)

    num_experts: int
    top_k: int
    groups: int = 1  # of consecutive experts; a token uses those of top_groups (None: of all)
    top_groups: int | None = None
    router_init: str | None = None  # normal:STD or zero; None: normal:0.02
    diversify: str = "none"  # none, perm, noise:S, drop:R
    purpose: Purpose = "train"

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        """With every default spelled out. Raises UserError with all that is impossible."""
        recipe = dataclasses.replace(self, router_init=self.router_init or f"normal:{ROUTER_STD}")
        problems = choice_problems(self.num_experts, self.top_k)
        if not problems:
            groups = self.groups, self.top_groups
            problems = group_problems(self.num_experts, self.top_k, *groups)
        raise_all(problems + problem(recipe.router_std) + problem(recipe.diversity))
        return recipe

    def router_std(self) -> float:
        """Deviation of the drawn router rows; 0 for `zero`."""
        assert self.router_init is not None
        return router_std(self.router_init)

    def diversity(self) -> tuple[str, float]:
        """Method and amount by which the copies are told apart."""
        if self.diversify in ("none", "perm"):
            return self.diversify, 0.0
        forms = (
            "none, perm (neurons in another order), noise:S (deviation) or drop:R (share, 0 to 1)"
        )
        kind, amount = number(self.diversify, "--diversify", ("noise", "drop"), forms)
        if kind == "drop" and amount > 1:
            raise UserError(f"--diversify {self.diversify}: a share lies between 0 and 1.")
        return kind, amount

    def apply(self, target: Target) -> str:
        """Replace the MLPs; returns the statement, empty where inexact."""
        spec = MoEMLP(
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_groups=self.groups,
            top_groups=self.top_groups,
            balance_coef=balance(self.purpose),
        )
        target.set_parts("mlp", to_dict(spec))
        for layer in target.layers:
            at = f"model.layers.{layer}.mlp"
            mlp = target.pop_mlp(layer)
            keys = (f"{target.seed}/{at}/{expert}" for expert in range(self.num_experts))
            stack_experts(target, layer, [self._expert(mlp, key) for key in keys])
            target.draw_router(f"{at}.router.weight", self.num_experts, self.router_std())
        if self.diversity()[1] == 0:
            same = "identical" if self.diversify == "none" else "the same neurons in all"
            return f"{same} experts, weights over the chosen ones sum to 1"
        return ""

    def _expert(self, mlp: MLP, key: str) -> MLP:
        (gate, up, down), (kind, amount) = mlp, self.diversity()
        width = gate.shape[0]
        if kind == "perm":
            order = Given(tuple(random.Random(key).sample(range(width), width)))
            gate, up = (Take(m, order, 0, width, axis=0) for m in (gate, up))
            return gate, up, Take(down, order, 0, width, axis=1)
        if amount == 0:
            return mlp
        if kind == "noise":
            noisy = [Noise(m, amount, f"{key}/{i}") for i, m in enumerate(mlp)]
            return noisy[0], noisy[1], noisy[2]
        # one set of neurons for all three matrices: separate sets damage twice as many
        chosen = tuple(sorted(random.Random(key).sample(range(width), round(amount * width))))
        return (
            Redraw(gate, chosen, 0, f"{key}/gate"),
            Redraw(up, chosen, 0, f"{key}/up"),
            Redraw(down, chosen, 1, f"{key}/down"),
        )

    def inexact(self, config: RoutedLlamaConfig) -> str:
        return f"the copies are told apart by {self.diversify}"

    def warnings(self) -> tuple[str, ...]:
        return idle_warning(self.router_std(), self.num_experts, self.top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class Granular:
    """Fine-grained copies: `num_experts` copies, each cut into `granularity` experts.

    `top_k` counts these fine experts. Those of one copy begin with equal router rows, so whole
    copies are chosen (virtual groups), and their down projections are `granularity` times as large,
    since each gets that part of a copy's weight. Source: arXiv 2410.07524, but for its scale, which
    is not linear in a gated MLP.
    """

    name: ClassVar[str] = "granular"
    parts: ClassVar[tuple[str, ...]] = ("mlp",)

    num_experts: int
    granularity: int
    top_k: int
    groups: int = 1  # of whole copies; a token uses those of top_groups (None: of all)
    top_groups: int | None = None
    router_init: str | None = None  # normal:STD or zero; None: normal:0.02
    purpose: Purpose = "train"

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        recipe = dataclasses.replace(self, router_init=self.router_init or f"normal:{ROUTER_STD}")
        problems = problem(router_std, recipe.router_init)
        width = config.intermediate_size
        if self.granularity < 1 or width % self.granularity:
            problems.append(
                f"--granularity {self.granularity} does not divide the MLP's {width} neurons. Use "
                f"one of {divisors(width)}."
            )
            raise_all(problems)
        fine = self.num_experts * self.granularity
        problems += choice_problems(fine, self.top_k)
        if self.top_k % self.granularity:
            problems.append(
                f"--top-k {self.top_k} must be a multiple of --granularity {self.granularity}: "
                f"part of a copy is not the function. Use one of "
                f"{', '.join(str(k) for k in range(self.granularity, fine + 1, self.granularity))}."
            )
        if not problems:
            groups = self.groups, self.top_groups, self.granularity
            problems = group_problems(self.num_experts, self.top_k, *groups)
        raise_all(problems)
        return recipe

    def apply(self, target: Target) -> str:
        width = target.config.intermediate_size // self.granularity
        fine = self.num_experts * self.granularity
        spec = MoEMLP(
            num_experts=fine,
            top_k=self.top_k,
            intermediate_size=None if self.granularity == 1 else width,
            num_groups=self.groups,
            top_groups=self.top_groups,
            balance_coef=balance(self.purpose),
        )
        target.set_parts("mlp", to_dict(spec))
        assert self.router_init is not None
        for layer in target.layers:
            gate, up, down = target.pop_mlp(layer)
            whole = Given(tuple(range(gate.shape[0])))
            shards = [
                slice_of((gate, up, down), whole, i * width, (i + 1) * width, self.granularity)
                for i in range(self.granularity)
            ]
            stack_experts(target, layer, shards * self.num_experts)
            name = f"model.layers.{layer}.mlp.router.weight"
            target.draw_router(name, self.num_experts, router_std(self.router_init))
            drawn = target.plan[name]
            tied = [Rows(drawn, e, e + 1) for e in range(self.num_experts)]
            target.plan[name] = Concat(tuple(row for row in tied for _ in shards))
        return "the experts of a copy are chosen together, weights over the copies sum to 1"

    def inexact(self, config: RoutedLlamaConfig) -> str:
        raise AssertionError("always exact")

    def warnings(self) -> tuple[str, ...]:
        assert self.router_init is not None
        fine = self.num_experts * self.granularity
        return idle_warning(router_std(self.router_init), fine, self.top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Slices of one MLP as experts with soft weights, in a form that native architectures hold.

    Weights over the chosen experts sum to 1, so down projections are `top_k` times as large: each
    chosen expert counts about once. `shared_neurons` of them are always on.
    """

    name: ClassVar[str] = "split"
    parts: ClassVar[tuple[str, ...]] = ("mlp",)

    num_experts: int
    top_k: int
    partition: Partition | None = None  # None: contiguous, shared-coactivation if calibrated
    shared_neurons: int | None = None  # None: none, a quarter with shared-coactivation
    router: Router | None = None  # None: random
    target: Measure | None = None  # of what is calibrated; None: loss
    refit: bool = False  # fit the down projection to the slices that are on
    router_init: str | None = None  # None: normal:0.02, zero where every expert is chosen
    purpose: Purpose = "train"

    def fitted(self) -> Self:
        """What is meant where there is a text to fit to and no router was named."""
        if self.partition == "activation":
            return self
        return dataclasses.replace(self, router="calibrated")

    @property
    def reads_text(self) -> bool:
        """Whether the recipe is fitted to `--calibrate` text."""
        return self.router == "calibrated" or self.partition in ("activation", COACTIVATION)

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        default = "zero" if self.top_k == self.num_experts else f"normal:{ROUTER_STD}"
        recipe = with_defaults(dataclasses.replace(self, router_init=self.router_init or default))
        width = config.intermediate_size
        shared = shared_by_default(recipe, width, self.num_experts)
        recipe = dataclasses.replace(recipe, shared_neurons=shared)
        problems = option_problems(recipe, self)
        if recipe.router == "calibrated" and self.router_init is not None:
            problems.append(f"--router-init {self.router_init}: a calibrated router is not drawn.")
        problems += choice_problems(self.num_experts, self.top_k)
        problems += problem(router_std, recipe.router_init)
        problems += slice_problems(width, shared, self.num_experts, "--num-experts")
        raise_all(problems)
        return recipe

    def apply(self, target: Target) -> str:
        inner, shared = target.config.intermediate_size, self.shared_neurons
        assert self.router_init is not None and self.partition is not None and shared is not None
        width = (inner - shared) // self.num_experts
        spec = MoEMLP(
            num_experts=self.num_experts,
            top_k=self.top_k,
            intermediate_size=None if width == inner else width,
            shared_intermediate_size=shared,
            balance_coef=balance(self.purpose),
        )
        target.set_parts("mlp", to_dict(spec))
        std = router_std(self.router_init)
        orders: dict[int, Order] = {}
        how: dict[str, Any] = {"budget": "topk", "keep": float(self.top_k)}
        # native forms have no bias, and weights that sum to 1
        fit_slices(target, self, self.num_experts, orders, intercept=False, spread=SPREAD, **how)
        for layer in target.layers:
            given = self.partition, self.num_experts, shared, self.top_k
            orders[layer] = cut_mlp(target, layer, *given)
            if self.router != "calibrated":
                name = f"model.layers.{layer}.mlp.router.weight"
                target.draw_router(name, self.num_experts, std)
        if self.top_k == self.num_experts and std == 0 and self.router != "calibrated":
            return "all slices are chosen, with weight 1"
        return ""

    def inexact(self, config: RoutedLlamaConfig) -> str:
        if self.top_k == self.num_experts:
            how = "fitted" if self.router == "calibrated" else "drawn"
            return refit_statement(self, f"every slice is on, weighed by a {how} router")
        text = f"{self.top_k} of {self.num_experts} slices of each MLP are on per token"
        text += "; what is left out is to be made up for by training"
        return refit_statement(self, text)

    def warnings(self) -> tuple[str, ...]:
        assert self.router_init is not None
        if self.router == "calibrated":
            return ()
        return idle_warning(router_std(self.router_init), self.num_experts, self.top_k)


def stack_experts(target: Target, layer: int, experts: list[MLP]) -> None:
    """Put experts into the plan as the model stacks them."""
    at = f"model.layers.{layer}.mlp.experts"
    target.plan[f"{at}.gate_up_proj"] = Stack(tuple(Concat((g, u)) for g, u, _ in experts))
    target.plan[f"{at}.down_proj"] = Stack(tuple(d for _, _, d in experts))


def slice_of(mlp: MLP, order: Order, start: int, stop: int, factor: float) -> MLP:
    """The neurons start..stop of an order, their output times `factor`."""
    gate, up, down = mlp
    rows = [Take(m, order, start, stop, axis=0) for m in (gate, up)]
    return rows[0], rows[1], scaled(Take(down, order, start, stop, axis=1), factor)


def cut_mlp(
    target: Target, layer: int, partition: str, num_experts: int, shared: int, factor: float
) -> Order:
    """Slices of a layer's MLP into the plan: the shared one as it is, the others times `factor`.

    Returns the order that they are slices of.
    """
    mlp = target.pop_mlp(layer)
    at = f"model.layers.{layer}.mlp"
    order: Order = FittedOrder(layer, target.fits)
    if partition != COACTIVATION:
        given = num_experts, shared, f"{target.seed}/{at}", target.activations
        order = order_of(partition, layer, mlp[0], *given)
    width = (mlp[0].shape[0] - shared) // num_experts
    edges = [shared + i * width for i in range(num_experts)]
    stack_experts(
        target, layer, [slice_of(mlp, order, first, first + width, factor) for first in edges]
    )
    if shared:
        names = ("gate_proj", "up_proj", "down_proj")
        for name, part in zip(names, slice_of(mlp, order, 0, shared, 1), strict=True):
            target.plan[f"{at}.shared_expert.{name}.weight"] = part
    return order


def slice_problems(width: int, shared: int, num_experts: int, option: str) -> list[str]:
    """What is impossible about slices of `width` neurons."""
    if not 0 <= shared < width:
        return [f"--shared-neurons {shared}: of {width} neurons, 0 to {width - 1} can be shared."]
    if num_experts >= 1 and (width - shared) % num_experts:
        rest = f"{width} neurons" + (f" less {shared} shared" if shared else "")
        return [
            f"{option} {num_experts} does not divide the MLP's {rest}. Use one of "
            f"{divisors(width - shared)}."
        ]
    return []


def idle_warning(std: float, num_experts: int, top_k: int) -> tuple[str, ...]:
    """That a router of zeros leaves experts idle."""
    if std > 0 or top_k == num_experts:
        return ()
    return (
        f"--router-init zero ties all experts: every token goes to the first {top_k}, the other "
        f"{num_experts - top_k} stay idle until the router moves.",
    )
