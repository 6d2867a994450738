"""Overrides of a router's choice: what MoTE sets, and nothing else does.

    router.steering = Steering(gain_E=gains, renormalise=True)

A router reads it at the places where the four semantics of moe.tune differ. T tokens, E experts (or
heads, KV groups, attention experts), K chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Added to a score or logit this puts a part before, or behind, all others. A number, not infinity:
# two of them in a group's score still add up, and a checkpoint's selection bias can hold it.
ALWAYS = 1e4


class Steering(NamedTuple):
    """Vectors [E] in the router's own dtype; None leaves that place alone."""

    logits_E: Tensor | None = None  # added before scores are made of logits
    select_E: Tensor | None = None  # added to what is chosen by, before groups are limited
    top_k_E: Tensor | None = None  # the same, after that: the next best of the same groups
    gain_E: Tensor | None = None  # of the weights, after the choice
    renormalise: bool = False  # a token's weights then add up to what they did

    @property
    def chooses(self) -> bool:
        """Whether the choice may be another one, not its weights alone."""
        return any(t is not None for t in (self.logits_E, self.select_E, self.top_k_E))


def add(values_TE: Tensor, addend_E: Tensor | None) -> Tensor:
    """Values, and the addend where there is one."""
    return values_TE if addend_E is None else values_TE + addend_E.to(values_TE)


def reweigh(
    weights_TK: Tensor, steering: Steering | None, indices_TK: Tensor | None = None
) -> Tensor:
    """Weights [T, K] of the chosen `indices_TK`, or [T, E] of all, with their gains.

    A token whose chosen experts are all off keeps no weight, renormalised or not. One that none of
    the gains concerns keeps its very bits.
    """
    if steering is None or steering.gain_E is None:
        return weights_TK
    gain = steering.gain_E.to(weights_TK)
    gained_TK = weights_TK * (gain if indices_TK is None else gain[indices_TK])
    if not steering.renormalise:
        return gained_TK
    left_T1 = gained_TK.sum(-1, keepdim=True)
    factor_T1 = weights_TK.sum(-1, keepdim=True) / torch.where(left_T1 == 0, 1.0, left_T1)
    return gained_TK * factor_T1
