"""The routed MLP as operators that autograd, checkpointing and torch.compile know.

One for tensors on a CPU or torch's grouped_mm, which sorts pairs itself, and one for Triton, which
is given the router's plan.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.kernels.backend import triton_module
from moe.kernels.route.naive import Plan, check_indices
from moe.kernels.routed_mlp import cpu, grouped_mm
from moe.kernels.routed_mlp.naive import Layout


def _path(name: str) -> ModuleType:
    return grouped_mm if name == "grouped_mm" else cpu


@torch.library.custom_op("moe::routed_mlp", mutates_args=())
def routed_mlp(
    x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, path: str
) -> tuple[Tensor, Tensor]:
    check_indices(indices, len(w1))
    return _path(path).forward(x, w1, w2, indices, weights)


@routed_mlp.register_fake
def _(
    x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, path: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(indices.numel(), w1.shape[1])


@torch.library.custom_op("moe::routed_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    h: Tensor,
    path: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _path(path).backward(dy, x, w1, w2, indices, weights, h, need_x, need_weights)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    h: Tensor,
    path: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_gradients(x, w1, w2, need_x, need_weights), torch.empty_like(weights)


def _gradients(
    x: Tensor, w1: Tensor, w2: Tensor, need_x: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    dw1 = torch.empty_like(w1) if need_weights else w1.new_empty(0)
    return dx, dw1, torch.empty_like(w2) if need_weights else w2.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.path = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])  # h is for backward alone
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    need_x, need_w1, need_w2, _, need_gate, _ = ctx.needs_input_grad
    # an expanded gradient (from y.sum()) has stride 0, which grouped_mm refuses
    dx, dw1, dw2, dgate = _backward(
        dy.contiguous(), *ctx.saved_tensors, ctx.path, need_x, need_w1 or need_w2
    )
    return (
        dx if need_x else None,
        dw1 if need_w1 else None,
        dw2 if need_w2 else None,
        None,
        dgate if need_gate else None,
        None,
    )


routed_mlp.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("moe::routed_mlp_triton", mutates_args=())
def routed_mlp_triton(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    interleaved: bool,
    limit: float,
    alpha: float,
    recompute_h: bool,
) -> tuple[Tensor, Tensor]:
    triton, layout = triton_module("routed_mlp.triton"), Layout(interleaved, limit, alpha)
    return triton.forward(x, w1, w2, weights, Plan(*plan), layout, not recompute_h, bias)


@routed_mlp_triton.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    interleaved: bool,
    limit: float,
    alpha: float,
    recompute_h: bool,
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(0) if recompute_h else x.new_empty(weights.numel(), w1.shape[1])
    return x.new_empty(x.shape), h


@torch.library.custom_op("moe::routed_mlp_triton_backward", mutates_args=())
def _backward_triton(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    h: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    interleaved: bool,
    limit: float,
    alpha: float,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    triton, layout = triton_module("routed_mlp.triton"), Layout(interleaved, limit, alpha)
    need = need_x, need_weights
    return triton.backward(dy, x, w1, w2, weights, Plan(*plan), h, *need, layout=layout, bias=bias)


@_backward_triton.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    h: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    interleaved: bool,
    limit: float,
    alpha: float,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return *_gradients(x, w1, w2, need_x, need_weights), torch.empty_like(weights), dbias


def _save_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, w2, weights, bias, plan, *ctx.layout, _ = inputs
    ctx.save_for_backward(x, w1, w2, weights, output[1], bias, *plan)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_triton(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
    nothing = ([None] * len(Plan._fields), None, None, None, None)
    if dy is None:
        return (*(None,) * 5, *nothing)
    x, w1, w2, weights, h, bias, *plan = ctx.saved_tensors
    need_x, need_w1, need_w2, need_gate, need_bias = ctx.needs_input_grad[:5]
    dx, dw1, dw2, dgate, dbias = _backward_triton(
        dy.contiguous(), x, w1, w2, weights, h, bias, plan, *ctx.layout, need_x, need_w1 or need_w2
    )
    return (
        dx if need_x else None,
        dw1 if need_w1 else None,
        dw2 if need_w2 else None,
        dgate if need_gate else None,
        dbias if need_bias else None,
        *nothing,
    )


routed_mlp_triton.register_autograd(_differentiate_triton, setup_context=_save_triton)
