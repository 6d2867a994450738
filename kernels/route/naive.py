"""Choosing top-k parts per token, weighing the chosen, and sorting them: the specification.

T tokens, E parts (experts or heads), K chosen per token, P = T·K pairs, U tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EXPERT_BITS = 12  # of a tile's number; the rest is its block, half a million of them


class Plan(NamedTuple):
    """(token, expert) pairs sorted by expert, tokens ascending within each. All int32.

    An index of E goes nowhere: its place is -1, and `pair` ends before it.
    """

    place_TK: Tensor  # where each pair lies in the sorted list
    pair_P: Tensor  # pair p of the sorted list is entry pair[p] of the flattened [T, K]
    offset_E1: Tensor  # expert e has the pairs from offset[e] to offset[e + 1]
    tile_U: Tensor  # e | b << 12: the b-th block of expert e's rows; -1 after the last
    order_E: Tensor  # experts by falling number of pairs


def check_experts(num_experts: int) -> None:
    """Raise ValueError for more experts than a tile's number has room for."""
    if num_experts > 1 << EXPERT_BITS:
        raise ValueError(f"{num_experts} experts: the kernels take at most {1 << EXPERT_BITS}.")


def check_indices(indices: Tensor, num_experts: int) -> None:
    """Raise ValueError for an expert that does not exist; E itself is none. Not on a GPU: there the
    kernel stops the device instead of waiting for it here.
    """
    if indices.is_cuda or not indices.numel():
        return
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high > num_experts:
        raise ValueError(
            f"expert indices go from {low} to {high}: there are {num_experts} experts, 0 to "
            f"{num_experts - 1}, and {num_experts} stands for none."
        )


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: near the mean rows of an expert, within what tensor cores like."""
    mean = max(1, pairs // max(1, experts))
    return min(128, max(16, 1 << (mean - 1).bit_length()))


def tile_bound(pairs: int, experts: int, rows: int) -> int:
    """How many tiles there are at most, whatever the routing, so that nothing asks a device."""
    if pairs <= experts:
        return pairs
    return -(-(pairs - experts + 1) // rows) + experts - 1


def plan(indices_TK: Tensor, num_experts: int) -> Plan:
    """Sort pairs by expert, stably."""
    flat_P = indices_TK.reshape(-1)
    pairs = len(flat_P)
    order_P = torch.argsort(flat_P, stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(pairs, device=flat_P.device)
    count_E = torch.bincount(flat_P, minlength=num_experts)[:num_experts]
    rows = block_rows(pairs, num_experts)
    blocks_E = (count_E + rows - 1) // rows
    owner_U = torch.repeat_interleave(torch.arange(num_experts, device=flat_P.device), blocks_E)
    first_E = blocks_E.cumsum(0) - blocks_E
    block_U = torch.arange(len(owner_U), device=flat_P.device) - first_E[owner_U]
    tile_U = flat_P.new_full((tile_bound(pairs, num_experts, rows),), -1)
    tile_U[: len(owner_U)] = owner_U | block_U << EXPERT_BITS
    parts = (
        torch.where(flat_P < num_experts, place_P, -1).view_as(indices_TK),
        order_P,
        torch.cat([count_E.new_zeros(1), count_E.cumsum(0)]),
        tile_U,
        torch.argsort(count_E, descending=True, stable=True),
    )
    return Plan(*(part.to(torch.int32) for part in parts))


def select_top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices [T, K] of the k largest scores per token, best first; ties go to the lowest index.

    A stable sort, because `topk` breaks ties as it likes, differently on each device.
    """
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[..., :k]


def limit_load(
    indices_TK: Tensor, weights_TK: Tensor, experts: int, room: int, valid_T: Tensor | None
) -> Tensor:
    """The indices, E (none) where an expert has `room` choices that weigh more.

    Of equal weights those of later tokens go; tokens that are not valid go before all others, the
    later ones first.
    """
    if valid_T is not None:
        weights_TK = weights_TK.masked_fill(~valid_T[:, None], -torch.inf)
    flat_P = indices_TK.reshape(-1)
    heavy_P = torch.sort(weights_TK.reshape(-1), descending=True, stable=True).indices
    expert_P, order_P = torch.sort(flat_P[heavy_P], stable=True)
    at_P = torch.arange(len(flat_P), device=flat_P.device)
    # where each expert's choices begin: a count of them would ask the device for its size
    first_P = torch.searchsorted(expert_P, expert_P)
    kept_P = torch.where(at_P - first_P < room, expert_P, experts)
    return torch.empty_like(flat_P).scatter_(0, heavy_P[order_P], kept_P).view_as(indices_TK)


def weigh(scores_TE: Tensor, indices_TK: Tensor, renormalise: bool) -> Tensor:
    """Weights [T, K] of the chosen parts: their scores, made to sum to 1 if `renormalise`."""
    weights_TK = scores_TE.gather(-1, indices_TK)
    if renormalise:
        # 1e-20 only matters for sigmoid scores that all underflow
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK
