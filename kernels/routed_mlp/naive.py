"""The routed MLP as a plain sum over experts: the specification, in any dtype, by autograd.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(NamedTuple):
    """Where gate and up rows of W1, and columns of h, lie, and what is done with them."""

    interleaved: bool = False  # gate and up alternate, as gpt-oss has them
    limit: float = 0.0  # where gate and up are clamped, and 1 is added to up: gpt-oss; 0: nowhere
    alpha: float = 1.0  # silu's: gate · σ(alpha · gate)

    def steps(self, inner: int) -> tuple[int, int]:
        """Rows between two gates, and from a gate to its up."""
        return (2, 1) if self.interleaved else (1, inner)


PLAIN = Layout()


def routed_mlp(
    x_TH: Tensor,
    w1_EDH: Tensor,
    w2_EHI: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    layout: Layout = PLAIN,
    bias_ED: Tensor | None = None,
) -> Tensor:
    """y_t = Σ_k weight_tk · W2_e (silu(gate) ⊙ up), [gate; up] = W1_e x_t + b_e, e = index_tk.

    Every expert runs on every token and is then weighed, which is slow and plainly right.
    """
    y_TH = torch.zeros_like(x_TH)
    for expert, (w1_DH, w2_HI) in enumerate(zip(w1_EDH.unbind(0), w2_EHI.unbind(0), strict=True)):
        weight_T = torch.where(indices_TK == expert, weights_TK, 0).sum(-1)
        h_TD = F.linear(x_TH, w1_DH, None if bias_ED is None else bias_ED[expert])
        a_TI = activate(h_TD, layout)
        y_TH = y_TH + weight_T[:, None].to(x_TH.dtype) * (a_TI @ w2_HI.T)
    return y_TH


def activate(h_TD: Tensor, layout: Layout) -> Tensor:
    """What a layout makes of gate and up: [T, I]."""
    if layout.interleaved:
        gate_TI, up_TI = h_TD[:, 0::2], h_TD[:, 1::2]
    else:
        gate_TI, up_TI = h_TD.chunk(2, dim=-1)
    if layout.limit:
        gate_TI = gate_TI.clamp(max=layout.limit)
        up_TI = up_TI.clamp(-layout.limit, layout.limit) + 1
    return gate_TI * torch.sigmoid(layout.alpha * gate_TI) * up_TI
