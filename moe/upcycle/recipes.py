"""Recipes: from a dense model's config and tensors to a target config and a plan.

    conversion = convert(source, MoH(top_k=3), seed=0)

A recipe is a frozen dataclass of options with one method, `apply`; it reads no weights. It may
convert only some layers, and a source may be a RoutedLlama whose other part is routed already.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch

from moe.errors import Corrupt, UserError
from moe.hf.families import routed_config
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.model.spec import MoEMLP, MoHAttention, to_dict
from moe.upcycle.expression import Concat, Draw, Expression, Noise, Read, Redraw, Stack
from moe.upcycle.source import Source

Purpose = Literal["train", "serve"]
MAX_EXPERTS = 4096  # a slip of the keyboard is not worth a plan of a million tensors
ROUTER_STD = 0.02  # small, so that tokens spread: loads within ±30 % of even at 4 to 8 experts

Plan = dict[str, Expression]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a recipe asks the writer for, and what may be claimed about the result."""

    recipe: "Recipe"  # with its defaults spelled out
    config: RoutedLlamaConfig
    plan: Plan
    exact: bool  # whether the method preserves the function, up to rounding
    statement: str  # why it does, or what it changes
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MoH:
    """Attention heads that compete: `shared_heads` always on, `top_k` of the others per token."""

    name: ClassVar[str] = "moh"
    part: ClassVar[str] = "attention"

    router: Literal["qnorm", "two_stage"] = "qnorm"
    shared_heads: int | None = None  # None: half of them
    top_k: int | None = None  # None: so that three quarters are active
    granularity: Literal["head", "kv_group"] = "head"
    purpose: Purpose = "train"

    def resolved(self, config: RoutedLlamaConfig) -> Self:
        """With every default spelled out. Raises UserError where the numbers do not fit."""
        units = self._units(config)
        shared = units // 2 if self.shared_heads is None else self.shared_heads
        if not 0 <= shared < units:
            raise UserError(
                f"--shared-heads {shared}: of {units} {self._noun}, 0 to {units - 1} can be shared."
            )
        top_k = max(1, round(0.75 * units) - shared) if self.top_k is None else self.top_k
        recipe = dataclasses.replace(self, shared_heads=shared, top_k=top_k)
        kv_heads = config.num_key_value_heads
        assert kv_heads is not None
        if problems := recipe.spec().problems(config.num_attention_heads, kv_heads):
            raise UserError("\n".join(problems))
        return recipe

    def spec(self) -> MoHAttention:
        """The attention of a converted layer, of a resolved recipe."""
        assert self.shared_heads is not None and self.top_k is not None
        return MoHAttention(
            router=self.router,
            shared_heads=tuple(range(self.shared_heads)),
            top_k=self.top_k,
            granularity=self.granularity,
            balance_coef=0.01 if self.purpose == "train" else 0.0,
        )

    def apply(self, config: RoutedLlamaConfig, plan: Plan, layers: Sequence[int], seed: int) -> str:
        """Route the heads of `layers` in place; returns the statement, empty where inexact."""
        spec = self.spec()
        routed = self._units(config) - len(spec.shared_heads)
        every = spec.top_k == routed
        _set_parts(config, "attention", layers, to_dict(spec))
        if spec.router == "two_stage":
            hidden, dtype = config.hidden_size, plan["model.norm.weight"].dtype
            sizes = {"routed": routed}
            if spec.shared_heads:
                sizes |= {"shared": len(spec.shared_heads), "mix": 2}
            # zero rows make every weight exactly 1, but below k = R all heads would tie
            std = 0.0 if every else 1e-2 * hidden**-0.5
            for layer in layers:
                for name, size in sizes.items():
                    key = f"model.layers.{layer}.self_attn.router.{name}.weight"
                    plan[key] = Draw((size, hidden), dtype, std, f"{seed}/{key}")
        return "every head is on with weight 1" if every else ""

    def inexact(self, config: RoutedLlamaConfig) -> str:
        spec, units = self.spec(), self._units(config)
        shared = len(spec.shared_heads)
        return (
            f"{shared + spec.top_k} of {units} {self._noun} are on per token ({shared} always, "
            f"{spec.top_k} of {units - shared} chosen), the rest are left out"
        )

    @property
    def _noun(self) -> str:
        return "KV groups" if self.granularity == "kv_group" else "heads"

    def _units(self, config: RoutedLlamaConfig) -> int:
        """How many heads, or KV groups, there are to choose from."""
        grouped = config.num_key_value_heads if self.granularity == "kv_group" else None
        return grouped or config.num_attention_heads

    def warnings(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Each MLP copied into `num_experts` experts, `top_k` per token, weights summing to 1."""

    name: ClassVar[str] = "copy"
    part: ClassVar[str] = "mlp"

    num_experts: int
    top_k: int
    router_init: str | None = None  # normal:STD or zero; None: normal:0.02
    diversify: str = "none"  # none, noise:S, drop:R
    purpose: Purpose = "train"

    def resolved(self, config: RoutedLlamaConfig) -> Self:
        """With every default spelled out. Raises UserError with all that is impossible."""
        recipe = dataclasses.replace(self, router_init=self.router_init or f"normal:{ROUTER_STD}")
        problems = []
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            problems.append(
                f"--num-experts {self.num_experts} must be between 1 and {MAX_EXPERTS}."
            )
        elif not 1 <= self.top_k <= self.num_experts:
            problems.append(f"--top-k {self.top_k} must be between 1 and {self.num_experts}.")
        for parse in (recipe.router_std, recipe.diversity):
            try:
                parse()
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))
        return recipe

    def router_std(self) -> float:
        """Deviation of the drawn router rows; 0 for `zero`."""
        assert self.router_init is not None
        if self.router_init == "zero":
            return 0.0
        return _number(
            self.router_init, "--router-init", ("normal",), "normal:STD or zero", low=0.0
        )[1]

    def diversity(self) -> tuple[str, float]:
        """Method and amount by which the copies are told apart."""
        if self.diversify == "none":
            return "none", 0.0
        forms = "none, noise:S (deviation) or drop:R (share of neurons, 0 to 1)"
        kind, amount = _number(self.diversify, "--diversify", ("noise", "drop"), forms, low=0.0)
        if kind == "drop" and amount > 1:
            raise UserError(f"--diversify {self.diversify}: a share lies between 0 and 1.")
        return kind, amount

    def apply(self, config: RoutedLlamaConfig, plan: Plan, layers: Sequence[int], seed: int) -> str:
        """Replace the MLPs of `layers` in place; returns the statement, empty where inexact."""
        spec = MoEMLP(
            num_experts=self.num_experts,
            top_k=self.top_k,
            balance_coef=0.01 if self.purpose == "train" else 0.0,
        )
        _set_parts(config, "mlp", layers, to_dict(spec))
        for layer in layers:
            at = f"model.layers.{layer}.mlp"
            gate, up, down = (plan.pop(f"{at}.{n}_proj.weight") for n in ("gate", "up", "down"))
            experts = [
                self._expert(gate, up, down, f"{seed}/{at}/{expert}")
                for expert in range(self.num_experts)
            ]
            plan[f"{at}.experts.gate_up_proj"] = Stack(tuple(Concat((g, u)) for g, u, _ in experts))
            plan[f"{at}.experts.down_proj"] = Stack(tuple(d for _, _, d in experts))
            key = f"{at}.router.weight"
            shape = (self.num_experts, config.hidden_size)
            plan[key] = Draw(shape, gate.dtype, self.router_std(), f"{seed}/{key}")
        if self.diversity()[1] == 0:
            return "identical experts, weights over the chosen ones sum to 1"
        return ""

    def _expert(
        self, gate: Expression, up: Expression, down: Expression, key: str
    ) -> tuple[Expression, Expression, Expression]:
        kind, amount = self.diversity()
        if amount == 0:
            return gate, up, down
        if kind == "noise":
            noisy = [Noise(m, amount, f"{key}/{i}") for i, m in enumerate((gate, up, down))]
            return noisy[0], noisy[1], noisy[2]
        width = gate.shape[0]
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
        if self.router_std() == 0 and self.top_k < self.num_experts:
            return (
                f"--router-init zero ties all experts: every token goes to the first {self.top_k}, "
                f"the other {self.num_experts - self.top_k} stay idle until the router moves.",
            )
        return ()


Recipe = MoH | Copy
RECIPES: dict[str, Callable[..., Recipe]] = {"moh": MoH, "copy": Copy}


def convert(
    source: Source, recipe: Recipe, seed: int = 0, layers: str | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:  # fmt: skip
    """Config and plan of `recipe` on `source`. Raises UserError where they do not go together."""
    config = routed_config(source.config)
    chosen: list[int] = []
    problems: list[str] = []
    try:
        chosen = parse_layers(layers, config.num_hidden_layers)
        _require_dense(config, recipe, chosen)
    except UserError as error:
        problems.append(str(error))
    try:
        recipe = recipe.resolved(config)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    config.dtype = dtype or config.dtype
    plan = unchanged(source)
    if config.tie_word_embeddings:
        plan.pop("lm_head.weight", None)  # one tensor, stored once
    exact = recipe.apply(config, plan, chosen, seed)
    _check_names(plan, config, source)
    config.architectures = ["RoutedLlamaForCausalLM"]
    statement = exact or recipe.inexact(config)
    if dtype and any(torch.promote_types(e.dtype, dtype) != dtype for e in plan.values()):
        exact, statement = "", f"{statement}; weights are rounded to {str(dtype)[6:]}"
    return Conversion(
        recipe=recipe,
        config=config,
        plan=plan,
        exact=bool(exact),
        statement=statement,
        warnings=(*_left_behind(source), *recipe.warnings()),
    )


def _require_dense(config: RoutedLlamaConfig, recipe: Recipe, layers: Sequence[int]) -> None:
    """What a recipe converts must be dense still."""
    for layer in layers:
        spec = (
            config.attention_spec(layer) if recipe.part == "attention" else config.mlp_spec(layer)
        )
        if spec.kind != "dense":
            raise UserError(
                f"layer {layer} already has {spec.kind} {recipe.part}: `{recipe.name}` converts "
                f"dense {recipe.part}. Choose other layers with --layers, or another source."
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
    _check_names(plan, routed_config(source.config), source)
    return plan


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
        if tuple(wanted[name].shape) != tuple(expression.shape):
            raise Corrupt(
                f"{source.folder}: {name} is {tuple(expression.shape)}, its config says "
                f"{tuple(wanted[name].shape)}."
            )


def _set_parts(
    config: RoutedLlamaConfig, part: str, layers: Sequence[int], spec: dict[str, Any]
) -> None:
    """Give `layers` the specification; one entry for all layers where all are equal."""
    given = getattr(config, part)
    count = config.num_hidden_layers
    now = given if isinstance(given, list) else [given] * count
    specs = [spec if i in set(layers) else now[i] for i in range(count)]
    setattr(config, part, specs[0] if all(s == specs[0] for s in specs) else specs)
    if problems := config.problems():
        raise UserError("\n".join(problems))


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


def _number(
    text: str, option: str, kinds: Sequence[str], forms: str, low: float
) -> tuple[str, float]:
    kind, _, amount = text.partition(":")
    try:
        value = float(amount)
    except ValueError:
        value = float("nan")
    if kind not in kinds or not low <= value < float("inf"):
        raise UserError(f"{option} {text!r} is not understood. Use {forms}.")
    return kind, value
