"""The routed MLP on torch's grouped_mm: all experts in one call per GEMM, the gate folded into a.

Fewer calls than one expert at a time, so it wins while the pairs fit in cache, and on a GPU. Same
algebra as cpu.py: keeps x and h, gets the weight's gradient from <dA, a>.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen, P = T·K pairs sorted by expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.routed_mlp.cpu import swiglu, swiglu_backward

ALIGNMENT = 16  # bytes: grouped_mm refuses other strides


def fits(w1_EDH: Tensor, w2_EHI: Tensor) -> bool:
    """Whether grouped_mm takes these sizes and this dtype."""
    aligned = all(
        size * w1_EDH.element_size() % ALIGNMENT == 0
        for size in (w1_EDH.shape[1], w1_EDH.shape[2], w2_EHI.shape[2])
    )
    return aligned and w1_EDH.dtype in (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Pairs:
    """(token, expert) pairs sorted by expert, by token within each; those without one last."""

    order_P: Tensor  # pair p of the sorted list is entry order[p] of the flattened [T, K]
    token_P: Tensor
    place_TK: Tensor  # where each entry went in the sorted list
    ends_E: Tensor  # int32: grouped_mm takes no other
    lost_TK: Tensor | None  # bool, where an entry has no expert; None where all have one

    def sum(self, y_PH: Tensor) -> Tensor:
        """Sorted rows, summed over the K pairs of each token: [T, H].

        grouped_mm leaves the rows after the last expert's unwritten; the very last stands for them.
        """
        if not len(self.place_TK):
            return y_PH.new_empty(0, y_PH.shape[1])
        place_TK, last = self.place_TK, None
        if self.lost_TK is not None:
            last = len(y_PH) - 1
            place_TK = torch.where(self.lost_TK, last, place_TK)
        # gathers and sums in one pass
        return F.embedding_bag(place_TK, y_PH, mode="sum", padding_idx=last)


def sort_pairs(indices_TK: Tensor, num_experts: int) -> Pairs:
    """Group the pairs by expert; all that the host is told is whether some have none."""
    flat_P = indices_TK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    lost_TK = indices_TK == num_experts
    return Pairs(
        order_P,
        order_P.div(indices_TK.shape[1], rounding_mode="floor"),
        place_P.view_as(indices_TK),
        torch.bincount(flat_P, minlength=num_experts)[:num_experts].cumsum(0).to(torch.int32),
        lost_TK if bool(lost_TK.any()) else None,
    )


def forward(
    x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y [T, H] and h [P, D], which backward needs."""
    pairs = sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[pairs.order_P, None].to(x_TH.dtype)
    x_PH = x_TH.index_select(0, pairs.token_P)
    h_PD = F.grouped_mm(x_PH, w1_EDH.transpose(1, 2), offs=pairs.ends_E)
    a_PI = swiglu(h_PD, weight_P1, h_PD.new_empty(len(h_PD), w2_EHI.shape[2]))
    y_PH = F.grouped_mm(a_PI, w2_EHI.transpose(1, 2), offs=pairs.ends_E)
    return pairs.sum(y_PH), h_PD


def backward(
    dy_TH: Tensor,
    x_TH: Tensor,
    w1_EDH: Tensor,
    w2_EHI: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    h_PD: Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2 and the weights [T, K]; empty tensors for those not needed."""
    pairs = sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[pairs.order_P, None].to(x_TH.dtype)
    dy_PH = dy_TH.index_select(0, pairs.token_P)
    da_PI = F.grouped_mm(dy_PH, w2_EHI, offs=pairs.ends_E)
    dh_PD, a_PI = torch.empty_like(h_PD), torch.empty_like(da_PI)
    dweight_P = weight_P1.new_empty(len(weight_P1))
    swiglu_backward(h_PD, weight_P1, da_PI, dh_PD, a_PI, dweight_P)
    dx_TH, dw1_EDH, dw2_EHI = (t.new_empty(0) for t in (x_TH, w1_EDH, w2_EHI))
    if need_weights:
        x_PH = x_TH.index_select(0, pairs.token_P)
        dw2_EHI = F.grouped_mm(dy_PH.T, a_PI, offs=pairs.ends_E)
        dw1_EDH = F.grouped_mm(dh_PD.T, x_PH, offs=pairs.ends_E)
    if need_x:
        dx_TH = pairs.sum(F.grouped_mm(dh_PD, w1_EDH, offs=pairs.ends_E))
    dweight_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    dweight_TK.view(-1)[pairs.order_P] = dweight_P.to(weights_TK.dtype)
    if pairs.lost_TK is not None:
        dweight_TK.masked_fill_(pairs.lost_TK, 0)
    return dx_TH, dw1_EDH, dw2_EHI, dweight_TK
