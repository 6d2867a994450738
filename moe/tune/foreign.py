"""The routers of transformers' families, computed from their entries in order to choose otherwise.

    places = check(router, family)                     # where weights and indices are returned
    handle = router.register_forward_hook(override(router, family, places, steering))

T tokens, E experts, K chosen, H hidden, G groups of e experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.errors import UserError
from moe.model.router import widen
from moe.model.steering import ALWAYS, Steering, add, reweigh
from moe.tune.families import Family, limits, renormalises


class Places(NamedTuple):
    """Where in a router's output its weights [T, K] and indices [T, K] are."""

    weights: int
    indices: int


def logits(router: Any, family: Family, x_TH: Tensor) -> Tensor:
    """What the router scores experts by [T, E]."""
    weight_EH = router.weight
    if family.wide:
        x_TH, weight_EH = x_TH.float(), weight_EH.float()
    bias_E = getattr(router, family.logits_bias) if family.logits_bias else None
    return F.linear(x_TH.reshape(-1, x_TH.shape[-1]), weight_EH, bias_E)


def route(
    router: Any,
    family: Family,
    logits_TE: Tensor,
    steering: Steering,
    kept_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in float32 or wider and indices [T, K], by the family's rule and steered.

    Where the choice `kept_TK` is as good as any, it is that one: bfloat16 logits tie often.
    """
    logits_TE = add(logits_TE, steering.logits_E)
    wide_TE = widen(logits_TE)
    score_TE = wide_TE.sigmoid() if family.score == "sigmoid" else wide_TE.softmax(-1)
    ranked_TE = choice_TE = score_TE
    if family.selection_bias is not None:
        ranked_TE = choice_TE = score_TE + getattr(router, family.selection_bias)
    elif steering.chooses or family.score == "chosen":
        choice_TE = logits_TE  # the same order; what is added to a choice is added to logits
    ranked_TE, choice_TE = add(ranked_TE, steering.select_E), add(choice_TE, steering.select_E)
    groups, top_groups = limits(router, family)
    if groups > top_groups:
        within_TE = _within(ranked_TE, family, groups, top_groups)
        # DeepSeek-V2 sets what is outside to 0, which no score in reach is behind
        choice_TE = choice_TE.masked_fill(~within_TE, -torch.inf)
    if steering.top_k_E is not None:
        last_E = steering.top_k_E.to(choice_TE)
        choice_TE = torch.where(last_E >= ALWAYS, last_E, choice_TE + last_E)
    indices_TK = choice_TE.topk(router.top_k, dim=-1).indices
    if kept_TK is not None:
        worth = (choice_TE.gather(1, i).sort(-1).values for i in (indices_TK, kept_TK))
        as_good_T1 = torch.eq(*worth).all(-1, keepdim=True)
        indices_TK = torch.where(as_good_T1, kept_TK, indices_TK)
    if family.score == "chosen":
        weights_TK = wide_TE.gather(1, indices_TK).softmax(-1)
        return reweigh(weights_TK, steering, indices_TK), indices_TK
    weights_TK = score_TE.gather(1, indices_TK)
    if renormalises(router, family):
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    if family.scale is not None:
        weights_TK = weights_TK * getattr(router, family.scale)
    return reweigh(weights_TK, steering, indices_TK), indices_TK


def _within(score_TE: Tensor, family: Family, groups: int, top_groups: int) -> Tensor:
    """Which experts lie in a token's best groups: bool [T, E]."""
    score_TGe = score_TE.unflatten(1, (groups, -1))
    count = 1 if family.group_score == "best" else 2
    best_TG = score_TGe.topk(count, dim=-1).values.sum(-1)
    chosen_TM = best_TG.topk(top_groups, dim=-1).indices
    within_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, chosen_TM, True)
    return within_TG.repeat_interleave(score_TGe.shape[2], dim=1)


@torch.no_grad()
def check(router: Any, family: Family, name: str) -> Places:
    """Hold a family's entry against the module that runs, on random numbers.

    Returns where its output has weights and indices. Raises UserError where it computes something
    else: another transformers, or a library that has replaced it.
    """
    weight: Any = router.weight
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(16, weight.shape[1], generator=generator).to(weight)
    with torch.autocast(x_TH.device.type, enabled=False):
        returned = router.forward(x_TH)  # without hooks: a tuning may be at work
        weights_TK, indices_TK = route(router, family, logits(router, family, x_TH), Steering())
    empty_TE = weights_TK.new_zeros(len(x_TH), len(weight))
    ours_TE = empty_TE.scatter(1, indices_TK, weights_TK)
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    for place, indices in enumerate(returned if isinstance(returned, tuple) else ()):
        if indices.is_floating_point() or indices.shape != indices_TK.shape:
            continue
        for other, weights in enumerate(returned):
            if weights.is_floating_point() and weights.shape == indices.shape:
                theirs_TE = empty_TE.scatter(1, indices, weights.to(empty_TE))
                difference = (theirs_TE - ours_TE).norm() / ours_TE.norm()
                if difference < (0.02 if narrow else 1e-5):
                    return Places(other, place)
    raise UserError(
        f"{name} ({type(router).__name__}) does not route as moe/tune/families.py says its family "
        "does: another version of transformers changed it, or a library replaced it. Its entry has "
        "to be brought up to date first."
    )


def override(
    router: nn.Module, family: Family, places: Places, steering: Steering
) -> Callable[..., Any]:
    """A forward hook that replaces weights and indices. A token whose choice stays as it was keeps
    its very bits, unless its scores changed.
    """

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        theirs, indices = output[places.weights], output[places.indices]
        if not steering.chooses:
            weights = reweigh(widen(theirs), steering, indices).to(theirs)
            return _replaced(output, places, weights, indices)
        steered = steering._replace(gain_E=None)
        logits_TE = logits(router, family, arguments[0])
        new, chosen = route(router, family, logits_TE, steered, indices.long())
        new = new.to(theirs)
        if steering.logits_E is None:
            new = torch.where((chosen == indices).all(-1, keepdim=True), theirs, new)
        return _replaced(output, places, new, chosen.to(indices.dtype))

    return hook


def _replaced(output: tuple[Any, ...], places: Places, weights: Tensor, indices: Tensor) -> Any:
    parts = list(output)
    parts[places.weights], parts[places.indices] = weights, indices
    return tuple(parts)
