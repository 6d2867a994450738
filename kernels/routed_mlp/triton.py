"""The routed MLP in Triton: the plan's rows through gathered, grouped GEMMs, forward and backward.

Keeps x and h, or x alone (`recompute_h`). Source of the algebra: SonicMoE, arXiv 2512.14080: the
weight is folded into a, and its gradient is <dA, a>, so that y is never kept.

T tokens, H hidden, I inner, D = 2I, E experts, K chosen, P = T·K pairs, U tiles.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from moe.kernels import device
from moe.kernels.route.naive import Plan, block_rows
from moe.kernels.routed_mlp import gemm, gradients
from moe.kernels.routed_mlp.naive import PLAIN, Layout
from moe.kernels.tiling import Tiling, tiling


class Launch:
    """Everything that several kernels of one call are given alike."""

    def __init__(
        self,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        plan: Plan,
        layout: Layout,
        bias: Tensor | None = None,
    ) -> None:
        self.bias, self.act = bias, {"LIMIT": layout.limit, "ALPHA": layout.alpha}
        self.x, self.w1, self.w2, self.plan = x, w1, w2, plan
        self.k = plan.place_TK.shape[1]
        self.hidden, self.inner = w2.shape[1:]
        self.gate, self.up = layout.steps(self.inner)
        self.rows = block_rows(plan.place_TK.numel(), w1.shape[0])
        self.tiles = len(plan.tile_U)
        self.sorted = plan.pair_P, plan.offset_E1, plan.tile_U

    def cut(self, kernel: str) -> tuple[Tiling, dict[str, Any]]:
        """A kernel's tiling, and its keyword arguments."""
        found = tiling(kernel, self.x.device, self.x.dtype, self.rows, (self.hidden, self.inner))
        return found, {
            "BM": found.block_m or self.rows,
            "BN": found.block_n,
            "BK": found.block_k,
            "UPCAST": device.upcast(self.x.dtype),
            "PRECISION": device.precision(),
            "ACC": device.accumulator(self.x.dtype),
        } | found.options()

    def up_swiglu(self, weights: Tensor, h: Tensor | None, a: Tensor | None) -> None:
        cut, arguments = self.cut("up_swiglu")
        step, w1 = self.w1.stride(1), self.w1
        items = self.tiles * triton.cdiv(self.inner, cut.block_n)
        gemm.up_swiglu[cut.grid(items, self.x.device)](
            self.x, w1, self.bias, weights, *self.sorted, h, a, self.x.stride(0), w1.stride(0),
            self.gate * step, self.up * step, w1.stride(2), self.gate, self.up, self.tiles,
            self.hidden, H=self.hidden, I=self.inner, K=self.k, SAVE_H=h is not None,
            WEIGH=a is not None, BIASED=self.bias is not None, GROUP=cut.group, **self.act,
            **arguments,
        )  # fmt: skip

    def grouped(self, kernel: str, a_PK: Tensor, w_EKN: Tensor) -> Tensor:
        """a times its rows' experts: [P, N]."""
        cut, arguments = self.cut(kernel)
        width = w_EKN.shape[2]
        y_PN = a_PK.new_empty(len(a_PK), width)
        items = self.tiles * triton.cdiv(width, cut.block_n)
        gemm.grouped_gemm[cut.grid(items, self.x.device)](
            a_PK, w_EKN, *self.sorted[1:], y_PN, *w_EKN.stride(), self.tiles, w_EKN.shape[1],
            K=w_EKN.shape[1], N=width, GROUP=cut.group, **arguments,
        )  # fmt: skip
        return y_PN

    def combine(self, y_PH: Tensor) -> Tensor:
        tokens = len(self.plan.place_TK)
        out_TH = y_PH.new_empty(tokens, self.hidden)
        if not tokens:
            return out_TH
        gemm.combine[(tokens,)](
            y_PH, self.plan.place_TK, out_TH, N=self.hidden, K=self.k,
            BN=min(1024, triton.next_power_of_2(self.hidden)),
            UPCAST=device.upcast(y_PH.dtype), ACC=device.accumulator(y_PH.dtype), num_warps=4,
        )  # fmt: skip
        return out_TH

    def down_dgrad(self, dy: Tensor, h: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dh [P, D], the weighed activation [P, I], and the weights' gradient [T, K]."""
        cut, arguments = self.cut("down_dgrad")
        dh, a = torch.empty_like(h), h.new_empty(len(h), self.inner)
        blocks = triton.cdiv(self.inner, cut.block_n)
        wide = torch.promote_types(h.dtype, torch.float32)
        parts = h.new_empty(len(h), blocks, dtype=wide)
        w2 = self.w2
        gradients.down_dgrad[cut.grid(self.tiles * blocks, dy.device)](
            dy, w2, h, weights, *self.sorted, dh, a, parts, dy.stride(0), w2.stride(0),
            w2.stride(1), w2.stride(2), self.gate, self.up, self.tiles,
            H=self.hidden, I=self.inner, K=self.k, GROUP=cut.group, PARTS=cut.parts, **self.act,
            **arguments,
        )  # fmt: skip
        dweights = torch.empty_like(weights)
        gradients.gather_sum[(triton.cdiv(weights.numel(), 256),)](
            parts, self.plan.place_TK, dweights, weights.numel(), N=blocks,
            NP=triton.next_power_of_2(blocks), B=256,
        )  # fmt: skip
        return dh, a, dweights

    def weight_gradient(
        self, left: Tensor, right: Tensor, gather_left: bool, dw: Tensor, add: bool
    ) -> Tensor:
        """Σ over each expert's rows of left ⊗ right into dw [E, M, N]; one of them is by token."""
        cut, arguments = self.cut("weight_gradient")
        experts, m, n = dw.shape
        items = experts * triton.cdiv(m, arguments["BM"]) * triton.cdiv(n, cut.block_n)
        gradients.weight_gradient[cut.grid(items, left.device)](
            left, right, self.plan.pair_P, self.plan.offset_E1, self.plan.order_E, dw,
            left.stride(0), right.stride(0), *dw.stride(), experts, M=m, N=n, K=self.k,
            GATHER_LEFT=gather_left, ADD=add, **arguments,
        )  # fmt: skip
        return dw

    def bias_gradient(self, dh: Tensor) -> Tensor:
        """[E, D], in the bias's dtype."""
        assert self.bias is not None
        dbias = torch.empty_like(self.bias)
        experts, width = dbias.shape
        gradients.bias_gradient[(experts, triton.cdiv(width, 128))](
            dh, self.plan.offset_E1, dbias, N=width, BM=32, BN=128,
            UPCAST=device.upcast(dbias.dtype), ACC=device.accumulator(dh.dtype), num_warps=4,
        )  # fmt: skip
        return dbias


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    plan: Plan,
    layout: Layout = PLAIN,
    save_h: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y [T, H] and h [P, D], empty without `save_h`. x and weights are contiguous."""
    launch = Launch(x, w1, w2, plan, layout, bias)
    pairs = plan.place_TK.numel()
    h = x.new_empty(pairs, 2 * launch.inner) if save_h else None
    a = x.new_empty(pairs, launch.inner)
    if pairs:
        launch.up_swiglu(weights, h, a)
    y = launch.grouped("down", a, w2.transpose(1, 2)) if pairs else a.new_empty(0, launch.hidden)
    return launch.combine(y), x.new_empty(0) if h is None else h


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    plan: Plan,
    h: Tensor,
    need_x: bool,
    need_weights: bool,
    layout: Layout = PLAIN,
    main_grads: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2, the weights [T, K] and the bias [E, D]; empty where not needed.

    `main_grads` [E, D, H] and [E, H, I], of a wider dtype, are added to in place of w1's and w2's.
    """
    launch = Launch(x, w1, w2, plan, layout, bias)
    pairs = plan.place_TK.numel()
    dbias = x.new_empty(0)
    dx, dw1, dw2 = (t.new_empty(0) for t in (x, w1, w2))
    if not pairs:
        return (
            torch.zeros_like(x) if need_x else dx,
            torch.zeros_like(w1) if need_weights and not main_grads else dw1,
            torch.zeros_like(w2) if need_weights and not main_grads else dw2,
            torch.zeros_like(weights),
            dbias if bias is None else torch.zeros_like(bias),
        )
    if not h.numel():
        h = x.new_empty(pairs, 2 * launch.inner)
        launch.up_swiglu(weights, h, None)
    dh, a, dweights = launch.down_dgrad(dy, h, weights)
    if need_weights:
        into1, into2 = main_grads or (torch.empty_like(w1), torch.empty_like(w2))
        launch.weight_gradient(dy, a, True, into2, main_grads is not None)
        launch.weight_gradient(dh, x, False, into1, main_grads is not None)
        if main_grads is None:
            dw1, dw2 = into1, into2
    if bias is not None:
        dbias = launch.bias_gradient(dh)
    if need_x:
        dx = launch.combine(launch.grouped("dx", dh, w1))
    return dx, dw1, dw2, dweights, dbias
