"""What two classes of prompts say of an expert, and how sure that is.

    sample = Sample(values_PC, tokens_P, target_P, unit_P, SCORES["rate_diff"])
    scores_C = sample.scores()
    low_C, high_C = sample.interval(1000, rng)
    maxima_B = sample.largest_by_chance(1000, rng)

P prompts, C experts, B resamples. A formula gets sums over the target's prompts and over the
others': `on` [.., C] of what an expert had, `of` [.., 1] of what it could have had.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Array = np.ndarray
Formula = Callable[[Array, Array, Array, Array], Array]
CONFIDENCE = 0.95
SMOOTHING = 0.5  # Jeffreys: half a token more that chose an expert, half a token that did not
BLOCK = 1024  # experts at a time: [1000, BLOCK] of float64 stays in a cache


def difference(on: Array, of: Array, on_rest: Array, of_rest: Array) -> Array:
    return on / of - on_rest / of_rest


def log_ratio(on: Array, of: Array, on_rest: Array, of_rest: Array) -> Array:
    """Natural logarithm of the ratio of rates, both smoothed."""
    both = 2 * SMOOTHING
    rates = (on + SMOOTHING) / (of + both), (on_rest + SMOOTHING) / (of_rest + both)
    return np.log(rates[0] / rates[1])


def npmi(on: Array, of: Array, on_rest: Array, of_rest: Array) -> Array:
    """-1: never chosen by the target's tokens; 0: independent, or never chosen; 1: by all of them
    and no other."""
    joint = on / (of + of_rest)
    by_chance = (on + on_rest) / (of + of_rest) * (of / (of + of_rest))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(joint / by_chance) / -np.log(joint)
    return np.where(on == 0, np.where(on_rest == 0, 0.0, -1.0), value)


class Score(NamedTuple):
    """A formula, and the sums that it is about."""

    array: Literal["counts", "mass"]
    by_prompt: bool  # every prompt counts the same, else every token does
    formula: Formula
    text: str


SCORES: dict[str, Score] = {
    "rate_diff": Score(
        "counts", True, difference, "mean over prompts of count / tokens, target minus rest"
    ),
    "gate_mass_diff": Score(
        "mass", True, difference, "mean over prompts of gate mass / tokens, target minus rest"
    ),
    "log_ratio": Score(
        "counts", False, log_ratio,
        "log of (count + 0.5) / (tokens + 1) of the target over that of the rest, tokens pooled",
    ),
    "npmi": Score(
        "counts", False, npmi,
        "pointwise mutual information of 'expert chosen' and 'token of the target', over "
        "-log of their joint probability, tokens pooled",
    ),
    "risk_diff": Score(
        "counts", False, difference,
        "a1 / (a1 + d1) - a2 / (a2 + d2), a tokens that chose the expert, d that did not, pooled",
    ),  # SteerMoE, arXiv 2509.09660
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """Prompts of two classes. Those of one unit (a prompt asked twice) are drawn together."""

    values: Array  # [P, C] counts or gate mass
    tokens: Array  # [P]
    target: Array  # bool [P]
    unit: Array  # [P], from 0 on; of one class each
    score: Score

    def scores(self) -> Array:
        """[C]"""
        return self.score.formula(*self.sums())[0]

    def rates(self) -> tuple[Array, Array]:
        """What the target's tokens, and the others', gave an expert on average: [C] each."""
        on, of, on_rest, of_rest = self.sums()
        return (on / of)[0], (on_rest / of_rest)[0]

    def sums(self) -> tuple[Array, Array, Array, Array]:
        weights = np.stack([self.target, ~self.target]).astype(np.float64)
        of = weights @ self._sizes()
        on = np.concatenate([weights @ block for _, block in self._blocks()], axis=1)
        return on[:1], of[:1, None], on[1:], of[1:, None]

    def interval(self, resamples: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Percentile bootstrap over prompts, within each class: low and high [C]."""
        drawn, of = [], []
        for rows in (self.target, ~self.target):
            units, unit = np.unique(self.unit[rows], return_inverse=True)
            times = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), resamples)
            drawn.append(times[:, unit].astype(np.float64))
            of.append((drawn[-1] @ self._sizes()[rows])[:, None])
        low, high = np.empty(self.values.shape[1]), np.empty(self.values.shape[1])
        tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
        for place, block in self._blocks():
            on, on_rest = drawn[0] @ block[self.target], drawn[1] @ block[~self.target]
            scores = self.score.formula(on, of[0], on_rest, of[1])
            # in rows, which sort several times faster than columns
            low[place], high[place] = np.quantile(np.ascontiguousarray(scores.T), tails, axis=1)
        return low, high

    def largest_by_chance(self, permutations: int, rng: np.random.Generator) -> Array:
        """Largest |score| of all experts under permuted labels [B], what a family-wise p needs."""
        units, first = np.unique(self.unit, return_index=True)
        labels = np.tile(self.target[first], (permutations, 1))
        labels = rng.permuted(labels, axis=1)[:, np.searchsorted(units, self.unit)]
        chosen, sizes = labels.astype(np.float64), self._sizes()
        of = (chosen @ sizes)[:, None]
        largest = np.zeros(permutations)
        for _, block in self._blocks():
            on = chosen @ block
            # a sum in another order may fall short of nothing by its last bits
            on_rest = np.maximum(block.sum(0) - on, 0.0)
            scores = self.score.formula(on, of, on_rest, sizes.sum() - of)
            largest = np.maximum(largest, np.abs(scores).max(1))
        return largest

    def _sizes(self) -> Array:
        whole = np.ones(len(self.tokens)) if self.score.by_prompt else self.tokens
        return whole.astype(np.float64)

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        """What is summed, some experts at a time: float64 [P, BLOCK]."""
        per = self.tokens[:, None].astype(np.float64) if self.score.by_prompt else 1.0
        for start in range(0, self.values.shape[1], BLOCK):
            place = slice(start, start + BLOCK)
            yield place, self.values[:, place].astype(np.float64) / per


def family_wise(scores_C: Array, maxima_B: Array) -> Array:
    """p of each score [C]: how often chance makes any expert's as large, the labels given included.

    Westfall and Young's single step.
    """
    ordered = np.sort(maxima_B)
    # equal up to the last bits of sums in another order counts as equal
    reached = len(ordered) - np.searchsorted(ordered, np.abs(scores_C) * (1 - 1e-9), side="left")
    return (1 + reached) / (1 + len(ordered))
