"""The routed MLP one expert at a time: gather, GEMM, SwiGLU, GEMM, scatter-add.

The rows of one expert stay in cache from the gather to the scatter, which wins once all pairs
together no longer fit. Forward keeps only x and h, the up-projection's output; backward recomputes
the activation and gets the weight's gradient from <dA, a>, so that y is never kept.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen, P = T·K pairs sorted by expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Pairs:
    """(token, expert) pairs sorted by expert, tokens ascending within each."""

    order_P: Tensor  # pair p of the sorted list is entry order[p] of the flattened [T, K]
    token_P: Tensor
    bounds: list[int]  # expert e owns pairs bounds[e] to bounds[e + 1]

    def experts(self) -> list[tuple[int, slice]]:
        """The experts that have tokens, with their pairs."""
        spans = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return [(e, slice(a, b)) for e, (a, b) in enumerate(spans) if b > a]


def sort_pairs(indices_TK: Tensor, num_experts: int) -> Pairs:
    """Group the pairs by expert; one device-to-host copy of E numbers."""
    flat_P = indices_TK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)
    counts = torch.bincount(flat_P, minlength=num_experts).tolist()
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return Pairs(order_P, order_P.div(indices_TK.shape[1], rounding_mode="floor"), bounds)


def forward(
    x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y [T, H] and h [P, D], which backward needs. Any float dtype."""
    pairs = sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[pairs.order_P, None].to(x_TH.dtype)
    y_TH = torch.zeros_like(x_TH)
    h_PD = x_TH.new_empty(len(pairs.order_P), w1_EDH.shape[1])
    for expert, span in pairs.experts():
        token_N = pairs.token_P[span]
        h_ND = torch.mm(x_TH[token_N], w1_EDH[expert].T, out=h_PD[span])
        gate_NI, up_NI = h_ND.chunk(2, dim=-1)
        a_NI = F.silu(gate_NI).mul_(up_NI).mul_(weight_P1[span])
        y_TH.index_add_(0, token_N, a_NI @ w2_EHI[expert].T)
    return y_TH, h_PD


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
    """Gradients of x, w1, w2 and the weights [T, K]; empty tensors for those not needed.

    `need_weights` covers w1 and w2 together: experts are frozen or trained as a whole.
    """
    pairs = sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[pairs.order_P, None].to(x_TH.dtype)
    dx_TH = torch.zeros_like(x_TH) if need_x else x_TH.new_empty(0)
    dw1_EDH = torch.zeros_like(w1_EDH) if need_weights else w1_EDH.new_empty(0)
    dw2_EHI = torch.zeros_like(w2_EHI) if need_weights else w2_EHI.new_empty(0)
    dweight_P = weights_TK.new_empty(weights_TK.numel())
    for expert, span in pairs.experts():
        token_N, weight_N1 = pairs.token_P[span], weight_P1[span]
        dy_NH = dy_TH[token_N]
        gate_NI, up_NI = h_PD[span].chunk(2, dim=-1)
        da_NI = dy_NH @ w2_EHI[expert]
        dh_ND, a_NI = swiglu_backward(gate_NI, up_NI, da_NI, weight_N1)
        dweight_P[pairs.order_P[span]] = (da_NI * a_NI).sum(-1).to(dweight_P.dtype)
        if need_weights:
            torch.mm(dy_NH.T, a_NI.mul_(weight_N1), out=dw2_EHI[expert])
            torch.mm(dh_ND.T, x_TH[token_N], out=dw1_EDH[expert])
        if need_x:
            dx_TH.index_add_(0, token_N, dh_ND @ w1_EDH[expert])
    return dx_TH, dw1_EDH, dw2_EHI, dweight_P.view_as(weights_TK)


def swiglu_backward(
    gate_NI: Tensor, up_NI: Tensor, da_NI: Tensor, weight_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """dh [N, 2I] for a = weight · silu(gate) ⊙ up given da, and silu(gate) ⊙ up itself."""
    sigmoid_NI = torch.sigmoid(gate_NI)
    silu_NI = gate_NI * sigmoid_NI
    scaled_NI = da_NI * weight_N1
    dh_ND = torch.cat(
        # d silu(g)/dg = σ + silu · (1 - σ)
        [scaled_NI * up_NI * torch.addcmul(sigmoid_NI, silu_NI, 1 - sigmoid_NI),
         scaled_NI * silu_NI], dim=-1
    )  # fmt: skip
    return dh_ND, silu_NI.mul_(up_NI)
