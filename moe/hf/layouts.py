"""Where the tensors of routed MLPs lie in the native folders, as they were first published.

    plan = native_plan(plan, routed_config, "mixtral")
    plan = routed_plan(source.tensors, routed_config, "mixtral")

Mixtral and Qwen2-MoE keep every expert's matrices apart: what transformers 4, llama.cpp and vLLM
read. The fused files that transformers 5 writes on request are read, not written.
"""

from collections.abc import Mapping

import torch

from moe.errors import Corrupt, UserError
from moe.hf.native import NO_SHARED_WIDTH, SHARED_GATE, moe_layers
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.model.spec import MoEMLP
from moe.upcycle.expression import Concat, Draw, Expression, Read, Stack, num_columns, num_rows
from moe.upcycle.rearrange import Rows, scaled
from moe.upcycle.source import StoredTensor, blocks, read_rows

Plan = dict[str, Expression]

ROUTERS = {
    "mixtral": "block_sparse_moe.gate.weight",
    "granitemoe": "block_sparse_moe.router.layer.weight",
    "granitemoeshared": "block_sparse_moe.router.layer.weight",
    "qwen2_moe": "mlp.gate.weight",
}
# an expert's gate, up and down matrix, where experts lie apart
EXPERTS = {
    "mixtral": [f"block_sparse_moe.experts.{{expert}}.{w}.weight" for w in ("w1", "w3", "w2")],
    "qwen2_moe": [f"mlp.experts.{{expert}}.{w}_proj.weight" for w in ("gate", "up", "down")],
}
# gate and up rows of all experts, and their down matrices, where they are stacked
STACKS = {
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "granitemoeshared": (
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
    ),
}
# names inside transformers 5, in files written with save_original_format=False: (router, stacks)
FUSED = {
    family: (f"{at}.{router}.weight", f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj")
    for family, at, router in (
        ("mixtral", "mlp", "gate"),
        ("qwen2_moe", "mlp", "gate"),
        ("granitemoe", "block_sparse_moe", "router"),
        ("granitemoeshared", "block_sparse_moe", "router"),
    )
}
SHARED_GATE_NAME = "mlp.shared_expert_gate.weight"
SHARED = [f"mlp.shared_expert.{w}_proj.weight" for w in ("gate", "up", "down")]
SHARED_STACKS = ("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")


def native_plan(plan: Plan, config: RoutedLlamaConfig, target: str) -> Plan:
    """The tensors of a RoutedLlama under the names and in the shapes of `target`.

    Raises Corrupt where one is missing.
    """
    rest, result = dict(plan), {}
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight", None)  # one tensor, stored once
    for layer, spec in moe_layers(config).items():
        at = f"model.layers.{layer}."
        result[at + ROUTERS[target]] = _take(rest, f"{at}mlp.router.weight")
        gate_up = _take(rest, f"{at}mlp.experts.gate_up_proj")
        down = scaled(_take(rest, f"{at}mlp.experts.down_proj"), spec.weight_scale)
        if target in STACKS:
            first, second = STACKS[target]
            result |= {at + first: gate_up, at + second: down}
        else:
            result |= _apart(at, EXPERTS[target], spec, gate_up, down)
        if spec.shared_intermediate_size:
            shared = [_take(rest, at + name) for name in SHARED]
            result |= _shared(at, target, shared)
        elif target == "qwen2_moe":
            width, hidden = NO_SHARED_WIDTH, config.hidden_size
            shapes = [(width, hidden), (width, hidden), (hidden, width)]
            result |= _shared(at, target, [Draw(shape, down.dtype, 0.0, "") for shape in shapes])
    return rest | result


def _apart(
    at: str, names: list[str], spec: MoEMLP, gate_up: Expression, down: Expression
) -> Plan:  # fmt: skip
    """Every expert's rows of gate_up [E, 2I, H] and down [E, H, I] as matrices of their own."""
    _, double, _ = gate_up.shape
    _, hidden, inner = down.shape
    plan: Plan = {}
    for expert in range(spec.num_experts):
        gate, up = expert * double, expert * double + inner
        parts = (
            Rows(gate_up, gate, up),
            Rows(gate_up, up, gate + double),
            Rows(down, expert * hidden, (expert + 1) * hidden),
        )
        plan |= {at + n.format(expert=expert): p for n, p in zip(names, parts, strict=True)}
    return plan


def _shared(at: str, target: str, parts: list[Expression]) -> Plan:
    """A shared expert from its gate, up and down matrices."""
    gate, up, down = parts
    if target == "granitemoeshared":
        first, second = SHARED_STACKS
        return {at + first: Concat((gate, up)), at + second: down}
    matrices = (gate, up, scaled(down, 1 / SHARED_GATE))
    return {
        **{at + name: part for name, part in zip(SHARED, matrices, strict=True)},
        at + SHARED_GATE_NAME: Draw((1, gate.shape[1]), gate.dtype, 0.0, ""),
    }


def _take(plan: Plan, name: str, shape: tuple[int, ...] | None = None) -> Expression:
    if name not in plan:
        raise Corrupt(f"{name} is missing.")
    if shape is not None and plan[name].shape != shape:
        raise Corrupt(f"{name} is {plan[name].shape}, the config says {shape}.")
    return plan.pop(name)


def has_shared_expert(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the shared experts of a Qwen2-MoE do anything.

    Raises UserError where one stands behind a gate that is not zero: its weight depends on the
    token, and a RoutedLlama's does not.
    """
    gates = {n: t for n, t in tensors.items() if n.endswith(SHARED_GATE_NAME)}
    for name, gate in gates.items():
        if not _is_zero(gate):
            raise UserError(
                f"{name} is not zero: the weight of its shared expert depends on the "
                "token, and a RoutedLlama's shared expert counts the same for all. Models from "
                "`moe export --to qwen2_moe` can be imported."
            )
    return not all(_is_zero(t) for n, t in tensors.items() if n.endswith(SHARED[2]))


def _is_zero(tensor: StoredTensor) -> bool:
    rows, columns = num_rows(tensor.shape), num_columns(tensor.shape)
    if not columns:
        return True
    spans = blocks(rows, columns, tensor.dtype)
    return not any(read_rows(tensor, start, stop).any() for start, stop in spans)


def routed_plan(
    tensors: Mapping[str, StoredTensor], config: RoutedLlamaConfig, family: str
) -> Plan:  # fmt: skip
    """The tensors of a RoutedLlama from those of a native folder, whichever way it is laid out.

    Raises Corrupt where one is missing or of another shape, UserError where one has no place.
    """
    rest: Plan = {n: Read(t) for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    result: Plan = {}
    for layer, spec in moe_layers(config).items():
        at = f"model.layers.{layer}."
        router, gate_up, down = _experts(rest, at, family, spec, config.hidden_size)
        result |= {
            f"{at}mlp.router.weight": router,
            f"{at}mlp.experts.gate_up_proj": gate_up,
            f"{at}mlp.experts.down_proj": down,
        }
        shared = _shared_parts(rest, at, family, spec)
        if spec.shared_intermediate_size:
            result |= {at + name: part for name, part in zip(SHARED, shared, strict=True)}
    result = rest | result
    if config.tie_word_embeddings:
        result.pop("lm_head.weight", None)
    _require_tensors(result, config, family)
    return result


def _experts(
    rest: Plan, at: str, family: str, spec: MoEMLP, hidden: int
) -> tuple[Expression, Expression, Expression]:
    """Router [E, H], gate_up [E, 2I, H] and down [E, H, I] of one layer, taken out of `rest`."""
    fused = [at + name for name in FUSED[family]]
    if fused[1] in rest:
        router, gate_up, down = (_take(rest, name) for name in fused)
        return router, gate_up, down
    router = _take(rest, at + ROUTERS[family])
    if family in STACKS:
        gate_up, down = (_take(rest, at + name) for name in STACKS[family])
        return router, gate_up, down
    assert spec.intermediate_size is not None
    inner = spec.intermediate_size
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    experts = []
    for expert in range(spec.num_experts):
        names = [at + name.format(expert=expert) for name in EXPERTS[family]]
        experts.append([_take(rest, n, s) for n, s in zip(names, shapes, strict=True)])
    gate_up = Stack(tuple(Concat((gate, up)) for gate, up, _ in experts))
    return router, gate_up, Stack(tuple(down for _, _, down in experts))


def _shared_parts(rest: Plan, at: str, family: str, spec: MoEMLP) -> list[Expression]:
    """Gate, up and down matrix of one layer's shared expert, taken out of `rest`."""
    if family == "qwen2_moe":
        _take(rest, at + SHARED_GATE_NAME)
        gate, up, down = (_take(rest, at + name) for name in SHARED)
        return [gate, up, scaled(down, SHARED_GATE)]
    if not spec.shared_intermediate_size:
        return []
    gate_up, down = (_take(rest, at + name) for name in SHARED_STACKS)
    half = spec.shared_intermediate_size
    return [Rows(gate_up, 0, half), Rows(gate_up, half, gate_up.shape[0]), down]


def _require_tensors(plan: Plan, config: RoutedLlamaConfig, family: str) -> None:
    """The plan must make exactly the model's tensors, in its shapes."""
    with torch.device("meta"):
        wanted = RoutedLlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    if missing := [name for name in wanted if name not in plan]:
        raise Corrupt(f"{len(missing)} tensors are missing, first {missing[0]}.")
    for name, expression in plan.items():
        if name not in wanted:
            raise UserError(f"tensor {name} has no place in a {family} of its config.")
        if expression.shape != tuple(wanted[name].shape):
            raise Corrupt(
                f"{name} is {expression.shape}, the config says {tuple(wanted[name].shape)}."
            )
