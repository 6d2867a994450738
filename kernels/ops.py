"""The operations the models are made of, each once; the backend is chosen by device and shape.

    y = routed_mlp(x, w1, w2, indices, weights)

`MOE_KERNELS=naive|cpu|grouped_mm` forces a backend. `naive` is the specification of the others.
"""

import os
from typing import Any

import torch
from torch import Tensor

from moe.kernels.heads import naive as heads_naive
from moe.kernels.route import naive as route_naive
from moe.kernels.routed_mlp import cpu, grouped_mm
from moe.kernels.routed_mlp import naive as routed_mlp_naive

BACKENDS = ("naive", "cpu", "grouped_mm")

# Above this many bytes of pairs (rows of x and h) one expert at a time beats grouped_mm on a CPU:
# the working set has left the last-level cache, and every array of all pairs is fresh memory.
# bench/routed_mlp.py measures both sides of it: fine_s (24 MB) and mix_s (32), fine_m (96).
CACHE_BYTES = 48 * 2**20

gate_heads = heads_naive.gate_heads
weigh = route_naive.weigh


@torch.library.custom_op("moe::select_top_k", mutates_args=())
def select_top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores along the last dim, best first, ties to the lowest index.

    An op of its own so that activation checkpointing can keep its result: a near-tie must not fall
    the other way when the layer is recomputed.
    """
    return route_naive.select_top_k(scores, k).contiguous()


@select_top_k.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


def forced_backend() -> str | None:
    """What `MOE_KERNELS` asks for, None where it asks for nothing."""
    forced = os.environ.get("MOE_KERNELS") or None
    if forced and forced not in BACKENDS:
        raise ValueError(f"MOE_KERNELS={forced!r} is unknown. Use one of {', '.join(BACKENDS)}.")
    return forced


def backend(x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, k: int) -> str:
    """The backend that `routed_mlp` takes for these tensors."""
    if forced := forced_backend():
        if forced == "grouped_mm" and not grouped_mm.fits(w1_EDH, w2_EHI):
            raise ValueError(
                f"MOE_KERNELS=grouped_mm does not take {w1_EDH.dtype} experts of shape "
                f"{tuple(w1_EDH.shape)}: float32, bfloat16 or float16 in sizes that are multiples "
                f"of {grouped_mm.ALIGNMENT} bytes. Use cpu."
            )
        return forced
    if not grouped_mm.fits(w1_EDH, w2_EHI):
        return "cpu"
    if x_TH.is_cuda:
        return "grouped_mm"
    pair_bytes = x_TH.shape[0] * k * (w1_EDH.shape[1] + w1_EDH.shape[2]) * x_TH.element_size()
    return "cpu" if pair_bytes > CACHE_BYTES else "grouped_mm"


def routed_mlp(x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[t, k] · SwiGLU expert indices[t, k] of x[t]: [T, H].

    x [T, H]; w1 [E, 2I, H], gate rows before up rows; w2 [E, H, I]; indices [T, K] int64 in 0..E-1;
    weights [T, K]. Under autocast x, w1 and w2 are cast as a matmul's would be. Differentiable in
    x, w1, w2 and weights. Raises ValueError where shapes or dtypes do not agree.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    _check(x, w1, w2, indices, weights)
    if backend(x, w1, w2, indices.shape[1]) == "naive":
        return routed_mlp_naive.routed_mlp(x, w1, w2, indices, weights)
    return _routed_mlp(x, w1, w2, indices, weights)[0]


def _check(x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> None:
    experts, double_inner, hidden = w1.shape
    if x.shape[-1] != hidden or w2.shape != (experts, hidden, double_inner // 2):
        raise ValueError(
            f"routed_mlp shapes disagree: x {tuple(x.shape)}, w1 {tuple(w1.shape)}, "
            f"w2 {tuple(w2.shape)}. Expected x [T, H], w1 [E, 2I, H], w2 [E, H, I]."
        )
    if x.dtype != w1.dtype or w1.dtype != w2.dtype:
        raise ValueError(f"routed_mlp dtypes differ: x {x.dtype}, w1 {w1.dtype}, w2 {w2.dtype}.")
    if indices.shape != weights.shape or indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"routed_mlp needs indices and weights [T, K] with T={x.shape[0]}, got "
            f"{tuple(indices.shape)} and {tuple(weights.shape)}."
        )


@torch.library.custom_op("moe::routed_mlp", mutates_args=())
def _routed_mlp(
    x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    path = grouped_mm if backend(x, w1, w2, indices.shape[1]) == "grouped_mm" else cpu
    return path.forward(x, w1, w2, indices, weights)


@_routed_mlp.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(indices.numel(), w1.shape[1])


@torch.library.custom_op("moe::routed_mlp_backward", mutates_args=())
def _routed_mlp_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    h: Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path = grouped_mm if backend(x, w1, w2, indices.shape[1]) == "grouped_mm" else cpu
    return path.backward(dy, x, w1, w2, indices, weights, h, need_x, need_weights)


@_routed_mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    h: Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    dw1 = torch.empty_like(w1) if need_weights else w1.new_empty(0)
    dw2 = torch.empty_like(w2) if need_weights else w2.new_empty(0)
    return dx, dw1, dw2, torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])  # h is for backward alone
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    need_x, need_w1, need_w2, _, need_gate = ctx.needs_input_grad
    need_weights = need_w1 or need_w2
    # an expanded gradient (from y.sum()) has stride 0, which grouped_mm refuses
    dx, dw1, dw2, dgate = _routed_mlp_backward(
        dy.contiguous(), *ctx.saved_tensors, need_x, need_weights
    )
    return (
        dx if need_x else None,
        dw1 if need_w1 else None,
        dw2 if need_w2 else None,
        None,
        dgate if need_gate else None,
    )


_routed_mlp.register_autograd(_differentiate, setup_context=_save)
