"""Packing and unpacking by Triton as operators that autograd and torch.compile know."""

from typing import Any

import torch
from torch import Tensor

from moe.kernels.backend import triton_module
from moe.kernels.route.naive import check_indices


@torch.library.custom_op("moe::pack", mutates_args=())
def pack(
    x: Tensor, indices: Tensor, weights: Tensor, experts: int, ranks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """naive.Packed's tensors, of contiguous ones."""
    check_indices(indices, experts)
    packed = triton_module("exchange.triton").pack(x, indices, weights, experts, ranks)
    return tuple(packed)  # type: ignore[return-value]


@pack.register_fake
def _(x: Tensor, indices: Tensor, weights: Tensor, experts: int, ranks: int) -> tuple[Tensor, ...]:
    tokens, k = indices.shape
    bound = tokens * min(k, ranks)
    return (
        x.new_empty(bound, x.shape[1]),
        indices.new_empty(bound, k),
        weights.new_empty(bound, k),
        indices.new_empty(ranks + 1, dtype=torch.int32),
        indices.new_empty(tokens, k, dtype=torch.int32),
        indices.new_empty(tokens, k, dtype=torch.int32),
        indices.new_empty(tokens * k, dtype=torch.int32),
    )


@torch.library.custom_op("moe::pack_backward", mutates_args=())
def _pack_backward(
    drows: Tensor, dweights: Tensor, place: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    return triton_module("exchange.triton").pack_backward(drows, dweights, place, row)


@_pack_backward.register_fake
def _(drows: Tensor, dweights: Tensor, place: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return drows.new_empty(len(place), drows.shape[1]), dweights.new_empty(row.shape)


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, indices, weights, offset, place, row, pair = output
    ctx.save_for_backward(place, row)
    ctx.shapes = rows.shape, weights.shape, rows.dtype, weights.dtype, rows.device
    ctx.mark_non_differentiable(indices, offset, place, row, pair)
    ctx.set_materialize_grads(False)


def _differentiate_pack(
    ctx: Any, drows: Tensor | None, dindices: None, dweights: Tensor | None, *unused: None
) -> tuple[Any, ...]:
    rows, weights, dtype, wide, device = ctx.shapes
    drows = torch.zeros(rows, dtype=dtype, device=device) if drows is None else drows.contiguous()
    if dweights is None:
        dweights = torch.zeros(weights, dtype=wide, device=device)
    dx, dw = _pack_backward(drows, dweights.contiguous(), *ctx.saved_tensors)
    return dx, None, dw, None, None


pack.register_autograd(_differentiate_pack, setup_context=_save_pack)


@torch.library.custom_op("moe::unpack", mutates_args=())
def unpack(rows: Tensor, place: Tensor, pair: Tensor, offset: Tensor) -> Tensor:
    """Each token's rows added up [T, H]; `pair` and `offset` are for the backward pass."""
    return triton_module("exchange.triton").unpack(rows, place)


@unpack.register_fake
def _(rows: Tensor, place: Tensor, pair: Tensor, offset: Tensor) -> Tensor:
    return rows.new_empty(len(place), rows.shape[1])


@torch.library.custom_op("moe::unpack_backward", mutates_args=())
def _unpack_backward(dy: Tensor, pair: Tensor, offset: Tensor, rows: int, k: int) -> Tensor:
    return triton_module("exchange.triton").unpack_backward(dy, pair, offset, rows, k)


@_unpack_backward.register_fake
def _(dy: Tensor, pair: Tensor, offset: Tensor, rows: int, k: int) -> Tensor:
    return dy.new_empty(rows, dy.shape[1])


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, place, pair, offset = inputs
    ctx.save_for_backward(pair, offset)
    ctx.sizes = len(rows), place.shape[1]


def _differentiate_unpack(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _unpack_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.sizes), None, None, None


unpack.register_autograd(_differentiate_unpack, setup_context=_save_unpack)
