"""Attention with a gate per (token, head), and heads that are off: the specification.

B batch, S queries, L keys (the last S of them the queries' own), N query heads, G KV heads, d head
size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def project_heads(x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None, on_TN: Tensor) -> Tensor:
    """Projections [T, N, d] of the heads that are on, zeros where they are off; O = N · d."""
    heads_TNd = F.linear(x_TH, weight_OH, bias_O).unflatten(-1, (on_TN.shape[1], -1))
    return torch.where(on_TN[..., None], heads_TNd, 0.0)


def gate_heads(heads_BSNd: Tensor, gate_BSN: Tensor) -> Tensor:
    """Head outputs [B, S, N, d] times a gate [B, S, N]; a gate of 1 leaves them bitwise alone."""
    return heads_BSNd * gate_BSN[..., None].to(heads_BSNd.dtype)


def attend_heads(
    q_BSNd: Tensor,
    k_BLGd: Tensor,
    v_BLGd: Tensor,
    first_BS: Tensor,
    scale: float,
    gate_BSN: Tensor | None = None,
    on_BSN: Tensor | None = None,
) -> Tensor:
    """Gated head outputs [B, S, N, d]; zeros where a head is off, or sees nothing.

    Query s sees the keys from first[b, s] to its own, L - S + s: causal, and with `first` a sliding
    window, packed documents or padding on the left.
    """
    length, keys, groups = q_BSNd.shape[1], k_BLGd.shape[1], k_BLGd.shape[2]
    k, v = (t.repeat_interleave(q_BSNd.shape[2] // groups, 2) for t in (k_BLGd, v_BLGd))
    score_BNSL = torch.einsum("bsnd,blnd->bnsl", q_BSNd, k) * scale
    key_L = torch.arange(keys, device=q_BSNd.device)
    last_S1 = torch.arange(length, device=q_BSNd.device)[:, None] + keys - length
    seen_BSL = (key_L >= first_BS[..., None]) & (key_L <= last_S1)
    score_BNSL = score_BNSL.masked_fill(~seen_BSL[:, None], float("-inf"))
    p_BNSL = torch.softmax(score_BNSL, -1).nan_to_num(0.0)
    heads_BSNd = torch.einsum("bnsl,blnd->bsnd", p_BNSL, v)
    if gate_BSN is not None:
        heads_BSNd = gate_heads(heads_BSNd, gate_BSN)
    if on_BSN is not None:
        heads_BSNd = torch.where(on_BSN[..., None], heads_BSNd, 0.0)
    return heads_BSNd
