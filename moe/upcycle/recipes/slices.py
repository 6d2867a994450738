"""A union of experts: one model's KV groups and FFN slices, of which each token gets some."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moe.errors import UserError, problem, raise_all
from moe.model import RoutedLlamaConfig
from moe.model.spec import Mode, UoEAttention, UoEMLP, Weights, to_dict
from moe.upcycle.calibrate.parts import Measure, Part
from moe.upcycle.expression import Draw
from moe.upcycle.rearrange import Order
from moe.upcycle.recipes.experts import cut_mlp, slice_problems
from moe.upcycle.recipes.fitted import (
    COACTIVATION,
    Partition,
    Router,
    fit_slices,
    kept_by_default,
    option_problems,
    refit_statement,
    shared_by_default,
    with_defaults,
)
from moe.upcycle.recipes.seam import (
    MAX_EXPERTS,
    Purpose,
    Target,
    balance,
    number,
)

PART_OF = {
    "mlp_top_k": "mlp", "mode": "mlp", "output_scale": "mlp", "partition": "mlp",
    "shared_neurons": "mlp", "mean_experts": "mlp",
    "attention_top_k": "attention", "sink_tokens": "attention",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class UoE:
    """Union of experts: attention, MLP, or both, by what is given. `*_top_k` None: half of them."""

    name: ClassVar[str] = "uoe"

    mlp_experts: int | None = None
    mlp_top_k: int | None = None
    attention_experts: int | None = None
    attention_top_k: int | None = None
    mode: Mode = "token_choice"  # the MLP's
    mean_experts: float | None = None  # slices on per token on average, in mode budget
    router: Router | None = None  # None: random
    target: Measure | None = None  # of what is calibrated; None: loss
    refit: bool = False  # fit the output projections to the parts that are on
    weights: Weights = "hard"
    output_scale: str = "1"  # of the MLP: 1, ratio (experts over top-k), calibrated, or a number
    partition: Partition | None = None  # None: contiguous, shared-coactivation if calibrated
    shared_neurons: int | None = None  # None: none, a quarter with shared-coactivation
    sink_tokens: int = 1
    purpose: Purpose = "train"

    @property
    def parts(self) -> tuple[str, ...]:
        given = {"attention": self.attention_experts, "mlp": self.mlp_experts}
        return tuple(part for part, experts in given.items() if experts is not None)

    def fitted(self) -> Self:
        """What is meant where there is a text to fit to and no router was named."""
        if self.partition == "activation" or self.output_scale == "calibrated":
            return self
        return dataclasses.replace(self, router="calibrated")

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        problems = self._options_of_other_parts()
        if not self.parts:
            problems.append("give --mlp-experts, --attention-experts, or both.")
        width = config.intermediate_size
        recipe = self._with_defaults(width)
        problems += option_problems(recipe, self) + recipe._mode_problems(self)
        for part, experts in (("mlp", self.mlp_experts), ("attention", self.attention_experts)):
            top_k = getattr(recipe, f"{part}_top_k")
            if experts is None:
                continue
            if not 1 <= experts <= MAX_EXPERTS:
                problems.append(f"--{part}-experts {experts} must be between 1 and {MAX_EXPERTS}.")
            elif top_k is not None and not 1 <= top_k <= experts:
                problems.append(f"--{part}-top-k {top_k} must be between 1 and {experts}.")
        if not problems and self.attention_experts is not None:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            assert groups is not None
            found = recipe.attention_spec().problems(heads, groups)
            problems += [_by_option(text) for text in found]
        if self.mlp_experts is not None:
            shared = recipe.shared_neurons or 0
            problems += slice_problems(width, shared, self.mlp_experts, "--mlp-experts")
            problems += problem(recipe.scale)
        raise_all(problems)
        return recipe

    def _with_defaults(self, width: int) -> Self:
        recipe = with_defaults(self)
        experts = self.mlp_experts
        shared = shared_by_default(recipe, width, experts)
        top_k, mean = _half(experts, self.mlp_top_k), self.mean_experts
        if self.mode == "budget":
            top_k = self.mlp_top_k
        if recipe.router == "calibrated" and experts is not None and experts >= 1:
            kept = kept_by_default(width, shared, experts)
            if self.mode == "budget":
                mean = round(kept, 4) if mean is None else mean
            elif self.mlp_top_k is None:
                top_k = round(kept)
        return dataclasses.replace(
            recipe,
            shared_neurons=shared,
            mlp_top_k=top_k,
            mean_experts=mean,
            attention_top_k=_half(self.attention_experts, self.attention_top_k),
        )

    def _mode_problems(self, given: "UoE") -> list[str]:
        """What an MLP's mode and its router, or number of slices, do not have in common."""
        found = []
        if self.mode == "budget":
            if self.router != "calibrated":
                found.append("--mode budget needs --router calibrated, which has its threshold.")
            if given.mlp_top_k is not None:
                found.append(
                    f"--mlp-top-k {given.mlp_top_k}: --mode budget fixes no number per token. Give "
                    "--mean-experts."
                )
            most = self.mlp_experts or 0
            if self.mean_experts is not None and not 0 < self.mean_experts <= most:
                found.append(
                    f"--mean-experts {self.mean_experts:g} must be more than 0 and at most {most}."
                )
            if self.weights != "hard":
                found.append("--weights soft: --mode budget has slices on or off. Use hard.")
        elif given.mean_experts is not None:
            found.append(f"--mean-experts {given.mean_experts:g} needs --mode budget.")
        if self.router == "calibrated" and self.mode not in ("token_choice", "budget"):
            found.append(
                f"--mode {self.mode} has no calibrated router. Use token_choice or budget, or "
                "--router random."
            )
        return found

    def _options_of_other_parts(self) -> list[str]:
        """Options of a part that is not converted, which would say nothing."""
        problems = []
        for field in dataclasses.fields(self):
            value, part = getattr(self, field.name), PART_OF.get(field.name)
            if part and part not in self.parts and value != field.default:
                option = field.name.replace("_", "-")
                problems.append(f"--{option} {value} needs --{part}-experts.")
        return problems

    def scale(self) -> float:
        """The MLP's output scale as a number."""
        assert self.mlp_experts is not None
        if self.output_scale == "ratio":
            return self.mlp_experts / (self.mlp_top_k or self.mean_experts or self.mlp_experts)
        if self.output_scale == "calibrated":
            return 1.0  # until it is fitted, layer by layer
        forms = "1, ratio (experts over top-k), calibrated or a positive number"
        value = number(f"x:{self.output_scale}", "--output-scale", ("x",), forms)[1]
        if value == 0:
            raise UserError(f"--output-scale {self.output_scale}: use {forms}.")
        return value

    def attention_spec(self) -> UoEAttention:
        assert self.attention_experts is not None and self.attention_top_k is not None
        return UoEAttention(
            num_experts=self.attention_experts,
            top_k=self.attention_top_k,
            sink_tokens=self.sink_tokens,
            router_bias=self.router == "calibrated",
            weights=self.weights,
            balance_coef=balance(self.purpose),
        )

    def mlp_spec(self) -> UoEMLP:
        assert self.mlp_experts is not None and self.shared_neurons is not None
        return UoEMLP(
            num_experts=self.mlp_experts,
            top_k=self.mlp_top_k or 0,
            shared_intermediate_size=self.shared_neurons,
            mode=self.mode,
            mean_experts=self.mean_experts or 0.0,
            router_bias=self.router == "calibrated",
            weights=self.weights,
            output_scale=self.scale(),
            balance_coef=balance(self.purpose),
        )

    def apply(self, target: Target) -> str:
        std = 1e-2 * target.config.hidden_size**-0.5  # never zero: all experts would tie
        if self.attention_experts is not None:
            target.set_parts("attention", to_dict(self.attention_spec()))
        if self.mlp_experts is not None:
            target.set_parts("mlp", to_dict(self.mlp_spec()))
        orders: dict[int, Order] = {}
        self._fit(target, orders)
        for layer in target.layers:
            at = f"model.layers.{layer}"
            if self.attention_experts is not None and self.router != "calibrated":
                name = f"{at}.self_attn.router.weight"
                target.draw_router(name, self.attention_experts, std)
            if self.mlp_experts is not None:
                experts, shared = self.mlp_experts, self.shared_neurons
                assert self.partition is not None and shared is not None
                orders[layer] = cut_mlp(target, layer, self.partition, experts, shared, 1)
                if self.router != "calibrated":
                    target.draw_router(f"{at}.mlp.router.weight", experts, std)
                if self.mode == "threshold":  # in float32 in a model of any dtype
                    name = f"{at}.mlp.router.selection_bias"
                    target.plan[name] = Draw((experts,), torch.float32, 0.0, name)
        return "every expert is on with weight 1" if self._everything_is_on() else ""

    def _fit(self, target: Target, orders: dict[int, Order]) -> None:
        """Have fitted what is calibrated, of attention and MLP."""
        if self.attention_experts is not None and self.router == "calibrated":
            assert self.attention_top_k is not None and self.target is not None
            target.fit(
                Part(
                    name="attention",
                    units=self.attention_experts,
                    keep=float(self.attention_top_k),
                    measure=self.target,
                    budget="topk",
                    refit=self.refit,
                    noun="KV groups",
                    drawn=True,
                )
            )
        if self.mlp_experts is not None:
            budget = "threshold" if self.mode == "budget" else "topk"
            keep = float(self.mean_experts or self.mlp_top_k or 0)
            fit_slices(target, self, self.mlp_experts, orders, budget=budget, keep=keep)

    @property
    def fits_scales(self) -> bool:
        """Whether output scales are to be fitted to text; where all is on there is nothing to."""
        partial = self.mlp_experts is not None and self.mlp_top_k != self.mlp_experts
        return self.output_scale == "calibrated" and partial

    @property
    def reads_text(self) -> bool:
        """Whether the recipe is fitted to `--calibrate` text."""
        fitted = self.router == "calibrated" or self.partition in ("activation", COACTIVATION)
        return fitted or self.fits_scales

    def _everything_is_on(self) -> bool:
        attention = self.attention_top_k == self.attention_experts
        mlp = self.mlp_experts is None or (
            self.mlp_top_k == self.mlp_experts and self.mode != "threshold" and self.scale() == 1
        )
        return attention and mlp and self.weights == "hard" and not self.refit

    def inexact(self, config: RoutedLlamaConfig) -> str:
        changed = []
        if self.attention_experts is not None:
            changed.append(f"{self.attention_top_k} of {self.attention_experts} parts of attention")
        if self.mlp_experts is not None:
            count = f"{self.mlp_top_k}"
            if self.mode == "budget":
                count = f"on average {self.mean_experts:g}"
            changed.append(f"{count} of {self.mlp_experts} slices of the MLP")
        text = f"a token gets {' and '.join(changed)}"
        if self.weights == "soft":
            text += f", weighed by a {'fitted' if self.router == 'calibrated' else 'drawn'} router"
        if self.attention_top_k != self.attention_experts or self.mlp_top_k != self.mlp_experts:
            text += "; what is left out is to be made up for by training"
        return refit_statement(self, text)

    def warnings(self) -> tuple[str, ...]:
        if self.mlp_experts is None or self.mode not in ("expert_choice", "sequence"):
            return ()
        return (
            f"--mode {self.mode} is not causal while a sequence is scored as a whole: its "
            "perplexity means nothing"
            + (", and it does not generate." if self.mode == "expert_choice" else "."),
        )


def _by_option(text: str) -> str:
    """A specification's problem, by the name of the option that gave the value."""
    renamed = text.replace("attention.num_experts=", "--attention-experts ")
    return renamed.replace("attention.sink_tokens=", "--sink-tokens ")


def _half(experts: int | None, top_k: int | None) -> int | None:
    return max(1, experts // 2) if top_k is None and experts is not None else top_k
