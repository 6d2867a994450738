"""Packing tokens for the ranks that hold their experts, and adding up what comes back: the
specification.

A token goes once to every rank that holds one of its experts, however many: its row takes along
which of that rank's experts it wants, and how much. The receiver's routed MLP takes rows, indices
and weights as they come; an expert of another rank is index E / W, which stands for none.

T tokens, H hidden, E experts, K chosen, W ranks with E / W experts each, N rows = T · min(K, W).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.route import naive as route


class Packed(NamedTuple):
    """Rows for rank w: those from offset[w] to offset[w + 1], tokens ascending."""

    rows_NH: Tensor  # zeros after the last
    indices_NK: Tensor  # the receiver's own experts, E / W where a choice lies elsewhere
    weights_NK: Tensor  # 0 there
    offset_W1: Tensor  # int32
    place_TK: Tensor  # the row of each choice's rank, -1 where an earlier choice has the same
    row_TK: Tensor  # the row of each choice's rank; -1 for no expert
    pair_P: Tensor  # row n is of choice pair[n] of the flattened [T, K]. int32 all three


def destinations(indices_TK: Tensor, experts: int, ranks: int) -> Tensor:
    """The rank of each choice [T, K]; W where an earlier choice goes there too, or nowhere."""
    rank_TK = indices_TK // (experts // ranks)
    same_TKK = rank_TK[:, :, None] == rank_TK[:, None, :]
    again_TK = same_TKK.tril(-1).any(-1)
    return torch.where(again_TK | (indices_TK >= experts), ranks, rank_TK)


def pack(x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: int, ranks: int) -> Packed:
    """Differentiable in x and weights."""
    tokens, k = indices_TK.shape
    size, bound = experts // ranks, tokens * min(k, ranks)
    plan = route.plan(destinations(indices_TK, experts, ranks), ranks)
    there = plan.pair_P[: int(plan.offset_E1[-1])].long()
    token_P, count = there // k, len(there)
    at_P = torch.arange(count, device=x_TH.device)
    rank_P = torch.bucketize(at_P, plan.offset_E1[1:].long(), right=True)
    wanted_PK = indices_TK[token_P]
    here_PK = (wanted_PK // size == rank_P[:, None]) & (wanted_PK < experts)
    indices_NK = indices_TK.new_full((bound, k), size)
    indices_NK[:count] = torch.where(here_PK, wanted_PK - rank_P[:, None] * size, size)
    rows = torch.cat([x_TH[token_P], x_TH.new_zeros(bound - count, x_TH.shape[1])])
    weights_PK = torch.where(here_PK, weights_TK[token_P], 0)
    weights = torch.cat([weights_PK, weights_PK.new_zeros(bound - count, k)])
    rank_TK = indices_TK // size
    same_TKK = rank_TK[:, :, None] == rank_TK[:, None, :]
    row_TK = torch.where(same_TKK, plan.place_TK[:, None, :], -1).amax(-1)
    row_TK = torch.where(indices_TK < experts, row_TK, -1)
    return Packed(
        rows, indices_NK, weights, plan.offset_E1, plan.place_TK, row_TK.int(), plan.pair_P
    )


def unpack(rows_NH: Tensor, place_TK: Tensor) -> Tensor:
    """What came back for each token, added up over ranks in the order of its choices: [T, H]."""
    there_TK = place_TK >= 0
    found = rows_NH[place_TK.clamp(min=0).long()]
    wide = torch.promote_types(rows_NH.dtype, torch.float32)
    return torch.where(there_TK[..., None], found.to(wide), 0).sum(1).to(rows_NH.dtype)
