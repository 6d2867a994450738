"""Routing by Triton as operators that autograd, checkpointing and torch.compile know."""

from typing import Any

import torch
from torch import Tensor

from moe.kernels.backend import triton_module
from moe.kernels.route.naive import Plan, block_rows, check_indices, tile_bound


@torch.library.custom_op("moe::route", mutates_args=())
def route(
    logits: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights and indices [T, K], sums [3, E'], and a plan's tensors (route/triton.py)."""
    triton = triton_module("route.triton")
    weights, indices, sums, plan = triton.route(logits, k, sigmoid, renormalise, scale, bias, valid)
    return weights, indices, sums, *plan


@route.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    wide = max(16, 1 << (experts - 1).bit_length())
    indices = logits.new_empty(tokens, k, dtype=torch.int64)
    return (
        logits.new_empty(tokens, k),
        indices,
        logits.new_empty(3, wide),
        *_empty_plan(indices, experts),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, valid, _, *how = inputs
    ctx.how = how
    ctx.save_for_backward(logits, valid, output[1])
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dweights: Tensor | None, dindices: None, dsums: Tensor | None, *dplan: None
) -> tuple[Any, ...]:
    logits, valid, indices = ctx.saved_tensors
    if dweights is None and dsums is None:
        return (None,) * 7
    if dweights is None:
        dweights = logits.new_zeros(indices.shape)
    if dsums is None:
        dsums = logits.new_zeros(3, max(16, 1 << (logits.shape[1] - 1).bit_length()))
    dlogits = route_backward(
        dweights.contiguous(), dsums.contiguous(), logits, indices, valid, *ctx.how
    )
    return dlogits, *(None,) * 6


@torch.library.custom_op("moe::route_backward", mutates_args=())
def route_backward(
    dweights: Tensor,
    dsums: Tensor,
    logits: Tensor,
    indices: Tensor,
    valid: Tensor | None,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
) -> Tensor:
    """Gradient of the logits, of the weights and of the losses at once."""
    triton = triton_module("route.triton")
    return triton.route_backward(
        dweights, dsums, logits, indices, sigmoid, renormalise, scale, valid
    )


@route_backward.register_fake
def _(dweights: Tensor, dsums: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


route.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("moe::plan", mutates_args=())
def plan(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A plan's tensors for indices [T, K] that were chosen elsewhere."""
    triton = triton_module("route.triton")
    check_indices(indices, num_experts)
    return tuple(triton.plan(indices, num_experts))  # type: ignore[return-value]


@plan.register_fake
def _(indices: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    return tuple(_empty_plan(indices, num_experts))


def _empty_plan(indices: Tensor, experts: int) -> Plan:
    pairs = indices.numel()
    tiles = tile_bound(pairs, experts, block_rows(pairs, experts))

    def empty(*shape: Any) -> Tensor:
        return indices.new_empty(*shape, dtype=torch.int32)

    return Plan(
        empty(indices.shape), empty(pairs), empty(experts + 1), empty(tiles), empty(experts)
    )
