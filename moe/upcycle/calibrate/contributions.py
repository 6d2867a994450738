"""What each unit adds to the residual stream for each token, by norm or by the loss's curvature.

T tokens, U units of s inputs of the output projection W [H, D], F [H, H] the gradient's second
moment (the identity for a norm): c = sqrt(yᵀ F y) with y = z_u W_uᵀ, so c² = z_u (W_uᵀ F W_u) z_uᵀ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Units:
    """Which inputs of an output projection belong to which unit; `always` ones to none."""

    columns: Tensor  # [U, s]
    always: Tensor  # [A]

    @classmethod
    def in_a_row(cls, inputs: int, units: int, device: torch.device) -> "Units":
        """Heads or groups, as they lie."""
        columns = torch.arange(inputs, device=device).view(units, -1)
        return cls(columns, columns.new_empty(0))

    @classmethod
    def of_order(cls, order: Tensor, always: int, units: int) -> "Units":
        """Slices of an order of neurons, after those that are always on."""
        return cls(order[always:].view(units, -1), order[:always])

    def to(self, device: torch.device | str) -> "Units":
        return Units(self.columns.to(device), self.always.to(device))

    def take(self, z_TD: Tensor) -> Tensor:
        """The inputs of each unit [U, T, s]."""
        return z_TD[:, self.columns.flatten()].unflatten(1, self.columns.shape).transpose(0, 1)

    def spread(self, on_TU: Tensor, inputs: int) -> Tensor:
        """A gate per unit as one per input [T, D]."""
        on_TD = on_TU.new_ones(len(on_TU), inputs)
        on_TD[:, self.columns.flatten()] = on_TU.repeat_interleave(self.columns.shape[1], 1)
        return on_TD


def metrics(weight_HD: Tensor, units: Units, fisher_HH: Tensor | None) -> Tensor:
    """W_uᵀ F W_u of each unit [U, s, s], float32."""
    weight_UHs = weight_HD.double()[:, units.columns.flatten()]
    weight_UHs = weight_UHs.unflatten(1, units.columns.shape).transpose(0, 1)
    other_UHs = weight_UHs if fisher_HH is None else fisher_HH.double() @ weight_UHs
    return (weight_UHs.transpose(1, 2) @ other_UHs).float()


def contributions(z_TD: Tensor, units: Units, metric_Uss: Tensor) -> Tensor:
    """c [T, U], float32."""
    z_UTs = units.take(z_TD)
    square_UT = ((z_UTs @ metric_Uss) * z_UTs).sum(-1)
    return square_UT.clamp(min=0).sqrt().T


def share_of(worth_TU: Tensor, norm_T1: Tensor) -> Tensor:
    """Contributions over the length of the residual stream; of a token that has none, zeros."""
    return torch.where(norm_T1 > 0, worth_TU / norm_T1, 0.0)


def importance(weight_HD: Tensor, fisher_HH: Tensor | None) -> Tensor:
    """What one unit of each input adds [D]: sqrt(w_jᵀ F w_j), float32."""
    weight_HD = weight_HD.double()
    other_HD = weight_HD if fisher_HH is None else fisher_HH.double() @ weight_HD
    return (weight_HD * other_HD).sum(0).clamp(min=0).sqrt().float()
