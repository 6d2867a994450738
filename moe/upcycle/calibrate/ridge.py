"""Closed-form least squares, in float64.

H inputs, U outputs, T tokens, D inputs of an output projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.upcycle.calibrate.ranks import Ranks

ROUTER_PENALTY = 1e-2  # of the mean diagonal of the inputs' second moments
REFIT_PENALTY = 3e-2


@dataclass(slots=True)
class Moments:
    """Sums over tokens that a ridge regression of U outputs on H inputs (and 1) needs."""

    inputs: Tensor  # [H + 1, H + 1]
    products: Tensor  # [H + 1, U]
    squares: Tensor  # [U]

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(inputs + 1, inputs + 1), zeros(inputs + 1, outputs), zeros(outputs))

    def add(self, x_TH: Tensor, y_TU: Tensor) -> None:
        """Some tokens more."""
        x_TI, y_TU = with_one(x_TH).double(), y_TU.double()
        self.inputs += x_TI.T @ x_TI
        self.products += x_TI.T @ y_TU
        self.squares += y_TU.square().sum(0)

    def sum(self, ranks: Ranks) -> None:
        for sums in (self.inputs, self.products, self.squares):
            ranks.sum(sums)

    @property
    def mean(self) -> Tensor:
        """Of each output [U]."""
        return self.products[-1] / self.inputs[-1, -1]

    def solve(self, intercept: bool) -> Tensor:
        """Weights [H + 1, U] of the least squares, the last row 0 without an intercept."""
        size = len(self.inputs) if intercept else len(self.inputs) - 1
        solution = torch.zeros_like(self.products)
        solution[:size] = ridge(self.inputs[:size, :size], self.products[:size], ROUTER_PENALTY)
        return solution

    def explained(self, solution: Tensor) -> float:
        """R²: the share of the outputs' variance over tokens that the inputs explain."""
        error = self.squares - 2 * (solution * self.products).sum(0)
        error += (solution * (self.inputs @ solution)).sum(0)
        variance = self.squares.sum() - (self.mean.square() * self.inputs[-1, -1]).sum()
        return 1 - (error.sum() / variance).item() if variance > 0 else 0.0


def with_one(x_TH: Tensor) -> Tensor:
    """The inputs, and a 1 for the intercept."""
    return torch.cat([x_TH, x_TH.new_ones(len(x_TH), 1)], dim=1)


def ridge(
    inputs: Tensor, products: Tensor, penalty: float, towards: Tensor | None = None
) -> Tensor:
    """argmin ‖X W - Y‖² + λ‖W - W0‖² from XᵀX and XᵀY; λ is a share of XᵀX's mean diagonal.

    W0 is 0, or `towards`. Inputs that are all zero leave W0.
    """
    amount = penalty * inputs.diagonal().mean()
    if amount == 0:
        return torch.zeros_like(products) if towards is None else towards.clone()
    if towards is not None:
        products = products + amount * towards
    whole = inputs + amount * torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    return torch.cholesky_solve(products, torch.linalg.cholesky(whole))


@dataclass(slots=True)
class Refit:
    """An output projection for what is left of its inputs: argmin ‖(g∘z) W' - z W‖² + λ‖W' - W‖².

    W is [D, H]; z [T, D]; g is 0 where a unit is off.
    """

    kept: Tensor  # [D, D] of the gated inputs with themselves
    whole: Tensor  # [D, D] of the gated inputs with all

    @classmethod
    def empty(cls, inputs: int, device: torch.device) -> "Refit":
        shape = inputs, inputs
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, z_TD: Tensor, on_TD: Tensor) -> None:
        """Some tokens more. Products of a window in float32: sums of many are what needs more."""
        gated_TD = z_TD * on_TD
        self.kept += (gated_TD.T @ gated_TD).double()
        self.whole += (gated_TD.T @ z_TD).double()

    def solve(self, weight_HD: Tensor, ranks: Ranks) -> Tensor:
        """The new projection [H, D], in float64."""
        kept, whole = ranks.sum(self.kept), ranks.sum(self.whole)
        given = weight_HD.double().T
        return ridge(kept, whole @ given, REFIT_PENALTY, towards=given).T.contiguous()
