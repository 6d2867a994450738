"""The routed MLP as a plain sum over experts: the specification, in any dtype, by autograd.

T tokens, H hidden, I inner, E experts, K chosen per token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def routed_mlp(
    x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """y_t = Σ_k weight_tk · W2_e (silu(gate) ⊙ up), [gate; up] = W1_e x_t, e = index_tk; D = 2I.

    Every expert runs on every token and is then weighed, which is slow and plainly right.
    """
    y_TH = torch.zeros_like(x_TH)
    for expert, (w1_DH, w2_HI) in enumerate(zip(w1_EDH.unbind(0), w2_EHI.unbind(0), strict=True)):
        weight_T = torch.where(indices_TK == expert, weights_TK, 0).sum(-1)
        gate_TI, up_TI = (x_TH @ w1_DH.T).chunk(2, dim=-1)
        y_TH = y_TH + weight_T[:, None].to(x_TH.dtype) * ((F.silu(gate_TI) * up_TI) @ w2_HI.T)
    return y_TH
