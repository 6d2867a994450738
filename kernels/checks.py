"""What a launch must be given: clear errors in place of garbage. All raise ValueError."""

import torch
from torch import Tensor

from moe.kernels.route.naive import Plan


def routed_mlp(
    x: Tensor, w1: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, bias: Tensor | None
) -> None:
    experts, double_inner, hidden = w1.shape
    shape = (experts, hidden, double_inner // 2)
    if x.shape[-1] != hidden or w2.shape != shape or double_inner % 2:
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
    if bias is not None and bias.shape != (experts, double_inner):
        raise ValueError(
            f"routed_mlp: bias {tuple(bias.shape)}, expected [E, 2I] = ({experts}, {double_inner})."
        )
    whole_numbers("routed_mlp", indices)
    one_device("routed_mlp", x, w1, w2, indices, weights, bias)


def plan_fits(plan: Plan, indices: Tensor, experts: int) -> None:
    """A plan made of other indices would read and write where it must not."""
    if plan.place_TK.shape != indices.shape or len(plan.offset_E1) != experts + 1:
        raise ValueError(
            f"routed_mlp: a plan of {tuple(plan.place_TK.shape)} choices of "
            f"{len(plan.offset_E1) - 1} experts, for {tuple(indices.shape)} of {experts}."
        )


def whole_numbers(what: str, indices: Tensor) -> None:
    if indices.dtype != torch.int64:
        raise ValueError(f"{what}: indices are {indices.dtype}, not int64.")


def one_device(what: str, *tensors: Tensor | None) -> None:
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{what}'s tensors are on {' and '.join(sorted(devices))}.")


def projection(x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None, on_TN: Tensor) -> None:
    tokens, hidden = x_TH.shape
    rows, heads = len(weight_OH), on_TN.shape[-1]
    if weight_OH.shape[1] != hidden or on_TN.shape != (tokens, heads) or rows % max(heads, 1):
        raise ValueError(
            f"project_heads shapes disagree: x {tuple(x_TH.shape)}, weight "
            f"{tuple(weight_OH.shape)}, on {tuple(on_TN.shape)}. Expected [T, H], [N · d, H] and "
            "[T, N]."
        )
    if bias_O is not None and bias_O.shape != (rows,):
        raise ValueError(f"project_heads: bias {tuple(bias_O.shape)}, expected ({rows},).")
    if on_TN.dtype != torch.bool:
        raise ValueError(f"project_heads: on is {on_TN.dtype}, not bool.")
    if x_TH.dtype != weight_OH.dtype:
        raise ValueError(f"project_heads dtypes differ: x {x_TH.dtype}, {weight_OH.dtype}.")
    one_device("project_heads", x_TH, weight_OH, bias_O, on_TN)


def heads(
    q_BSNd: Tensor,
    k_BLGd: Tensor,
    v_BLGd: Tensor,
    first_BS: Tensor,
    gate_BSN: Tensor | None,
    on_BSN: Tensor | None,
) -> None:
    if q_BSNd.dtype != k_BLGd.dtype or k_BLGd.dtype != v_BLGd.dtype:
        raise ValueError(
            f"attend_heads dtypes differ: q {q_BSNd.dtype}, k {k_BLGd.dtype}, v {v_BLGd.dtype}."
        )
    batch, length, heads, size = q_BSNd.shape
    keys, groups = k_BLGd.shape[1:3]
    if first_BS.shape != (batch, length):
        raise ValueError(f"attend_heads: first is {tuple(first_BS.shape)}, not [B, S].")
    if k_BLGd.shape != v_BLGd.shape or k_BLGd.shape != (batch, keys, groups, size):
        raise ValueError(
            f"attend_heads shapes disagree: q {tuple(q_BSNd.shape)}, k {tuple(k_BLGd.shape)}, v "
            f"{tuple(v_BLGd.shape)}. Expected q [B, S, N, d], k and v [B, L, G, d]."
        )
    if heads % groups or keys < length:
        raise ValueError(
            f"attend_heads: {heads} heads over {groups} KV heads, {length} queries and {keys} "
            "keys. KV heads must divide heads, and every query's own key must be there."
        )
    if on_BSN is not None and on_BSN.dtype != torch.bool:
        raise ValueError(f"attend_heads: on is {on_BSN.dtype}, not bool.")
    if first_BS.dtype.is_floating_point:
        raise ValueError(f"attend_heads: first is {first_BS.dtype}, not whole numbers.")
    one_device("attend_heads", q_BSNd, k_BLGd, v_BLGd, first_BS, gate_BSN, on_BSN)
    for name, tensor in (("gate", gate_BSN), ("on", on_BSN)):
        if tensor is not None and tensor.shape != (batch, length, heads):
            raise ValueError(f"attend_heads: {name} is {tuple(tensor.shape)}, not [B, S, N].")
