"""The routed MLP one expert at a time: gather, GEMM, SwiGLU, GEMM, scatter-add.

The rows of one expert stay in cache from the gather to the scatter, which wins once all pairs
together no longer fit. Forward keeps only x and h, the up-projection's output; backward recomputes
the activation and gets the weight's gradient from <dA, a>, so that y is never kept. Intermediate
rows live in one set of buffers that all experts use: fresh memory costs a page fault per 4 KB.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen, P = T·K pairs sorted by expert, N of them
of one expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Pairs:
    """(token, expert) pairs sorted by expert, by token within each; those without one last."""

    order_P: Tensor  # pair p of the sorted list is entry order[p] of the flattened [T, K]
    token_P: Tensor
    counts: list[int]  # pairs of each expert

    def experts(self) -> list[tuple[int, slice, Tensor]]:
        """The experts that have tokens, with their pairs and these pairs' tokens."""
        found, start = [], 0
        sorted_P = self.token_P[: sum(self.counts)]
        for expert, token_N in enumerate(sorted_P.split(self.counts)):
            if len(token_N):
                found.append((expert, slice(start, start + len(token_N)), token_N))
            start += len(token_N)
        return found

    def idle(self) -> list[int]:
        """The experts that have none."""
        return [expert for expert, count in enumerate(self.counts) if not count]


def sort_pairs(indices_TK: Tensor, num_experts: int) -> Pairs:
    """Group the pairs by expert; one device-to-host copy of E numbers."""
    flat_P = indices_TK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)
    token_P = order_P.div(indices_TK.shape[1], rounding_mode="floor")
    count_E = torch.bincount(flat_P, minlength=num_experts)[:num_experts]
    return Pairs(order_P, token_P, count_E.tolist())


def forward(
    x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y [T, H] and h [P, D], which backward needs. Any float dtype."""
    pairs = sort_pairs(indices_TK, w1_EDH.shape[0])
    weight_P1 = weights_TK.reshape(-1)[pairs.order_P, None].to(x_TH.dtype)
    w1_EHD, w2_EIH = w1_EDH.transpose(1, 2).unbind(0), w2_EHI.transpose(1, 2).unbind(0)
    y_TH = torch.zeros_like(x_TH)
    h_PD = x_TH.new_empty(len(pairs.order_P), w1_EDH.shape[1])
    most, (hidden, inner) = max(pairs.counts), w2_EHI.shape[1:]
    x_MH, y_MH, a_MI = (x_TH.new_empty(most, n) for n in (hidden, hidden, inner))
    for expert, span, token_N in pairs.experts():
        count = len(token_N)
        x_NH = torch.index_select(x_TH, 0, token_N, out=x_MH[:count])
        h_ND = torch.mm(x_NH, w1_EHD[expert], out=h_PD[span])
        a_NI = swiglu(h_ND, weight_P1[span], a_MI[:count])
        y_TH.index_add_(0, token_N, torch.mm(a_NI, w2_EIH[expert], out=y_MH[:count]))
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
    w1, w2 = w1_EDH.unbind(0), w2_EHI.unbind(0)
    dx_TH = torch.zeros_like(x_TH) if need_x else x_TH.new_empty(0)
    dw1_EDH = _gradient(w1_EDH, pairs) if need_weights else w1_EDH.new_empty(0)
    dw2_EHI = _gradient(w2_EHI, pairs) if need_weights else w2_EHI.new_empty(0)
    dweight_P = weight_P1.new_zeros(len(weight_P1))
    most, (hidden, inner) = max(pairs.counts), w2_EHI.shape[1:]
    row_MH, dy_MH, dh_MD = (x_TH.new_empty(most, n) for n in (hidden, hidden, 2 * inner))
    da_MI, a_MI = x_TH.new_empty(2, most, inner)
    for expert, span, token_N in pairs.experts():
        count = len(token_N)
        a_NI, dh_ND = a_MI[:count], dh_MD[:count]
        dy_NH = torch.index_select(dy_TH, 0, token_N, out=dy_MH[:count])
        da_NI = torch.mm(dy_NH, w2[expert], out=da_MI[:count])
        swiglu_backward(h_PD[span], weight_P1[span], da_NI, dh_ND, a_NI, dweight_P[span])
        if need_weights:
            x_NH = torch.index_select(x_TH, 0, token_N, out=row_MH[:count])
            torch.mm(dy_NH.T, a_NI, out=dw2_EHI[expert])
            torch.mm(dh_ND.T, x_NH, out=dw1_EDH[expert])
        if need_x:
            dx_NH = torch.mm(dh_ND, w1[expert], out=row_MH[:count])
            dx_TH.index_add_(0, token_N, dx_NH)
    dweight_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    dweight_TK.view(-1)[pairs.order_P] = dweight_P.to(weights_TK.dtype)
    return dx_TH, dw1_EDH, dw2_EHI, dweight_TK


def _gradient(weight_EDH: Tensor, pairs: Pairs) -> Tensor:
    """Memory for a gradient that every expert with tokens writes in full."""
    gradient_EDH = torch.empty_like(weight_EDH, memory_format=torch.contiguous_format)
    for expert in pairs.idle():
        gradient_EDH[expert].zero_()
    return gradient_EDH


def swiglu(h_ND: Tensor, weight_N1: Tensor, a_NI: Tensor) -> Tensor:
    """a = weight · silu(gate) ⊙ up into a_NI, [gate; up] = h."""
    gate_NI, up_NI = h_ND.chunk(2, dim=-1)
    aten.silu.out(gate_NI, out=a_NI)
    return a_NI.mul_(up_NI).mul_(weight_N1)


def swiglu_backward(
    h_ND: Tensor,
    weight_N1: Tensor,
    da_NI: Tensor,
    dh_ND: Tensor,
    a_NI: Tensor,
    dweight_N: Tensor,
) -> None:
    """For a = weight · silu(gate) ⊙ up: fills dh, a and the weight's gradient, overwrites da."""
    gate_NI, up_NI = h_ND.chunk(2, dim=-1)
    dgate_NI, dup_NI = dh_ND.chunk(2, dim=-1)
    aten.silu.out(gate_NI, out=dup_NI)
    torch.mul(dup_NI, up_NI, out=a_NI)
    torch.sum(torch.mul(a_NI, da_NI, out=dgate_NI), dim=-1, out=dweight_N)
    a_NI.mul_(weight_N1)
    da_NI.mul_(weight_N1)
    dup_NI.mul_(da_NI)
    aten.silu_backward.grad_input(da_NI.mul_(up_NI), gate_NI, grad_input=dgate_NI)
