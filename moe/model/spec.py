"""What one layer's attention or MLP is: a specification per kind, read from the config's JSON.

    spec = attention_spec({"kind": "moh", "shared_heads": [0, 1], "top_k": 3})

Each kind has its own fields; a field of another kind is refused like any misspelt one.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from moe.errors import UserError

BalanceNorm = Literal["code", "paper", "unit"]
"""Scale of a balance loss: MoH's code (R·ΣPf), its paper (ΣPf), or 1 when balanced (R/K·ΣPf)."""

BalanceScope = Literal["micro", "global"]
"""Tokens over which f, the load of each part, is counted: this forward pass, or a whole step."""

Weights = Literal["hard", "soft"]
"""hard: a chosen part counts once, its score gets a straight-through gradient. soft: k times its
share of the chosen parts' probability."""

Mode = Literal["token_choice", "threshold", "expert_choice", "sequence", "budget"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseAttention:
    """The LLaMA attention."""

    part: ClassVar[str] = "attention"
    kind: Literal["dense"] = "dense"

    def problems(self, heads: int, kv_heads: int) -> list[str]:
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class MoHAttention:
    """MoH (arXiv 2410.11842) with one of its two routers, or with a calibrated one.

    Heads are counted in the units of `granularity`: query heads, or whole KV groups. `calibrated`
    scores them from the attention's input, on or off; with `budget: threshold` each is on where its
    score is not negative, however many that makes, and a loss holds their mean to `mean_heads`.
    """

    part: ClassVar[str] = "attention"
    kind: Literal["moh"] = "moh"
    router: Literal["qnorm", "two_stage", "calibrated"] = "qnorm"
    shared_heads: tuple[int, ...] = ()  # always on; indices of heads (or of KV groups)
    top_k: int = 0  # routed heads kept per token, besides the shared ones
    budget: Literal["topk", "threshold"] = "topk"  # what is fixed: a token's heads, or their mean
    mean_heads: float = 0.0  # per token, the shared ones included; for budget threshold
    granularity: Literal["head", "kv_group"] = "head"
    straight_through: Literal["all", "selected"] = "all"  # which routed scores get a gradient
    differentiate_std: bool = True  # whether that gradient flows through the norms' deviation
    std_eps: float = 1e-6
    routed_scale: float = 1.0  # 1, or R/K to make up for the heads that are off
    balance_coef: float = 0.01
    balance_norm: BalanceNorm = "code"
    balance_scope: BalanceScope = "micro"

    def routed_heads(self, units: int) -> tuple[int, ...]:
        """Indices of the heads (or groups) that compete, in ascending order, out of `units`."""
        shared = set(self.shared_heads)
        return tuple(i for i in range(units) if i not in shared)

    def problems(self, heads: int, kv_heads: int) -> list[str]:
        """What is wrong with this specification for `heads` query and `kv_heads` KV heads."""
        units = kv_heads if self.granularity == "kv_group" else heads
        name = "KV groups" if self.granularity == "kv_group" else "heads"
        found = []
        if bad := [i for i in self.shared_heads if not 0 <= i < units]:
            found.append(
                f"attention.shared_heads={bad} is outside 0..{units - 1} ({units} {name})."
            )
        if len(set(self.shared_heads)) != len(self.shared_heads):
            found.append(f"attention.shared_heads={list(self.shared_heads)} repeats an index.")
        routed = units - len(set(self.shared_heads))
        if self.budget == "threshold":
            found += self._budget_problems(units, routed, name)
        elif not 1 <= self.top_k <= routed:
            found.append(
                f"attention.top_k={self.top_k} must be between 1 and {routed}: "
                f"{units} {name} less {units - routed} shared leave {routed} to choose from."
            )
        if self.budget == "topk" and self.mean_heads:
            found.append(
                f"attention.mean_heads={self.mean_heads:g} is for budget=threshold; with "
                "budget=topk a token has shared_heads and top_k."
            )
        if self.router == "two_stage" and self.granularity != "head":
            found.append("attention.router=two_stage routes single heads: use granularity=head.")
        return found

    def _budget_problems(self, units: int, routed: int, name: str) -> list[str]:
        found = []
        if self.router != "calibrated":
            found.append(
                f"attention.budget=threshold: router={self.router} has no threshold. Use "
                "router=calibrated, or budget=topk."
            )
        if not routed:
            found.append(
                f"attention.budget=threshold: all {units} {name} are shared, none is left to route."
            )
        elif not units - routed < self.mean_heads <= units:
            found.append(
                f"attention.mean_heads={self.mean_heads:g} must be more than the {units - routed} "
                f"shared and at most {units} {name}."
            )
        if self.top_k:
            found.append(
                f"attention.top_k={self.top_k}: budget=threshold fixes no number per token. Leave "
                "it out and say mean_heads."
            )
        if self.balance_scope == "global":
            found.append(
                "attention.balance_scope=global: budget=threshold has no balance loss, its own "
                "counts each forward pass. Leave it out."
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class BAMAttention:
    """BAM's soft mixture of attention experts (arXiv 2408.08274): all of them on every token.

    `kv: expert`: each expert has keys and values of its own, and the cache is `num_experts` times
    the dense one's; `shared`: one set of keys and values serves all.
    """

    part: ClassVar[str] = "attention"
    kind: Literal["bam"] = "bam"
    num_experts: int = 0
    kv: Literal["expert", "shared"] = "expert"

    def problems(self, heads: int, kv_heads: int) -> list[str]:
        if self.num_experts < 1:
            return [f"attention.num_experts={self.num_experts} must be at least 1."]
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class UoEAttention:
    """Union of experts (UoE): an expert is some whole KV groups, and a token visits `top_k`.

    An expert's queries see the keys of its own tokens alone; what is not selected gives no query,
    key or value. The first `sink_tokens` of a sequence visit every expert.
    """

    part: ClassVar[str] = "attention"
    kind: Literal["uoe"] = "uoe"
    num_experts: int = 0
    top_k: int = 0
    sink_tokens: int = 1
    router_bias: bool = False  # trained, added to the logits
    weights: Weights = "hard"
    balance_coef: float = 0.01
    balance_scope: BalanceScope = "micro"
    z_coef: float = 0.0

    def problems(self, heads: int, kv_heads: int) -> list[str]:
        found = _choice_problems(self, "attention")
        if self.num_experts >= 1 and kv_heads % self.num_experts:
            legal = [str(e) for e in range(1, kv_heads + 1) if kv_heads % e == 0]
            found.append(
                f"attention.num_experts={self.num_experts} does not divide the {kv_heads} KV "
                f"groups. Use one of {', '.join(legal)}."
            )
        if self.sink_tokens < 0:
            found.append(f"attention.sink_tokens={self.sink_tokens} < 0.")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMLP:
    """The LLaMA MLP."""

    part: ClassVar[str] = "mlp"
    kind: Literal["dense"] = "dense"
    intermediate_size: int | None = None  # the config's

    def problems(self, hidden_act: str, mlp_bias: bool) -> list[str]:
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEMLP:
    """`num_experts` gated FFNs of which each token visits `top_k`, weighted by their scores."""

    part: ClassVar[str] = "mlp"
    kind: Literal["moe"] = "moe"
    num_experts: int = 0
    top_k: int = 0
    intermediate_size: int | None = None  # of one expert; None: the config's
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True  # weights of the chosen experts sum to 1 (before weight_scale)
    weight_scale: float = 1.0
    shared_intermediate_size: int = 0  # of an expert that every token visits; 0: none
    selection_bias: bool = False  # a bias on the choice only, moved against the load (no loss)
    num_groups: int = 1  # of num_experts / num_groups experts each, in order
    top_groups: int | None = None  # whose experts a token may choose among; None: all
    balance_coef: float = 0.01
    balance_scope: BalanceScope = "micro"
    z_coef: float = 0.0

    @property
    def limited(self) -> bool:
        """Whether some groups of experts are out of a token's reach."""
        return self.top_groups is not None and self.top_groups < self.num_groups

    def problems(self, hidden_act: str, mlp_bias: bool) -> list[str]:
        """What is wrong with this specification in a model of this activation and bias."""
        return _expert_problems(self, hidden_act, mlp_bias) + _group_problems(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class UoEMLP:
    """Union of experts: slices of one FFN, of which each token gets `top_k` added up.

    Modes: `token_choice`, top_k experts per token; `threshold`, every expert whose score and
    selection bias reach 1/E, at least one; `budget`, every expert whose logit is not negative, none
    too, while a loss holds their mean to `mean_experts`; `expert_choice`, each expert's top_k/E
    share of a sequence; `sequence`, top_k experts for a whole prompt. The last two look ahead while
    a sequence is scored as a whole, `expert_choice` in any use.
    """

    part: ClassVar[str] = "mlp"
    kind: Literal["uoe"] = "uoe"
    num_experts: int = 0
    top_k: int = 0
    intermediate_size: int | None = None  # of one expert; None: the config's
    shared_intermediate_size: int = 0  # of a slice that every token visits; 0: none
    mode: Mode = "token_choice"
    mean_experts: float = 0.0  # per token, for mode budget
    router_bias: bool = False  # trained, added to the logits
    weights: Weights = "hard"
    output_scale: float = 1.0
    balance_coef: float = 0.01
    balance_scope: BalanceScope = "micro"
    z_coef: float = 0.0

    @property
    def selection_bias(self) -> bool:
        """Whether a bias moves against the load, as a threshold's must."""
        return self.mode == "threshold"

    def problems(self, hidden_act: str, mlp_bias: bool) -> list[str]:
        """What is wrong with this specification in a model of this activation and bias."""
        found = _expert_problems(self, hidden_act, mlp_bias)
        if self.output_scale <= 0:
            found.append(f"mlp.output_scale={self.output_scale} must be positive.")
        if self.mode == "budget":
            found += self._budget_problems()
        elif self.mean_experts:
            found.append(
                f"mlp.mean_experts={self.mean_experts:g} is for mode=budget; mode={self.mode} has "
                "top_k."
            )
        return found

    def _budget_problems(self) -> list[str]:
        found = []
        if not 0 < self.mean_experts <= max(self.num_experts, 1):
            found.append(
                f"mlp.mean_experts={self.mean_experts:g} must be more than 0 and at most "
                f"num_experts={self.num_experts}."
            )
        if self.top_k:
            found.append(
                f"mlp.top_k={self.top_k}: mode=budget fixes no number per token. Leave it out and "
                "say mean_experts."
            )
        if not self.router_bias:
            found.append("mlp.mode=budget has its threshold in the bias: use router_bias=true.")
        if self.weights != "hard":
            found.append("mlp.weights=soft: mode=budget has experts on or off. Use weights=hard.")
        if self.balance_scope == "global":
            found.append(
                "mlp.balance_scope=global: mode=budget has no balance loss, its own counts each "
                "forward pass. Leave it out."
            )
        return found


AttentionSpec = DenseAttention | MoHAttention | BAMAttention | UoEAttention
MLPSpec = DenseMLP | MoEMLP | UoEMLP
RoutedMLPSpec = MoEMLP | UoEMLP

ATTENTION_KINDS: dict[str, type[Any]] = {
    c().kind: c for c in (DenseAttention, MoHAttention, BAMAttention, UoEAttention)
}
MLP_KINDS: dict[str, type[Any]] = {c().kind: c for c in (DenseMLP, MoEMLP, UoEMLP)}


def attention_spec(values: Mapping[str, Any]) -> AttentionSpec:
    """Raises UserError with every unknown key and illegal choice."""
    return _read(values, "attention", ATTENTION_KINDS)


def mlp_spec(values: Mapping[str, Any]) -> MLPSpec:
    """Raises UserError with every unknown key and illegal choice."""
    return _read(values, "mlp", MLP_KINDS)


def to_dict(spec: AttentionSpec | MLPSpec) -> dict[str, Any]:
    """JSON values of the fields that differ from their defaults, and always `kind`."""
    changed = {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.name == "kind" or getattr(spec, f.name) != f.default
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}


def routed_on(spec: MoHAttention | UoEAttention | RoutedMLPSpec) -> float:
    """Routed parts that are on per token, on average where that is what is fixed."""
    if isinstance(spec, MoHAttention) and spec.budget == "threshold":
        return spec.mean_heads - len(spec.shared_heads)
    if isinstance(spec, UoEMLP) and spec.mode == "budget":
        return spec.mean_experts
    return spec.top_k


def causal(spec: AttentionSpec | MLPSpec) -> bool:
    """Whether a token's output in a whole sequence depends on no later token."""
    return not (isinstance(spec, UoEMLP) and spec.mode in ("expert_choice", "sequence"))


def _read(values: Mapping[str, Any], part: str, kinds: dict[str, type[Any]]) -> Any:
    kind = values.get("kind", "dense")
    if kind not in kinds:
        raise UserError(f"{part}.kind={kind!r} is unknown. Use one of {', '.join(kinds)}.")
    hints = get_type_hints(kinds[kind])
    names = [f.name for f in dataclasses.fields(kinds[kind])]
    problems = []
    for key, value in values.items():
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(names)}."
            problems.append(f"{part}.{key} is not a field of kind {kind}.{hint}")
        elif get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            choices = ", ".join(map(str, get_args(hints[key])))
            problems.append(f"{part}.{key}={value!r} is unknown. Use one of {choices}.")
    if problems:
        raise UserError("\n".join(problems))
    return kinds[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _choice_problems(spec: UoEAttention | MoEMLP | UoEMLP, part: str) -> list[str]:
    found = []
    if spec.num_experts < 1:
        found.append(f"{part}.num_experts={spec.num_experts} must be at least 1.")
    budget = isinstance(spec, UoEMLP) and spec.mode == "budget"
    if not budget and not 1 <= spec.top_k <= max(spec.num_experts, 1):
        found.append(
            f"{part}.top_k={spec.top_k} must be between 1 and num_experts={spec.num_experts}."
        )
    return found


def _group_problems(spec: MoEMLP) -> list[str]:
    experts, groups, top = spec.num_experts, spec.num_groups, spec.top_groups
    if experts < 1:
        return []  # said already
    if groups < 1 or experts % groups:
        legal = [str(n) for n in range(1, experts + 1) if experts % n == 0]
        return [
            f"mlp.num_groups={groups} does not divide num_experts={experts}. Use one of "
            f"{', '.join(legal)}."
        ]
    if top is not None and not 1 <= top <= groups:
        return [f"mlp.top_groups={top} must be between 1 and num_groups={groups}."]
    size = experts // groups
    if top is not None and spec.top_k > top * size:
        return [
            f"mlp.top_k={spec.top_k}: mlp.top_groups={top} of {size} experts each leave "
            f"{top * size} to choose from. Use a top_groups of at least {-(-spec.top_k // size)}."
        ]
    return []


def _expert_problems(spec: MoEMLP | UoEMLP, hidden_act: str, mlp_bias: bool) -> list[str]:
    found = []
    if hidden_act != "silu":
        found.append(f"hidden_act={hidden_act!r}: experts are SwiGLU, hidden_act must be 'silu'.")
    if mlp_bias:
        found.append("mlp_bias=True: experts have no bias. Keep the MLP dense.")
    found += _choice_problems(spec, "mlp")
    if spec.intermediate_size is not None and spec.intermediate_size < 1:
        found.append(f"mlp.intermediate_size={spec.intermediate_size} must be positive.")
    if spec.shared_intermediate_size < 0:
        found.append(f"mlp.shared_intermediate_size={spec.shared_intermediate_size} < 0.")
    return found
