"""transformers' own mixtures on our kernels: experts_implementation="moe".

import moe.model
model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe")

Experts that are gated by SiLU run on every backend; gpt-oss's (gate and up by turns, clamped, with
biases) on Triton, or as the specification with MOE_KERNELS=naive. T tokens, H hidden, E experts, K
chosen, I inner.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe.errors import UserError
from moe.kernels import ops
from moe.kernels.routed_mlp.naive import activate

NAME = "moe"
_layouts: WeakKeyDictionary[nn.Module, ops.Layout] = WeakKeyDictionary()


def run_experts(experts: Any, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own forward: [T, H].

    Indices past the last expert belong to other ranks and add nothing. Raises UserError for experts
    of a kind that the kernels do not have.
    """
    layout = _layouts.get(experts)
    if layout is None:
        layout = _layouts[experts] = layout_of(experts)
    w1, w2 = experts.gate_up_proj, experts.down_proj
    if getattr(experts, "is_transposed", False):
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    biased = getattr(experts, "has_bias", False)
    num_experts = len(w1)
    indices_TK = indices_TK.clamp(max=num_experts)
    y_TH = ops.routed_mlp(
        x_TH, w1, w2, indices_TK, weights_TK, layout=layout,
        bias=experts.gate_up_proj_bias if biased else None,
    )  # fmt: skip
    if biased:  # a small dense product: each token's weights per expert, times the biases
        weight_TE = weights_TK.new_zeros(len(x_TH), num_experts + 1)
        weight_TE = weight_TE.scatter_add(1, indices_TK, weights_TK)[:, :num_experts]
        y_TH = y_TH + weight_TE.to(y_TH.dtype) @ experts.down_proj_bias.to(y_TH.dtype)
    return y_TH.to(x_TH.dtype)


@torch.no_grad()
def layout_of(experts: Any) -> ops.Layout:
    """How an experts module uses its first layer, found by trying: its gate on a few numbers.

    Raises UserError where it is none of what the kernels compute.
    """
    kind = type(experts).__name__
    if not getattr(experts, "has_gate", True) or getattr(experts, "has_post_expert_norm", False):
        raise UserError(
            f"{kind}: experts without a gate, or with a norm of their own, have no kernels here. "
            "Use another experts_implementation, such as grouped_mm."
        )
    limit, alpha = (float(getattr(experts, name, 0) or 0) for name in ("limit", "alpha"))
    h = 4 * torch.randn(7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = experts._apply_gate(h)
    for layout in (ops.Layout(), ops.Layout(interleaved=True, limit=limit, alpha=alpha)):
        if torch.allclose(activate(h, layout), theirs, rtol=1e-9, atol=1e-12):
            return layout
    raise UserError(
        f"{kind}: its activation is neither SiLU(gate) · up nor gpt-oss's, the two that the "
        "kernels have. Use another experts_implementation, such as grouped_mm."
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
