"""From a dense model's config and tensors to a target config and a plan.

    conversion = convert([source], MoH(top_k=3), seed=0)

A recipe is a frozen dataclass of options; it reads no weights. It may convert only some layers, and
a source may be a RoutedLlama whose other part is routed already.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch

from moe.errors import Corrupt, UserError, problem, raise_all
from moe.hf.families import routed_config
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.upcycle.calibrate.parts import Fits
from moe.upcycle.expression import Cast, Read
from moe.upcycle.partition import Activations, require_text
from moe.upcycle.recipes.agreement import require_agreement
from moe.upcycle.recipes.seam import (
    Plan,
    Target,
)
from moe.upcycle.source import Source


class Recipe(Protocol):
    """A way to convert. Its fields are its options, None where a default depends on the model."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]  # of a layer, that it routes: attention, mlp

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        """With every default spelled out. Raises UserError with all that is impossible."""
        ...

    def apply(self, target: Target) -> str:
        """Change the target; returns why the function is preserved, nothing where it is not."""
        ...

    def inexact(self, config: RoutedLlamaConfig) -> str:
        """What an inexact conversion changes."""
        ...

    def warnings(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a recipe asks the writer for, and what may be claimed about the result."""

    recipe: Recipe  # with its defaults spelled out
    config: RoutedLlamaConfig
    plan: Plan
    exact: bool  # whether the method preserves the function, up to rounding
    statement: str  # why it does, or what it changes
    warnings: tuple[str, ...] = ()
    layers: Sequence[int] = ()
    fits: Fits = field(default_factory=Fits)  # what is to be fitted before the plan can be read


def convert(
    sources: Sequence[Source], recipe: Any, seed: int = 0, layers: str | None = None,
    dtype: torch.dtype | None = None, calibrate: Path | None = None,
) -> Conversion:  # fmt: skip
    """Config and plan of `recipe` on `sources`. Raises UserError where they do not go together."""
    source = sources[0]
    config = config_of(source)
    chosen: list[int] = []
    problems: list[str] = []
    try:
        chosen = parse_layers(layers, config.num_hidden_layers)
    except UserError as error:
        problems.append(str(error))
    problems += problem(_require_dense, config, recipe, chosen)
    problems += problem(require_agreement, sources, dtype)
    if calibrate is not None and getattr(recipe, "router", "") is None:
        recipe = recipe.fitted()
    try:
        recipe = recipe.resolved(config, len(sources))
    except UserError as error:
        problems.append(str(error))
    problems += problem(require_text, getattr(recipe, "reads_text", False), calibrate)
    raise_all(problems)
    config.dtype = dtype or config.dtype
    plans = _in_one_dtype([unchanged(s) for s in sources])
    if config.tie_word_embeddings:
        for plan in plans:
            plan.pop("lm_head.weight", None)  # one tensor, stored once
    target = Target(
        config=config, plan=dict(plans[0]), sources=plans, layers=chosen, seed=seed,
        activations=Activations(source.folder, calibrate) if calibrate else None, dtype=dtype,
    )  # fmt: skip
    exact = recipe.apply(target)
    _check_names(target.plan, config, source)
    config.architectures = ["RoutedLlamaForCausalLM"]
    statement = exact or recipe.inexact(config)
    if dtype and any(torch.promote_types(e.dtype, dtype) != dtype for e in target.plan.values()):
        exact, statement = "", f"{statement}; weights are rounded to {str(dtype)[6:]}"
    return Conversion(
        recipe=recipe,
        config=config,
        plan=target.plan,
        exact=bool(exact),
        statement=statement,
        warnings=(*_left_behind(source), *recipe.warnings()),
        layers=chosen,
        fits=target.fits,
    )


def _require_dense(config: RoutedLlamaConfig, recipe: Recipe, layers: Sequence[int]) -> None:
    """What a recipe converts must be dense still."""
    for layer in layers:
        specs = {"attention": config.attention_spec(layer), "mlp": config.mlp_spec(layer)}
        for part in recipe.parts:
            if specs[part].kind != "dense":
                raise UserError(
                    f"layer {layer} already has {specs[part].kind} {part}: `{recipe.name}` "
                    f"converts dense {part}. Choose other layers with --layers, or another source."
                )


def _left_behind(source: Source) -> tuple[str, ...]:
    """What a source brings that a result cannot take along."""
    if not getattr(source.config, "auto_map", None):
        return ()
    return (
        f"{source.folder}/config.json names code of its own (auto_map): it was not run, the model "
        f"is taken for a plain {source.config.model_type}, and the result does without it.",
    )


def unchanged(source: Source) -> Plan:
    """The plan that changes nothing. Raises Corrupt or UserError where the tensors are not those of
    the config's model.
    """
    plan: Plan = {
        name: Read(tensor)
        for name, tensor in source.tensors.items()
        if not name.endswith("rotary_emb.inv_freq")  # old checkpoints store what is computed
    }
    _check_names(plan, config_of(source), source)
    return plan


def _in_one_dtype(plans: list[Plan]) -> list[Plan]:
    """Each tensor in the widest dtype that a source has it in, so that they can be joined."""
    result: list[Plan] = [{} for _ in plans]
    for name in plans[0]:
        parts = [plan[name] for plan in plans if name in plan]
        wide = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        for plan, new in zip(plans, result, strict=True):
            if name in plan:
                part = plan[name]
                new[name] = part if part.dtype == wide else Cast(part, wide)
    return result


def config_of(source: Source) -> RoutedLlamaConfig:
    """The source's config as a RoutedLlama's. Raises UserError naming the folder and the field."""
    try:
        return routed_config(source.config)
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from None


def _check_names(plan: Plan, config: RoutedLlamaConfig, source: Source) -> None:
    """The plan must make exactly the model's tensors, in its shapes."""
    try:
        with torch.device("meta"):
            wanted = RoutedLlamaForCausalLM(config).state_dict()
    except Exception as error:  # transformers raises what it likes over an odd field
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source.folder}/config.json describes no model ({reason}).") from error
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    if missing := [n for n in wanted if n not in plan]:
        raise Corrupt(f"{source.folder}: {len(missing)} tensors are missing, first {missing[0]}.")
    for name, expression in plan.items():
        if name not in wanted:
            if name == "lm_head.weight":
                continue
            raise UserError(
                f"{source.folder}: tensor {name} has no place in a {config.source_model_type} "
                "model of this config. Is the config the checkpoint's own?"
            )
        if not expression.dtype.is_floating_point:
            stored = str(expression.dtype).removeprefix("torch.")
            raise UserError(f"{source.folder}: {name} is stored as {stored}: weights are floats.")
        if tuple(wanted[name].shape) != tuple(expression.shape):
            raise Corrupt(
                f"{source.folder}: {name} is {tuple(expression.shape)}, its config says "
                f"{tuple(wanted[name].shape)}."
            )


def parse_layers(text: str | None, count: int) -> list[int]:
    """`0-3,7` as layer numbers; None means all `count` of them."""
    if text is None:
        return list(range(count))
    layers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece.strip())
        if match is None:
            raise UserError(f"--layers {text!r} is not a list like 0-3,7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise UserError(f"--layers {text}: the model has layers 0 to {count - 1}.")
        layers.update(range(first, last + 1))
    return sorted(layers)
