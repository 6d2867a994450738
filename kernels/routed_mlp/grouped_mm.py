"""The routed MLP on torch's grouped_mm: all experts in one call per GEMM, the gate folded into a.

Fewer calls than one expert at a time, so it wins while the pairs fit in cache, and on a GPU. Same
algebra as cpu.py: keeps x and h, gets the weight's gradient from <dA, a>.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen, P = T·K pairs sorted by expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.routed_mlp.cpu import swiglu_backward

ALIGNMENT = 16  # bytes: grouped_mm refuses other strides


def fits(w1_EDH: Tensor, w2_EHI: Tensor) -> bool:
    """Whether grouped_mm takes these sizes and this dtype."""
    aligned = all(
        size * w1_EDH.element_size() % ALIGNMENT == 0
        for size in (w1_EDH.shape[1], w1_EDH.shape[2], w2_EHI.shape[2])
    )
    return aligned and w1_EDH.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _sort_pairs(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the pairs by expert, their tokens, and where each expert ends (int32)."""
    flat_P = indices_TK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)
    ends_E = torch.bincount(flat_P, minlength=num_experts).cumsum(0).to(torch.int32)
    return order_P, order_P.div(indices_TK.shape[1], rounding_mode="floor"), ends_E


def _sum_pairs(y_PH: Tensor, order_P: Tensor, k: int) -> Tensor:
    """Rows in sorted order, summed over the K pairs of each token: [T, H]."""
    unsorted_PH = torch.empty_like(y_PH).index_copy_(0, order_P, y_PH)
    return unsorted_PH.view(-1, k, y_PH.shape[1]).sum(1)


def forward(
    x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y [T, H] and h [P, D], which backward needs."""
    order_P, token_P, ends_E = _sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[order_P, None].to(x_TH.dtype)
    h_PD = F.grouped_mm(x_TH[token_P], w1_EDH.transpose(1, 2), offs=ends_E)
    gate_PI, up_PI = h_PD.chunk(2, dim=-1)
    a_PI = F.silu(gate_PI).mul_(up_PI).mul_(weight_P1)
    y_PH = F.grouped_mm(a_PI, w2_EHI.transpose(1, 2), offs=ends_E)
    return _sum_pairs(y_PH, order_P, indices_TK.shape[1]), h_PD


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
    order_P, token_P, ends_E = _sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[order_P, None].to(x_TH.dtype)
    dy_PH = dy_TH[token_P]
    gate_PI, up_PI = h_PD.chunk(2, dim=-1)
    da_PI = F.grouped_mm(dy_PH, w2_EHI, offs=ends_E)
    dh_PD, a_PI = swiglu_backward(gate_PI, up_PI, da_PI, weight_P1)
    dweight_P = weights_TK.new_empty(weights_TK.numel())
    dweight_P[order_P] = (da_PI * a_PI).sum(-1).to(dweight_P.dtype)
    dx_TH, dw1_EDH, dw2_EHI = (t.new_empty(0) for t in (x_TH, w1_EDH, w2_EHI))
    if need_weights:
        dw2_EHI = F.grouped_mm(dy_PH.T, a_PI.mul_(weight_P1), offs=ends_E)
        dw1_EDH = F.grouped_mm(dh_PD.T, x_TH[token_P], offs=ends_E)
    if need_x:
        dx_PH = F.grouped_mm(dh_PD, w1_EDH, offs=ends_E)
        dx_TH = _sum_pairs(dx_PH, order_P, indices_TK.shape[1])
    return dx_TH, dw1_EDH, dw2_EHI, dweight_P.view_as(weights_TK)
