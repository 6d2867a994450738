"""From what units are predicted to be worth to which are on: routers for a budget.

T tokens, U units, R routed of them, H hidden.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.errors import UserError
from moe.upcycle.calibrate.journal import LayerFit
from moe.upcycle.calibrate.parts import Part


@dataclass(slots=True)
class Choice:
    """How a layer's units are chosen."""

    shared: tuple[int, ...]
    dead: tuple[int, ...]  # units that add nothing to any token
    top_k: int = 0  # of the routed; 0 where a threshold decides
    mean: float = 0.0  # on per token, measured on the text, shared ones included
    weight: Tensor = field(default_factory=lambda: torch.empty(0))  # [R, H], float32
    bias: Tensor = field(default_factory=lambda: torch.empty(0))  # [R]
    routed: tuple[int, ...] = ()

    @property
    def living(self) -> list[int]:
        """The routed units that add something."""
        return [unit for unit in self.routed if unit not in self.dead]

    def on(self, x_TH: Tensor, units: int) -> Tensor:
        """Which units are on [T, U], 0 or 1, as the model will have it."""
        scores_TR = x_TH @ self.weight.to(x_TH).T + self.bias.to(x_TH)
        if self.top_k:
            best_TK = scores_TR.topk(self.top_k, dim=1).indices
            on_TR = torch.zeros_like(scores_TR).scatter(1, best_TK, 1.0)
        else:
            on_TR = (scores_TR >= 0).to(scores_TR)
        on_TU = x_TH.new_ones(len(x_TH), units)
        on_TU[:, list(self.routed)] = on_TR
        return on_TU


def choose(
    fits: Mapping[int, LayerFit], part: Part, dtype: torch.dtype
) -> tuple[dict[int, Choice], float | None]:
    """The choice of each layer, routers as `dtype` can hold them, and the threshold of all layers.

    Raises UserError where too few units of a layer, or none of any, add anything.
    """
    choices = {layer: _share(layer, fit, part) for layer, fit in fits.items()}
    living = [fits[layer].scores[:, choice.living].flatten() for layer, choice in choices.items()]
    every = torch.cat(living)
    if all(len(choice.dead) == part.units for choice in choices.values()):
        raise UserError(
            f"no {part.noun} add anything to any token of the calibration text: there is nothing "
            "to choose between. Is the source damaged?"
        )
    # shared units may be all that live: then the others need only be equal
    below = every.min().item() - 2 * _margin(every) if len(every) else -1.0
    scores = {layer: _scores(fits[layer], choice, below) for layer, choice in choices.items()}
    threshold = None
    if part.budget == "threshold":
        units = sum(s.numel() for s in scores.values())
        threshold = bar(every, part, units)
    elif part.budget == "layer":
        for layer, top_k in _spend(scores, choices, part).items():
            choices[layer].top_k = top_k
    else:
        for choice in choices.values():
            choice.top_k = round(part.keep) - part.shared
    for layer, choice in choices.items():
        _finish(choice, fits[layer], scores[layer], part, threshold or 0.0, dtype)
    return choices, threshold


def _share(layer: int, fit: LayerFit, part: Part) -> Choice:
    """The shared units of largest mean; dead ones never are."""
    largest = fit.mean.max()
    dead = [u for u, mean in enumerate(fit.mean.tolist()) if mean <= 1e-9 * largest]
    order = fit.mean.argsort(descending=True, stable=True).tolist()
    if part.first:
        order = list(range(len(fit.mean)))
    elif part.shared > (alive := len(fit.mean) - len(dead)):
        raise UserError(
            f"layer {layer}: {alive} of {len(fit.mean)} {part.noun} add anything on the "
            f"calibration text, and {part.shared} are to be shared. Use fewer --shared-heads, or "
            "other --layers."
        )
    shared = tuple(sorted(order[: part.shared]))
    routed = tuple(u for u in range(len(fit.mean)) if u not in shared)
    return Choice(shared=shared, dead=tuple(dead), routed=routed)


def _scores(fit: LayerFit, choice: Choice, below: float) -> Tensor:
    """Predictions [T, R]; a dead unit's is below those of all layers' living ones, always."""
    scores_TU = fit.scores.clone()
    scores_TU[:, list(choice.dead)] = below
    return scores_TU[:, list(choice.routed)]


def _margin(scores: Tensor) -> float:
    """A distance between scores that no rounding closes."""
    return max(scores.std(correction=0).item(), 1e-3 * scores.abs().max().item(), 1e-6)


def bar(scores: Tensor, part: Part, units: int) -> float:
    """What as many scores reach as the budget has room for among so many units of all tokens, those
    that add nothing counted: they have no score here.
    """
    on = min(max(1, round(part.keep / part.units * units)), len(scores))
    if on == len(scores):
        return scores.min().item() - _margin(scores)
    # between two scores, so that rounding in the model lets no other one through
    low = scores.kthvalue(len(scores) - on).values.item()
    high = scores.kthvalue(len(scores) - on + 1).values.item()
    return (low + high) / 2


def _spend(
    scores: Mapping[int, Tensor], choices: Mapping[int, Choice], part: Part
) -> dict[int, int]:
    """Routed units per token for each layer, at least one: the sum of what is kept is largest.

    A layer's k-th unit is worth what the k-th best predictions are on average, less than its
    (k-1)-th, so taking the best ones first is best.
    """
    budget = round(part.keep * len(scores)) - part.shared * len(scores)
    counts = dict.fromkeys(scores, 1)
    worth = {layer: s.sort(dim=1, descending=True).values.mean(0) for layer, s in scores.items()}
    gains = [
        (-gain, layer)
        for layer, means in worth.items()
        for gain in means[1 : len(choices[layer].living)].tolist()
    ]
    for _, layer in sorted(gains)[: max(0, budget - len(scores))]:
        counts[layer] += 1
    return counts


def _finish(
    choice: Choice, fit: LayerFit, scores_TR: Tensor, part: Part, threshold: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Weight and bias so that scores have deviation 1, or the chosen ones weigh alike."""
    solution = fit.solution[:, list(choice.routed)].clone()
    dead = [place for place, unit in enumerate(choice.routed) if unit in choice.dead]
    solution[:, dead] = 0
    solution[-1, dead] = scores_TR[0, dead].double()
    if choice.top_k:
        best = scores_TR.topk(choice.top_k, dim=1).values
        choice.mean = float(len(choice.shared) + choice.top_k)
    else:
        choice.mean = len(choice.shared) + (scores_TR >= threshold).sum(1).double().mean().item()
        solution[-1] -= threshold
    alive = [place for place, unit in enumerate(choice.routed) if unit not in choice.dead]
    scale = scores_TR[:, alive].double().std(correction=0).item() if alive else 0.0
    if part.spread is not None:
        widest = (best[:, 0] - best[:, -1]).max().item()
        scale = widest / math.log1p(part.spread)
    solution /= scale if scale > 0 else 1.0
    choice.weight = solution[:-1].T.to(dtype).float().contiguous()
    choice.bias = solution[-1].to(dtype).float().contiguous()
