"""Where the routers of a mixture are: ours, and those of transformers' own families.

    for site in sites(model): ...          # every place where a token chooses among parts

An entry of FAMILIES is read off a family's router: its class, the order of its steps, the names of
its settings. `moe.tune.foreign` computes what an entry says and holds it against the module.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from moe.errors import UserError
from moe.model.router import (
    CalibratedRouter,
    ExpertRouter,
    NormRouter,
    SoftRouter,
    TwoStageRouter,
)
from moe.model.spec import UoEMLP, routed_on
from moe.model.union import UnionRouter

Part = Literal["mlp", "attention"]
PARTS: tuple[Part, ...] = ("mlp", "attention")
OURS = (ExpertRouter, NormRouter, TwoStageRouter, CalibratedRouter, SoftRouter, UnionRouter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One router: of a layer's MLP or attention."""

    layer: int  # of all decoder layers, dense ones counted, from 0
    part: Part
    experts: int  # experts, heads, KV groups or attention experts
    top_k: int  # on per token, those that always are included; in mode budget a rounded mean
    kind: str  # softmax, sigmoid, chosen (softmax of them); moh, two_stage, calibrated, bam, uoe
    module: str  # the router's name in the model
    selection_bias: bool = False  # a bias on the choice that weights do not feel
    bias: bool = False  # a learned one on the logits, where these do nothing but choose
    renormalises: bool = True  # a token's weights add up to the same whatever is chosen
    always: tuple[int, ...] = ()  # on for every token, whatever a router says
    groups: int = 1
    top_groups: int = 1  # groups that a token may choose from
    mode: str = "token_choice"

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.part}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How a router of transformers makes weights [T, K] and indices [T, K] of its logits [T, E]."""

    router: str  # its class; it returns logits, weights and indices, in any order
    score: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    wide: bool = False  # logits are a float32 product
    renormalise: bool | str = True  # or the name of the setting that says so
    scale: str | None = None  # setting by which weights are multiplied
    logits_bias: str | None = None  # parameter added to the logits
    selection_bias: str | None = None  # buffer added to the scores to choose by
    groups: tuple[str, str] | None = None  # settings: how many, and how many a token chooses from
    group_score: Literal["best", "two best"] = "two best"
    grouped_if: tuple[str, str] | None = None  # a setting, and its value with which groups count


_DEEPSEEK_V3: dict[str, Any] = {
    "score": "sigmoid",
    "wide": True,
    "renormalise": "norm_topk_prob",
    "scale": "routed_scaling_factor",
    "selection_bias": "e_score_correction_bias",
    "groups": ("num_group", "topk_group"),
}
FAMILIES: dict[str, Family] = {
    "mixtral": Family(router="MixtralTopKRouter"),
    "qwen2_moe": Family(router="Qwen2MoeTopKRouter", renormalise="norm_topk_prob"),
    "qwen3_moe": Family(router="Qwen3MoeTopKRouter", renormalise="norm_topk_prob"),
    "olmoe": Family(router="OlmoeTopKRouter", renormalise="norm_topk_prob"),
    "granitemoe": Family(router="GraniteMoeTopKRouter", score="chosen"),
    "granitemoeshared": Family(router="GraniteMoeSharedTopKRouter", score="chosen"),
    "deepseek_v2": Family(
        router="DeepseekV2TopkRouter",
        wide=True,
        renormalise=False,
        scale="routed_scaling_factor",
        groups=("num_group", "topk_group"),
        group_score="best",
        grouped_if=("topk_method", "group_limited_greedy"),
    ),
    "deepseek_v3": Family(router="DeepseekV3TopkRouter", **_DEEPSEEK_V3),
    "glm4_moe": Family(router="Glm4MoeTopkRouter", **_DEEPSEEK_V3),
    "gpt_oss": Family(router="GptOssTopKRouter", score="chosen", logits_bias="bias"),
}


def sites(model: nn.Module) -> list[Site]:
    """Every router of a mixture, layer by layer, the MLP's before the attention's.

    Raises UserError for a model without routers and for a family without an entry.
    """
    family = model_type(model)
    found = []
    for name, module in model.named_modules():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer is None:
            continue
        site = _ours(model, int(layer[1]), name, module)
        if site is None and family in FAMILIES:
            entry = FAMILIES[family]
            if type(module).__name__ == entry.router:
                site = _of_family(int(layer[1]), name, module, entry)
        if site is not None:
            found.append(site)
    if not found:
        raise UserError(_nothing_found(model, family))
    return sorted(found, key=lambda site: (site.layer, PARTS.index(site.part)))


def model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def columns(found: list[Site]) -> list[int]:
    """Where each site's experts begin when those of all sites stand in one row; last, their sum."""
    starts = [0]
    for site in found:
        starts.append(starts[-1] + site.experts)
    return starts


def _ours(model: nn.Module, layer: int, name: str, module: nn.Module) -> Site | None:
    if isinstance(module, ExpertRouter):
        spec = module.spec
        return Site(
            layer=layer, part="mlp", experts=spec.num_experts, top_k=spec.top_k, kind=spec.score,
            module=name, selection_bias=spec.selection_bias, renormalises=spec.renormalise,
            groups=spec.num_groups, top_groups=spec.top_groups or spec.num_groups,
        )  # fmt: skip
    if isinstance(module, NormRouter | TwoStageRouter | CalibratedRouter):
        units = module.heads if isinstance(module, TwoStageRouter) else module.units
        always = tuple(sorted(set(range(units.total)) - set(units.routed)))
        heads = module.spec
        budget = heads.budget == "threshold"
        return Site(
            layer=layer, part="attention", experts=units.total, module=name,
            kind="moh" if heads.router == "qnorm" else heads.router, always=always,
            top_k=max(1, round(routed_on(heads) + len(always))),
            mode="budget" if budget else "token_choice", bias=heads.router == "calibrated",
        )  # fmt: skip
    if isinstance(module, SoftRouter):
        experts = len(module.weight)
        return Site(
            layer=layer, part="attention", experts=experts, top_k=experts, kind="bam", module=name
        )
    if isinstance(module, UnionRouter):
        union = module.spec
        return Site(
            layer=layer, part="mlp" if isinstance(union, UoEMLP) else "attention",
            experts=union.num_experts, top_k=max(1, round(routed_on(union))), kind="uoe",
            module=name,
            selection_bias=module.mode == "threshold", mode=module.mode,
            bias=module.bias is not None and union.weights == "hard",
        )  # fmt: skip
    return None


def _of_family(layer: int, name: str, router: Any, family: Family) -> Site:
    groups, top_groups = limits(router, family)
    return Site(
        layer=layer, part="mlp", experts=router.num_experts, top_k=router.top_k, kind=family.score,
        module=name, selection_bias=family.selection_bias is not None,
        renormalises=family.score == "chosen" or renormalises(router, family), groups=groups,
        top_groups=top_groups,
    )  # fmt: skip


def renormalises(router: Any, family: Family) -> bool:
    """Whether a family's router makes a token's weights add up to one number."""
    how = family.renormalise
    return bool(getattr(router, how)) if isinstance(how, str) else how


def limits(router: Any, family: Family) -> tuple[int, int]:
    """Groups of experts, and from how many of them a token may choose."""
    if family.groups is None:
        return 1, 1
    if (
        family.grouped_if is not None
        and getattr(router, family.grouped_if[0]) != family.grouped_if[1]
    ):
        return 1, 1
    groups, top_groups = (getattr(router, name) for name in family.groups)
    return groups or 1, top_groups or groups or 1


def _nothing_found(model: nn.Module, family: str) -> str:
    known = ", ".join(["routed_llama", *FAMILIES])
    if family == "routed_llama":
        return "this model has no router: every attention and MLP of it is dense."
    if family in FAMILIES:
        return (
            f"no module of class {FAMILIES[family].router} is in this {family}: it has no layer of "
            "experts, or it was loaded with a library that replaces routers."
        )
    suspects = sorted(
        {
            f"{type(module).__name__} ({name.rpartition('.')[2]})"
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in ("router", "gate", "gating")
            or any(word in type(module).__name__.lower() for word in ("router", "gating"))
        }
    )
    if not suspects:
        return f"this {family} has no router: is it dense? Mixtures known here are {known}."
    candidates = f" Its modules {', '.join(suspects)} may be the routers."
    return (
        f"family {family!r} is not known here; known are {known}. An entry in "
        "moe/tune/families.py would need: the class of its router, whether that returns logits, "
        "weights and indices, how scores are made of logits, whether weights are renormalised or "
        f"scaled, and its biases and groups.{candidates}"
    )
