"""The tensors of a plain model whose parts are a routed model's, side by side and all of them on.

    Σ_e g_e O_e A_e(x) = O' A(x)        O' holds expert e's columns of o_proj times its gate
    Σ_e w_e D_e φ(G_e x, U_e x) = D' φ(G x, U x)      an FFN of all experts' neurons

with gates g and w that do not depend on x. Lazy like every plan: a column has one factor, so a
block of rows is read, multiplied and written.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import Corrupt
from moe.hf.gates import Gates
from moe.model import RoutedLlamaConfig
from moe.model.attention import widened
from moe.model.spec import BAMAttention, DenseMLP, RoutedMLPSpec
from moe.upcycle.expression import Concat, Expression, Mapped
from moe.upcycle.rearrange import Beside, Rows, scaled

Plan = dict[str, Expression]
NORMS = ("q_norm.weight", "k_norm.weight")


@dataclass(frozen=True, slots=True)
class ColumnsScaled(Mapped):
    """A matrix whose columns have factors, one for every `run` columns in a row."""

    factors: tuple[float, ...]
    run: int

    def rows(self, start: int, stop: int) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)  # rounded once, when multiplied
        factors = torch.tensor(self.factors, dtype=wide).repeat_interleave(self.run)
        return (self.base.rows(start, stop).to(wide) * factors).to(self.dtype)

    def __str__(self) -> str:
        return f"{self.base} · a gate per {self.run} columns"


@dataclass(frozen=True, slots=True)
class FirstRow:
    """The first row of a matrix, as a vector."""

    base: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(0, 1).reshape(-1, 1)[start:stop]

    def __str__(self) -> str:
        return f"{self.base}[0]"


def heads(config: RoutedLlamaConfig, layer: int) -> tuple[int, int]:
    """Query heads, and heads of keys and values, of a layer's attention as it is computed."""
    wide = widened(config, config.attention_spec(layer))
    assert wide.num_key_value_heads is not None
    return wide.num_attention_heads, wide.num_key_value_heads


def width(config: RoutedLlamaConfig, layer: int) -> int:
    """Neurons of a layer's MLP, those of all experts counted."""
    spec = config.mlp_spec(layer)
    if isinstance(spec, DenseMLP):
        return config.intermediate_size
    assert spec.intermediate_size is not None
    return spec.num_experts * spec.intermediate_size + spec.shared_intermediate_size


def size_problems(config: RoutedLlamaConfig) -> list[str]:
    """Sizes that differ between layers, of which a plain model has one."""
    attention, mlp = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for layer in range(config.num_hidden_layers):
        query, groups = heads(config, layer)
        attention[f"{query} query heads over {groups}"].append(layer)
        mlp[f"{width(config, layer)} neurons"].append(layer)
    return [
        f"{name} side by side would have "
        + ", ".join(f"{size} in {_layers(where)}" for size, where in sizes.items())
        + ": a plain model has one size for all layers."
        for name, sizes in (("attention experts", attention), ("FFN experts", mlp))
        if len(sizes) > 1
    ]


def norm_problems(config: RoutedLlamaConfig, plan: Plan) -> list[str]:
    """Norms of queries and keys that attention experts do not share, where a plain model has one
    of each for all heads.
    """
    found = []
    for norm in NORMS:
        where = [
            layer
            for layer in range(config.num_hidden_layers)
            if isinstance(config.attention_spec(layer), BAMAttention)
            and not _rows_equal(plan.get(_attention(layer) + norm))
        ]
        if where:
            found.append(
                f"{norm} differs between the heads of {_layers(where)}: a plain model has one for "
                "all heads of a layer."
            )
    return found


def _rows_equal(matrix: Expression | None) -> bool:
    if matrix is None:
        return True
    values = matrix.rows(0, matrix.shape[0])
    return torch.equal(values, values[:1].expand_as(values))


def fold(config: RoutedLlamaConfig, plan: Plan, gates: Gates) -> Plan:
    """The plain model's tensors. A part without gates has all of its experts on with weight 1.

    Raises Corrupt where a tensor is missing.
    """
    result = dict(plan)
    if config.tie_word_embeddings:
        result.pop("lm_head.weight", None)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for name in [
            n for n in result if n.startswith((f"{at}self_attn.router.", f"{at}mlp.router."))
        ]:
            del result[name]
        attention, mlp = config.attention_spec(layer), config.mlp_spec(layer)
        if isinstance(attention, BAMAttention):
            _fold_attention(config, attention, layer, result, gates[layer, "attention"])
        if not isinstance(mlp, DenseMLP):
            ones = (1.0,) * mlp.num_experts
            _fold_mlp(mlp, f"{at}mlp.", result, gates.get((layer, "mlp"), ones))
    return result


def _fold_attention(
    config: RoutedLlamaConfig, spec: BAMAttention, layer: int, plan: Plan, gate: Sequence[float]
) -> None:
    """Put each expert's gate into its columns of o_proj, and one norm in the place of many."""
    at, kv_heads = _attention(layer), config.num_key_value_heads
    assert kv_heads is not None and config.head_dim is not None
    # as moe.model orders heads: expert by expert, or with shared keys KV group by KV group
    groups = 1 if spec.kv == "expert" else kv_heads
    run = config.num_attention_heads // groups * config.head_dim
    output = _take(plan, f"{at}o_proj.weight")
    plan[f"{at}o_proj.weight"] = ColumnsScaled(output, tuple(gate) * groups, run)
    for norm in NORMS:
        if at + norm in plan:
            plan[at + norm] = FirstRow(plan[at + norm])


def _fold_mlp(spec: RoutedMLPSpec, at: str, plan: Plan, gate: Sequence[float]) -> None:
    """Lay the experts' neurons side by side, the shared expert's last."""
    gate_up, down = (_take(plan, f"{at}experts.{n}_proj") for n in ("gate_up", "down"))
    _, double, _ = gate_up.shape
    _, hidden, inner = down.shape
    parts: dict[str, list[Expression]] = {"gate": [], "up": [], "down": []}
    for expert, factor in enumerate(gate):
        first = expert * double
        parts["gate"].append(Rows(gate_up, first, first + inner))
        parts["up"].append(Rows(gate_up, first + inner, first + double))
        columns = Rows(down, expert * hidden, (expert + 1) * hidden)
        parts["down"].append(scaled(columns, factor))
    if spec.shared_intermediate_size:
        for name, matrices in parts.items():
            matrices.append(_take(plan, f"{at}shared_expert.{name}_proj.weight"))
    plan[f"{at}gate_proj.weight"] = Concat(tuple(parts["gate"]))
    plan[f"{at}up_proj.weight"] = Concat(tuple(parts["up"]))
    plan[f"{at}down_proj.weight"] = Beside(tuple(parts["down"]))


def _take(plan: Plan, name: str) -> Expression:
    if name not in plan:
        raise Corrupt(f"{name} is missing.")
    return plan.pop(name)


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def _layers(where: Sequence[int]) -> str:
    return f"layer{'s' if len(where) > 1 else ''} {', '.join(map(str, where))}"
