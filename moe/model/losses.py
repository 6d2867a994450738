"""What a router did to a batch: loads, entropy, and the losses that act on it.

Everything is returned from the forward pass as sums over tokens, so that adding micro-batches and
ranks is exact; nothing is kept between calls, so recomputation cannot count twice.
T tokens, E parts (experts, or heads that compete), K chosen per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.kernels import ops
from moe.model.spec import BalanceNorm


class RoutingLoad(NamedTuple):
    """One router's batch, in float32 (float64 in a float64 model). Padding is never counted."""

    counts: Tensor  # [E] tokens that chose each part
    probability: Tensor  # [E] router probability summed over tokens
    entropy: Tensor  # [] nats, summed over tokens
    tokens: Tensor  # [] tokens counted
    balance: Tensor  # [] balance loss (or a budget's), mean over tokens, before its coefficient
    z: Tensor  # [] mean squared logsumexp of the logits; 0 for a router without logits
    dropped: Tensor | None = None  # [] choices (counted above) without room, where it is limited


class LayerRouting(NamedTuple):
    """The routers of one layer; None where the part is dense."""

    attention: RoutingLoad | None
    mlp: RoutingLoad | None


class LayerLoad(NamedTuple):
    """Fraction of tokens that chose each part over some reference batch; None where dense."""

    attention: Tensor | None
    mlp: Tensor | None


def measure(
    probability_TE: Tensor,
    chosen: Tensor,
    valid_T: Tensor | None,
    norm: BalanceNorm,
    reference_E: Tensor | None = None,
    logits_TE: Tensor | None = None,
    k: float = 1.0,
) -> RoutingLoad:
    """Loads and losses of one routing decision.

    `chosen` holds indices [T, K] (int64), or how much each part was chosen [T, E], `k` on average.

    balance = scale · Σ_e P_e f_e with P_e the mean probability of e and f_e the fraction of tokens
    that chose it; scale is 1 (paper), E (code) or E/K (unit: 1 when balanced). f is `reference_E`
    where given, the load of a larger batch (scope `global`), else of these tokens (`micro`).
    Source: MoH code, load_balancing; Switch Transformer eq. 4; ST-MoE eq. 5 for z.
    """
    num_tokens, num_parts = probability_TE.shape
    weight_T = probability_TE.new_ones(num_tokens)
    if valid_T is not None:
        weight_T = valid_T.to(weight_T)
    tokens = weight_T.sum()
    mean_T = weight_T / tokens.clamp(min=1)
    if chosen.dtype == torch.int64:
        counts_E, k = _count(chosen, weight_T, num_parts), chosen.shape[1]
    else:
        counts_E = weight_T @ chosen.to(weight_T)
    mean_E = mean_T @ probability_TE
    fraction_E = counts_E / tokens.clamp(min=1)
    if reference_E is not None:
        fraction_E = reference_E.to(mean_E)
    scale = {"paper": 1.0, "code": num_parts, "unit": num_parts / k}[norm]
    with torch.no_grad():
        entropy_T = torch.special.entr(probability_TE).sum(-1)
        entropy = weight_T @ entropy_T
    z = tokens.new_zeros(())
    if logits_TE is not None:
        z = mean_T @ torch.logsumexp(logits_TE, dim=-1).square()
    return RoutingLoad(
        counts=counts_E,
        probability=mean_E.detach() * tokens,
        entropy=entropy,
        tokens=tokens,
        balance=scale * (mean_E @ fraction_E),
        z=z,
    )


def keep_budget(
    load: RoutingLoad, on_TE: Tensor, valid_T: Tensor | None, aim: float
) -> RoutingLoad:
    """The load with a budget's loss in the place of its balance: (kept / aim - 1)².

    kept is how many of `on_TE` (0 or 1, with a straight-through gradient) a token has on average.
    """
    kept_T = on_TE.sum(-1)
    if valid_T is not None:
        kept_T = kept_T * valid_T
    kept = kept_T.sum() / load.tokens.clamp(min=1)
    return load._replace(balance=(kept / aim - 1).square())


def summed(routed: ops.Routed, k: int, reference_E: Tensor | None) -> RoutingLoad:
    """The same, norm "unit", from the sums that `ops.route` came with."""
    tokens = routed.tokens.clamp(min=1)
    mean_E = routed.probability_E / tokens
    fraction_E = routed.chosen_E / tokens if reference_E is None else reference_E.to(mean_E)
    return RoutingLoad(
        counts=routed.chosen_E,
        probability=routed.probability_E.detach(),
        entropy=routed.entropy,
        tokens=routed.tokens,
        balance=len(mean_E) / k * (mean_E @ fraction_E),
        z=routed.square / tokens,
    )


def weighed(load: RoutingLoad, spec: Any) -> Tensor:
    """A router's losses with its coefficients; a kind without a coefficient has no such loss."""
    balance, z = getattr(spec, "balance_coef", 0.0), getattr(spec, "z_coef", 0.0)
    return balance * load.balance + z * load.z


def _count(indices_TK: Tensor, weight_T: Tensor, num_parts: int) -> Tensor:
    """Tokens per part, padding weighing nothing: [E]."""
    counts_E = weight_T.new_zeros(num_parts)
    return counts_E.index_add_(
        0, indices_TK.reshape(-1), weight_T.repeat_interleave(indices_TK.shape[1])
    )


@torch.no_grad()
def update_selection_bias(
    biases: Sequence[Tensor], counts: Sequence[Tensor], targets: Sequence[Tensor], rate: float
) -> None:
    """Move each router's selection bias [E] against its load: + rate where below the target.

    Call once per optimiser step with the tokens [E] that chose each expert over the whole global
    batch, and how many should: K/E of them.
    Source: loss-free balancing, arXiv 2408.15664, algorithm 1.
    """
    for bias_E, counts_E, target in zip(biases, counts, targets, strict=True):
        bias_E += rate * torch.sign(target - counts_E)
