"""Choosing top-k parts per token, and weighing the chosen ones: the specification.

T tokens, E parts (experts or heads), K chosen per token.
"""

import torch
from torch import Tensor


def select_top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices [T, K] of the k largest scores per token, best first; ties go to the lowest index.

    A stable sort, because `topk` breaks ties as it likes, differently on each device.
    """
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[..., :k]


def weigh(scores_TE: Tensor, indices_TK: Tensor, renormalise: bool) -> Tensor:
    """Weights [T, K] of the chosen parts: their scores, made to sum to 1 if `renormalise`."""
    weights_TK = scores_TE.gather(-1, indices_TK)
    if renormalise:
        # 1e-20 only matters for sigmoid scores that all underflow
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK
