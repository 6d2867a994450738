"""Attention with a gate per head in Triton, as an operator that autograd and torch.compile know."""

from typing import Any

import torch
from torch import Tensor

from moe.kernels.backend import triton_module
from moe.kernels.heads import cpu, projecting


def _rows(listed: list[Tensor]) -> Any:
    return triton_module("heads.triton").Rows(*listed) if listed else None


@torch.library.custom_op("moe::list_heads", mutates_args=())
def list_heads(on: Tensor, groups: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of heads/triton.py's Rows."""
    return tuple(triton_module("heads.triton").rows_of(on, groups, most))  # type: ignore[return-value]


@list_heads.register_fake
def _(on: Tensor, groups: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    segments = on.shape[0] * groups

    def empty(*shape: int) -> Tensor:
        return on.new_empty(shape, dtype=torch.int32)

    return empty(most), empty(segments + 1), empty(segments, on.shape[1])


@torch.library.custom_op("moe::attend_heads", mutates_args=())
def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    first: Tensor,
    rows: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated outputs, ungated ones and the softmax's sums (heads/triton.py)."""
    triton = triton_module("heads.triton")
    return triton.forward(q, k, v, first, scale, gate, _rows(rows))


@attend_heads.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    first: Tensor,
    rows: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    kept = rows[0].shape[0] if rows else q.shape[0] * q.shape[1] * q.shape[2]
    out = q.new_empty(q.shape)
    raw = q.new_empty(0) if gate is None else q.new_empty(q.shape)
    return out, raw, q.new_empty(kept, dtype=wide)


@torch.library.custom_op("moe::attend_heads_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    first: Tensor,
    rows: list[Tensor],
    scale: float,
    raw: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    triton = triton_module("heads.triton")
    return triton.backward(dout, q, k, v, first, scale, gate, _rows(rows), raw, sums)


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    first: Tensor,
    rows: list[Tensor],
    scale: float,
    raw: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = sums.new_empty(0) if gate is None else torch.empty_like(gate)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, gate, first, rows, ctx.scale = inputs
    out, raw, sums = output
    ctx.save_for_backward(q, k, v, gate, first, out if gate is None else raw, sums, *rows)
    ctx.mark_non_differentiable(raw, sums)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, *unused: None) -> tuple[Any, ...]:
    q, k, v, gate, first, raw, sums, *rows = ctx.saved_tensors
    nothing: list[None] = [None] * len(rows)
    if dout is None:
        return None, None, None, None, None, nothing, None
    dq, dk, dv, dgate = _backward(
        dout.contiguous(), q, k, v, gate, first, rows, ctx.scale, raw, sums
    )
    need = ctx.needs_input_grad
    return (
        dq if need[0] else None,
        dk if need[1] else None,
        dv if need[2] else None,
        dgate if need[3] else None,
        None,
        nothing,
        None,
    )


attend_heads.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("moe::attend_some_heads", mutates_args=())
def attend_some_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    on: Tensor,
    first: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated outputs of the heads that are on, ungated ones and logsumexps (heads/cpu.py)."""
    return cpu.forward(q, k, v, first, scale, gate, on)


@attend_some_heads.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    on: Tensor,
    first: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    raw = q.new_empty(0) if gate is None else q.new_empty(q.shape)
    sums = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), raw, sums


@torch.library.custom_op("moe::attend_some_heads_backward", mutates_args=())
def _backward_some(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    on: Tensor,
    first: Tensor,
    scale: float,
    raw: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.backward(dout, q, k, v, first, scale, gate, on, raw, sums)


@_backward_some.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    on: Tensor,
    first: Tensor,
    scale: float,
    raw: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = sums.new_empty(0) if gate is None else torch.empty_like(gate)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgate


def _save_some(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, gate, on, first, ctx.scale = inputs
    out, raw, sums = output
    ctx.save_for_backward(q, k, v, gate, on, first, out if gate is None else raw, sums)
    ctx.mark_non_differentiable(raw, sums)
    ctx.set_materialize_grads(False)


def _differentiate_some(ctx: Any, dout: Tensor | None, *unused: None) -> tuple[Any, ...]:
    q, k, v, gate, on, first, raw, sums = ctx.saved_tensors
    if dout is None:
        return (None,) * 7
    found = _backward_some(dout, q, k, v, gate, on, first, ctx.scale, raw, sums)
    needed = zip(found, ctx.needs_input_grad[:4], strict=True)
    return *(t if need else None for t, need in needed), None, None, None


attend_some_heads.register_autograd(_differentiate_some, setup_context=_save_some)


@torch.library.custom_op("moe::decode_heads", mutates_args=())
def decode_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    on: Tensor | None,
    first: Tensor,
    scale: float,
) -> Tensor:
    """Gated outputs for one query per sequence, without gradient (heads/decoding.py)."""
    return triton_module("heads.decoding").decode(q, k, v, first, scale, gate, on)


@decode_heads.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("moe::gate_heads", mutates_args=())
def gate_heads(heads: Tensor, gate: Tensor) -> Tensor:
    """Head outputs [..., d] times a gate [...], contiguous both (heads/gating.py)."""
    return triton_module("heads.gating").forward(heads, gate)


@gate_heads.register_fake
def _(heads: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(heads)


@torch.library.custom_op("moe::gate_heads_backward", mutates_args=())
def _ungate(dout: Tensor, heads: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return triton_module("heads.gating").backward(dout, heads, gate)


@_ungate.register_fake
def _(dout: Tensor, heads: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(heads), torch.empty_like(gate)


def _save_gate(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _ungate(dout.contiguous(), *ctx.saved_tensors)


gate_heads.register_autograd(_differentiate_gate, setup_context=_save_gate)


@torch.library.custom_op("moe::project_heads", mutates_args=())
def project_heads(x: Tensor, weight: Tensor, bias: Tensor | None, on: Tensor) -> Tensor:
    """Projections [T, N, d] of the heads that are on (heads/projecting.py)."""
    return projecting.forward(x, weight, bias, on)


@project_heads.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, on: Tensor) -> Tensor:
    return x.new_empty(*on.shape, weight.shape[0] // on.shape[1])


@torch.library.custom_op("moe::project_heads_backward", mutates_args=())
def _unproject(
    dout: Tensor, x: Tensor, weight: Tensor, on: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return projecting.backward(dout, x, weight, on)


@_unproject.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), dout.new_empty(len(weight))


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, on = inputs
    ctx.save_for_backward(x, weight, on)


def _differentiate_projection(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    found = _unproject(dout, *ctx.saved_tensors)
    needed = zip(found, ctx.needs_input_grad[:3], strict=True)
    return *(t if need else None for t, need in needed), None


project_heads.register_autograd(_differentiate_projection, setup_context=_save_projection)
