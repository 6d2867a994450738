"""All experts on every token as one dense MLP, inner columns weighed by expert: on a CPU what is
faster than gathering each expert's tokens where most experts are on or all of them are narrow.

T tokens, H hidden, I inner, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.backend import forced

# Columns that an expert's rows cost as much as to gather and scatter, and those that a few tokens
# cost to find, from `FEW` tokens on and below: bench/results/masked_mlp.md.
MANY_OVERHEAD, FEW_OVERHEAD, FEW = 110, 40, 16


def masks_pay(x_TH: Tensor, share: float, inner: int) -> bool:
    """Whether all experts at once beat the chosen ones apart, that share of all pairs being on.

    For inference: it keeps more for a backward pass than the chosen experts would.
    """
    ours = x_TH.device.type == "cpu" and forced() in (None, "cpu")
    overhead = MANY_OVERHEAD if len(x_TH) >= FEW else FEW_OVERHEAD
    return ours and not torch.is_grad_enabled() and share * (1 + overhead / inner) > 1


def masked_mlp(x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, weights_TE: Tensor) -> Tensor:
    """Σ_e weights[t, e] · SwiGLU expert e of x[t]: [T, H]; weights are 0 where none is chosen."""
    experts, _, inner = w2_EHI.shape
    gate_EIH, up_EIH = w1_EDH.unflatten(1, (2, inner)).unbind(1)
    gate_TF = F.linear(x_TH, gate_EIH.reshape(experts * inner, -1))
    a_TF = F.silu(gate_TF).mul_(F.linear(x_TH, up_EIH.reshape(experts * inner, -1)))
    weights_TE1 = weights_TE[:, :, None].to(a_TF.dtype)
    # what is not chosen may overflow, and zero times that would not be nothing
    a_TF.view(-1, experts, inner).mul_(weights_TE1).masked_fill_(weights_TE1 == 0, 0.0)
    return a_TF @ w2_EHI.transpose(1, 2).reshape(experts * inner, -1)
