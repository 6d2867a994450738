"""Mixtures of several models of one shape: BTX (FFN experts) and BAM (attention experts too)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from moe.errors import UserError, raise_all
from moe.model import RoutedLlamaConfig
from moe.model.spec import BAMAttention, MoEMLP, to_dict
from moe.upcycle.calibrate.parts import Branches, Name
from moe.upcycle.expression import Concat, Expression, Mapped
from moe.upcycle.rearrange import Beside, Given, Mean, Repeat, Rows, Take
from moe.upcycle.recipes.experts import stack_experts
from moe.upcycle.recipes.fitted import Router
from moe.upcycle.recipes.seam import (
    ROUTER_STD,
    Purpose,
    Target,
    balance,
    group_problems,
)

BranchTarget = Literal["label", "loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BTX:
    """The FFNs of several models as experts, everything else their mean (Branch-Train-Mix)."""

    name: ClassVar[str] = "btx"
    parts: ClassVar[tuple[Name, ...]] = ("mlp",)

    top_k: int = 2
    groups: int = 1  # of consecutive sources; a token uses those of top_groups (None: of all)
    top_groups: int | None = None
    ffn_weights: Literal["raw", "renorm"] = "renorm"
    router: Router | None = None
    target: BranchTarget | None = None  # None: label where the text has labels
    purpose: Purpose = "train"

    def fitted(self) -> Self:
        """The same with a router that text is for."""
        return dataclasses.replace(self, router="calibrated")

    @property
    def reads_text(self) -> bool:
        return self.router == "calibrated"

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        problems = mixture_problems(self.name, self.top_k, sources) + router_problems(self)
        raise_all(problems)
        raise_all(group_problems(sources, self.top_k, self.groups, self.top_groups))
        return dataclasses.replace(self, router=self.router or "random")

    def apply(self, target: Target) -> str:
        average(target)
        mix_mlps(target, self, self.groups, self.top_groups)
        return same_source(target, self.ffn_weights)

    def inexact(self, config: RoutedLlamaConfig) -> str:
        return "FFNs of several models under one router, everything else averaged"

    def warnings(self) -> tuple[str, ...]:
        return raw_warning(self.ffn_weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class BAM:
    """FFNs as experts and attentions as attention experts, the rest averaged (arXiv 2408.08274).

    `block` None: the sources' own. A sequential model is made parallel only with `convert_block`.
    """

    name: ClassVar[str] = "bam"
    parts: ClassVar[tuple[Name, ...]] = ("attention", "mlp")

    top_k: int = 2
    kv: Literal["expert", "shared"] = "expert"
    block: Literal["sequential", "parallel"] | None = None
    convert_block: bool = False
    ffn_weights: Literal["raw", "renorm"] = "renorm"
    router: Router | None = None
    target: BranchTarget | None = None  # None: label where the text has labels
    purpose: Purpose = "train"

    def fitted(self) -> Self:
        """The same with routers that text is for."""
        return dataclasses.replace(self, router="calibrated")

    @property
    def reads_text(self) -> bool:
        return self.router == "calibrated"

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        problems = mixture_problems(self.name, self.top_k, sources) + router_problems(self)
        block: Any = self.block or config.block
        if config.attention_output_bias:
            problems.append(
                "attention_output_bias=True: a mixture of attentions has one output projection, "
                "and no place for a bias per expert."
            )
        if block == "sequential" and config.block == "parallel":
            problems.append("--block sequential: the sources are parallel, their blocks stay so.")
            block = config.block
        if block == "parallel" and config.block == "sequential" and not self.convert_block:
            problems.append(
                "--block parallel: the sources are sequential, their MLPs read what attention "
                "wrote. A parallel block computes something else, to be healed by training. To do "
                "it all the same, and have the difference measured, add --convert-block."
            )
        if self.convert_block and (block, config.block) != ("parallel", "sequential"):
            problems.append(
                f"--convert-block: nothing is converted, the sources are {config.block} and the "
                f"result is to be {block}. Add --block parallel, or leave it out."
            )
        raise_all(problems)
        return dataclasses.replace(self, block=block, router=self.router or "random")

    def apply(self, target: Target) -> str:
        average(target)
        converted = self.block == "parallel" and target.config.block == "sequential"
        spec = BAMAttention(num_experts=len(target.sources), kv=self.kv)
        target.set_parts("attention", to_dict(spec))
        for layer in target.layers:
            mix_attention(target, layer, self.kv)
            place_router(target, self, "attention", layer)
        mix_mlps(target, self)
        if converted:
            make_parallel(target)
            return ""
        return same_source(target, self.ffn_weights)

    def inexact(self, config: RoutedLlamaConfig) -> str:
        kept = {"expert": "each with its own keys and values", "shared": "keys and values averaged"}
        text = (
            f"FFNs and attentions of several models under routers, {kept[self.kv]}, everything "
            "else averaged"
        )
        return text + ("; sequential blocks made parallel" if self.convert_block else "")

    def warnings(self) -> tuple[str, ...]:
        return raw_warning(self.ffn_weights)


def mixture_problems(name: str, top_k: int, sources: int) -> list[str]:
    """What is impossible about a mixture of `sources` models."""
    if sources < 2:
        return [
            f"`{name}` mixes several models: give --source for each, the seed too (the same folder "
            "may be given more than once)."
        ]
    if not 1 <= top_k <= sources:
        return [f"--top-k {top_k} must be between 1 and the {sources} sources."]
    return []


def router_problems(recipe: BTX | BAM) -> list[str]:
    """A target where nothing is fitted."""
    if recipe.target is None or recipe.router == "calibrated":
        return []
    return [
        f"--target {recipe.target} is for --router calibrated. Leave it out, or give --router "
        "calibrated and --calibrate FILE."
    ]


def average(target: Target) -> None:
    """Every tensor the mean of the sources'."""
    for name in list(target.plan):
        target.plan[name] = Mean(tuple(plan[name] for plan in target.sources))


def same_source(target: Target, ffn_weights: str) -> str:
    """Why a mixture of one model with itself is that model; empty where it is not one."""
    same = all(plan == target.sources[0] for plan in target.sources)
    if same and ffn_weights == "renorm":
        return "the sources are one model, weights over its copies sum to 1"
    return ""


def raw_warning(ffn_weights: str) -> tuple[str, ...]:
    if ffn_weights == "renorm":
        return ()
    return (
        "--ffn-weights raw: FFN outputs are scaled by probabilities that sum to less than 1, as in "
        "the paper; the mixture begins far from all of its sources.",
    )


def mix_mlps(
    target: Target, recipe: BTX | BAM, groups: int = 1, top_groups: int | None = None
) -> None:
    """The sources' FFNs as experts, one router."""
    spec = MoEMLP(
        num_experts=len(target.sources),
        top_k=recipe.top_k,
        renormalise=recipe.ffn_weights == "renorm",
        num_groups=groups,
        top_groups=top_groups,
        balance_coef=balance(recipe.purpose),
        z_coef=0.001 if recipe.purpose == "train" else 0.0,
    )
    target.set_parts("mlp", to_dict(spec))
    for layer in target.layers:
        at = f"model.layers.{layer}.mlp"
        target.pop_mlp(layer)
        experts = []
        for plan in target.sources:
            gate, up, down = (plan[f"{at}.{n}_proj.weight"] for n in ("gate", "up", "down"))
            experts.append((gate, up, down))
        stack_experts(target, layer, experts)
        place_router(target, recipe, "mlp", layer)


def place_router(target: Target, recipe: BTX | BAM, part: Name, layer: int) -> None:
    """A router between the sources: drawn, or to be fitted to text."""
    branches = Branches(recipe.parts, len(target.sources), recipe.target)
    if recipe.router == "calibrated":
        target.fit_branches(branches, part, layer)
    else:
        target.draw_router(branches.router(part, layer), branches.count, ROUTER_STD)


def mix_attention(target: Target, layer: int, kv: str) -> None:
    """The sources' attentions as groups of heads of one wide one, in the order of moe.model."""
    config, count = target.config, len(target.sources)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    assert groups is not None and config.head_dim is not None
    at = f"model.layers.{layer}.self_attn"

    def each(name: str) -> list[Expression]:
        return [plan[f"{at}.{name}"] for plan in target.sources]

    def wide(parts: list[Expression], rows: int) -> Expression:
        """Rows of query heads: expert by expert, or with shared keys KV group by KV group."""
        if kv == "expert":
            return Concat(tuple(parts))
        size = rows // groups
        return Concat(
            tuple(Rows(p, g * size, (g + 1) * size) for g in range(groups) for p in parts)
        )

    for kind in ("weight", "bias"):
        if f"{at}.q_proj.{kind}" in target.plan:
            rows = heads * config.head_dim
            target.plan[f"{at}.q_proj.{kind}"] = wide(each(f"q_proj.{kind}"), rows)
            if kv == "expert":
                for name in (f"k_proj.{kind}", f"v_proj.{kind}"):
                    target.plan[f"{at}.{name}"] = Concat(tuple(each(name)))
    columns = torch.arange(count * heads * config.head_dim)
    if kv == "shared":
        columns = columns.view(count, groups, -1).transpose(0, 1).flatten()
    output = Beside(tuple(each("o_proj.weight")))
    order = Given(tuple(columns.tolist()))
    target.plan[f"{at}.o_proj.weight"] = Take(output, order, 0, len(columns), axis=1)
    if f"{at}.q_norm.weight" in target.plan:
        norms = [Repeat(n, heads) for n in each("q_norm.weight")]
        target.plan[f"{at}.q_norm.weight"] = wide(list(norms), heads)
        keys: Sequence[Expression] = each("k_norm.weight")
        if kv == "shared":
            keys = [Mean(tuple(keys))]
        target.plan[f"{at}.k_norm.weight"] = Concat(tuple(Repeat(k, groups) for k in keys))


def make_parallel(target: Target) -> None:
    """One norm per block: what the MLP's norm had more than attention's goes into its columns."""
    target.config.block = "parallel"
    for layer in range(target.config.num_hidden_layers):
        at = f"model.layers.{layer}"
        own = target.plan.pop(f"{at}.post_attention_layernorm.weight")
        shared = target.plan[f"{at}.input_layernorm.weight"]
        names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.experts.gate_up_proj")
        for name in names:
            if f"{at}.{name}" in target.plan:
                base = target.plan[f"{at}.{name}"]
                target.plan[f"{at}.{name}"] = Renormed(base, own, shared)


@dataclass(frozen=True, slots=True)
class Renormed(Mapped):
    """A matrix for inputs weighed by norm `now`, made of one for inputs weighed by norm `then`."""

    then: Expression
    now: Expression

    def rows(self, start: int, stop: int) -> Tensor:
        width = self.then.shape[0]
        then, now = (n.rows(0, width).double().T for n in (self.then, self.now))
        if bool((now == 0).any()):
            raise UserError(f"{self.now} holds zeros: what it hides cannot be brought back.")
        return (self.base.rows(start, stop).double() * (then / now)).to(self.dtype)

    def __str__(self) -> str:
        return f"{self.base} · {self.then} / {self.now}"
