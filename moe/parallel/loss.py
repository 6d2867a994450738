"""The loss of each token, of logits that are whole or split over the vocabulary."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F

IGNORED = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every label, 0 where it is -100: [T], in float32 or wider.

    logits [..., V] are whole, or a DTensor that ranks hold parts of the vocabulary of; such ranks
    get the same losses, and each the gradient of its part.
    """
    wide, labels_T = torch.promote_types(logits.dtype, torch.float32), labels.flatten()
    if not isinstance(logits, DTensor):
        return F.cross_entropy(logits.flatten(0, -2).to(wide), labels_T, reduction="none")
    mesh, placements = logits.device_mesh, logits.placements
    assert mesh.ndim == 1 and placements == (Shard(logits.ndim - 1),), placements
    offset = compute_local_shape_and_global_offset(logits.shape, mesh, placements)[1]
    local_TV = logits.to_local().flatten(0, -2)
    return _Split.apply(local_TV, labels_T, offset[-1], mesh.get_group())  # type: ignore[no-any-return]


class _Split(torch.autograd.Function):
    """log Σ_v exp(z_v) - z_label, the sum and the label's logit coming from all ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, first: int, group: ProcessGroup
    ) -> Tensor:
        ctx.dtype = logits_TV.dtype
        z_TV = logits_TV.to(torch.promote_types(ctx.dtype, torch.float32), copy=True)
        largest_T = z_TV.amax(1)
        distributed.all_reduce(largest_T, ReduceOp.MAX, group)
        z_TV -= largest_T[:, None]
        place_T = labels_T - first
        here_T = (place_T >= 0) & (place_T < z_TV.shape[1])
        place_T1 = torch.where(here_T, place_T, 0)[:, None]
        chosen_T = z_TV.gather(1, place_T1)[:, 0].masked_fill(~here_T, 0.0)
        p_TV = z_TV.exp_()
        both = torch.stack([p_TV.sum(1), chosen_T])
        distributed.all_reduce(both, group=group)
        p_TV /= both[0][:, None]
        counts_T = labels_T != IGNORED
        ctx.save_for_backward(p_TV, place_T1, here_T, counts_T)
        return (both[0].log() - both[1]) * counts_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        p_TV, place_T1, here_T, counts_T = ctx.saved_tensors
        gradient_T1 = (gradients[0] * counts_T)[:, None]
        z_TV = p_TV * gradient_T1
        z_TV.scatter_add_(1, place_T1, -gradient_T1 * here_T[:, None])
        return z_TV.to(ctx.dtype), None, None, None
