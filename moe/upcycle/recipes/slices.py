"""A union of experts: one model's KV groups and FFN slices, of which each token gets some."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from moe.errors import UserError, problem, raise_all
from moe.model import RoutedLlamaConfig
from moe.model.spec import Mode, UoEAttention, UoEMLP, Weights, to_dict
from moe.upcycle.expression import Draw
from moe.upcycle.recipes.experts import cut_mlp, slice_problems
from moe.upcycle.recipes.seam import (
    MAX_EXPERTS,
    Purpose,
    Target,
    balance,
    number,
)

PART_OF = {
    "mlp_top_k": "mlp", "mode": "mlp", "output_scale": "mlp", "partition": "mlp",
    "shared_neurons": "mlp", "attention_top_k": "attention", "sink_tokens": "attention",
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
    weights: Weights = "hard"
    output_scale: str = "1"  # of the MLP: 1, ratio (experts over top-k), calibrated, or a number
    partition: Literal["contiguous", "random", "kmeans", "activation"] = "contiguous"
    shared_neurons: int = 0
    sink_tokens: int = 1
    purpose: Purpose = "train"

    @property
    def parts(self) -> tuple[str, ...]:
        given = {"attention": self.attention_experts, "mlp": self.mlp_experts}
        return tuple(part for part, experts in given.items() if experts is not None)

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        problems = self._options_of_other_parts()
        if not self.parts:
            problems.append("give --mlp-experts, --attention-experts, or both.")
        recipe = dataclasses.replace(
            self,
            mlp_top_k=_half(self.mlp_experts, self.mlp_top_k),
            attention_top_k=_half(self.attention_experts, self.attention_top_k),
        )
        for part, experts in (("mlp", self.mlp_experts), ("attention", self.attention_experts)):
            top_k = getattr(recipe, f"{part}_top_k")
            if experts is None:
                continue
            if not 1 <= experts <= MAX_EXPERTS:
                problems.append(f"--{part}-experts {experts} must be between 1 and {MAX_EXPERTS}.")
            elif not 1 <= top_k <= experts:
                problems.append(f"--{part}-top-k {top_k} must be between 1 and {experts}.")
        if not problems and self.attention_experts is not None:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            assert groups is not None
            found = recipe.attention_spec().problems(heads, groups)
            problems += [_by_option(text) for text in found]
        if self.mlp_experts is not None:
            width = config.intermediate_size
            args = width, self.shared_neurons, self.mlp_experts, "--mlp-experts"
            problems += slice_problems(*args) + problem(recipe.scale)
        raise_all(problems)
        return recipe

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
        assert self.mlp_experts is not None and self.mlp_top_k is not None
        if self.output_scale == "ratio":
            return self.mlp_experts / self.mlp_top_k
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
            weights=self.weights,
            balance_coef=balance(self.purpose),
        )

    def mlp_spec(self) -> UoEMLP:
        assert self.mlp_experts is not None and self.mlp_top_k is not None
        return UoEMLP(
            num_experts=self.mlp_experts,
            top_k=self.mlp_top_k,
            shared_intermediate_size=self.shared_neurons,
            mode=self.mode,
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
        for layer in target.layers:
            at = f"model.layers.{layer}"
            if self.attention_experts is not None:
                name = f"{at}.self_attn.router.weight"
                target.draw_router(name, self.attention_experts, std)
            if self.mlp_experts is not None:
                experts, shared = self.mlp_experts, self.shared_neurons
                cut_mlp(target, layer, self.partition, experts, shared, 1)
                target.draw_router(f"{at}.mlp.router.weight", experts, std)
                if self.mode == "threshold":  # in float32 in a model of any dtype
                    name = f"{at}.mlp.router.selection_bias"
                    target.plan[name] = Draw((experts,), torch.float32, 0.0, name)
        return "every expert is on with weight 1" if self._everything_is_on() else ""

    @property
    def fits_scales(self) -> bool:
        """Whether output scales are to be fitted to text; where all is on there is nothing to."""
        partial = self.mlp_experts is not None and self.mlp_top_k != self.mlp_experts
        return self.output_scale == "calibrated" and partial

    @property
    def reads_text(self) -> bool:
        """Whether the recipe is fitted to `--calibrate` text."""
        return self.partition == "activation" or self.fits_scales

    def _everything_is_on(self) -> bool:
        attention = self.attention_top_k == self.attention_experts
        mlp = self.mlp_experts is None or (
            self.mlp_top_k == self.mlp_experts and self.mode != "threshold" and self.scale() == 1
        )
        return attention and mlp and self.weights == "hard"

    def inexact(self, config: RoutedLlamaConfig) -> str:
        changed = []
        if self.attention_experts is not None:
            changed.append(f"{self.attention_top_k} of {self.attention_experts} parts of attention")
        if self.mlp_experts is not None:
            changed.append(f"{self.mlp_top_k} of {self.mlp_experts} slices of the MLP")
        text = f"a token gets {' and '.join(changed)}"
        if self.weights == "soft":
            text += ", weighed by a drawn router"
        if self.attention_top_k != self.attention_experts or self.mlp_top_k != self.mlp_experts:
            text += "; what is left out is to be made up for by training"
        return text

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
