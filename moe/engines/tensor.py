"""Which parts of a model the tensor axis splits, and whether they can be."""

import math
from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from moe.config import Parallel
from moe.errors import raise_all
from moe.model.attention import RoutedAttention
from moe.model.experts import RoutedMLP
from moe.model.router import NormRouter
from moe.model.union import UnionRouter
from moe.model.union_attention import UnionAttention
from moe.parallel.tensor import (
    Columns,
    Logits,
    OwnExperts,
    PartOfWeight,
    Rows,
    SharedOut,
    TensorAxis,
    Vocabulary,
)


def check(model: PreTrainedModel, parallel: Parallel, size: int) -> None:
    """Raise UserError with everything that `parallel.tensor` of `size` ranks cannot split."""
    tensor = parallel.tensor
    if tensor == 1:
        return
    divided = dict.fromkeys(_divided(model, parallel))
    common = math.gcd(size, *(count for _, count in divided))
    legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    problems = [
        f"parallel.tensor={tensor} does not divide the {count} {what}. Use one of {legal}."
        for what, count in divided
        if count % tensor
    ]
    shard = size // tensor // parallel.replicate
    for what, count in dict.fromkeys(_cut(model, parallel)):
        if count % shard:
            problems.append(
                f"{shard} ranks that share a copy of the model cannot cut the {what} of {count} "
                f"evenly, as they must with parallel.tensor={tensor}. Use a parallel.replicate or "
                f"tensor that leaves them {math.gcd(count, size // tensor)} or a divisor of it."
            )
    vocabulary = model.config.vocab_size
    if (tensor - 1) * -(-vocabulary // tensor) >= vocabulary:
        problems.append(
            f"parallel.tensor={tensor} leaves ranks without any of {vocabulary} tokens. Use less."
        )
    raise_all(problems)


def _divided(model: nn.Module, parallel: Parallel) -> Iterator[tuple[str, int]]:
    """What must be divisible by the tensor axis: its name and its number."""
    for module in model.modules():
        if isinstance(module, UnionAttention):
            yield "attention experts of a union", module.spec.num_experts
        elif isinstance(module, RoutedAttention):
            yield "attention heads", module.q_proj.out_features // module.head_dim
            yield "KV heads", module.k_proj.out_features // module.head_dim
        elif isinstance(module, RoutedMLP) and owns(module, parallel):
            yield "MLP experts of a union", len(module.experts.gate_up_proj)
        elif isinstance(module, LlamaMLP):
            yield "neurons of an MLP (intermediate size)", module.gate_proj.out_features


def _cut(model: PreTrainedModel, parallel: Parallel) -> Iterator[tuple[str, int]]:
    """What must be divisible by the ranks that shard: FSDP2 cuts evenly, but for dimension 0."""
    yield "hidden size", model.config.hidden_size
    for module in model.modules():
        if isinstance(module, RoutedMLP) and owns(module, parallel):
            yield "gate and up neurons of an expert", module.experts.gate_up_proj.shape[1]


def owns(mlp: RoutedMLP, parallel: Parallel) -> bool:
    """Whether the tensor axis divides an MLP's experts, as parts of one sum over all tokens."""
    return isinstance(mlp.router, UnionRouter) and parallel.expert == 1


def split(model: PreTrainedModel, mesh: DeviceMesh, parallel: Parallel) -> list[str]:
    """Split a model over a mesh of one dimension; dispatchers of experts are in place already.

    Returns the names of the parameters that stay whole but of whose gradient each rank has a part:
    they are to be summed over the axis.
    """
    axis, partial = TensorAxis(mesh), []
    for name, module in list(model.named_modules()):
        if isinstance(module, RoutedAttention):
            _split_attention(module, axis)
            kinds: tuple[str, ...]
            kinds = "q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"
        elif isinstance(module, LlamaMLP):
            module.gate_proj, module.up_proj = (  # type: ignore[assignment]
                Rows(p, axis) for p in (module.gate_proj, module.up_proj)
            )
            module.down_proj = Columns(module.down_proj, axis)  # type: ignore[assignment]
            module.register_forward_pre_hook(lambda _, given: (axis.enter(given[0]), *given[1:]))
            kinds = "gate_proj.bias", "up_proj.bias"
        elif isinstance(module, RoutedMLP):
            _split_experts(module, axis, owns(module, parallel))
            continue
        else:
            continue
        here = dict(module.named_parameters())
        partial += [f"{name}.{kind}" for kind in kinds if kind in here]
    embedding = Vocabulary(model.model.embed_tokens, axis)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    weight = embedding.weight if tied else axis.split(model.lm_head.weight, 0)
    model.model.embed_tokens, model.lm_head = embedding, Logits(weight, axis)
    return partial


def _split_attention(attention: RoutedAttention, axis: TensorAxis) -> None:
    """Heads are runs of the projections' rows, and so are BAM's and a union's experts."""
    attention.split = axis
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, Rows(getattr(attention, name), axis))
    attention.o_proj = Columns(attention.o_proj, axis)  # type: ignore[assignment]
    if isinstance(attention.router, NormRouter):
        attention.router.gather = axis.gather  # type: ignore[assignment,method-assign]
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        if norm is not None and norm.weight.ndim == 2:
            setattr(attention, name, PartOfWeight(norm, axis))


def _split_experts(mlp: RoutedMLP, axis: TensorAxis, owns: bool) -> None:
    if not owns:
        mlp.dispatcher = SharedOut(mlp.dispatcher, axis)
        return
    mlp.dispatcher = OwnExperts(axis, len(mlp.experts.gate_up_proj))
    for name, parameter in list(mlp.experts.named_parameters(recurse=False)):
        part = axis.split(parameter, 0)
        part.expert = True  # type: ignore[attr-defined]
        setattr(mlp.experts, name, part)


def add_parts(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum the gradients of whole parameters of which each rank has a part, in one collective."""
    parts = [p.grad.to_local() for p in parameters if p.grad is not None]  # type: ignore[attr-defined]
    if not parts:
        return
    flat = torch.cat([part.flatten() for part in parts])
    distributed.all_reduce(flat, group=mesh.get_group())
    for part, total in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        part.copy_(total.view_as(part))
