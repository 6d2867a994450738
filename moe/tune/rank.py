"""Which experts go with a label: a trace's prompts of one class against those of others.

    ranking = rank(trace, "REFUSED", score="rate_diff", seed=0)
    for column in ranking.order()[:10]:
        print(ranking.places[column], ranking.scores[column])

P prompts, C experts of all sites in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe.errors import UserError
from moe.tune.classes import classes, hold_out, identities, repeats
from moe.tune.families import PARTS, Part, Site
from moe.tune.families import columns as starts
from moe.tune.scores import CONFIDENCE, SCORES, Sample, family_wise
from moe.tune.trace import Trace

RESAMPLES = 1000
CAUTION = (
    "a high score says where tokens of this kind go, not that these experts make the behaviour: "
    "`moe tune control` compares with matched experts (a router of a fresh copy upcycle also "
    "scores)."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Arrays are [C]; NaN stands for an expert that was not compared."""

    score: str
    target: str
    rest: str
    places: list[tuple[int, Part, int]]  # layer, part, expert
    scores: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray  # of all experts compared together
    rates: dict[str, np.ndarray]  # rate_target, rate_rest and, of gate mass, mass_target, mass_rest
    held_out: np.ndarray | None  # scores on the prompts that nothing was chosen by
    share: float  # of prompts held out
    ids: dict[str, list[str]]  # of prompts: ranked, held_out
    prompts: dict[str, list[int]]  # the same, how many rows of the target and of the rest
    notes: list[str]

    @property
    def compared(self) -> int:
        return int(np.isfinite(self.scores).sum())

    def order(self, least: bool = False) -> np.ndarray:
        """Columns compared, the highest score first (`least`: lowest), ties by their place."""
        # the last bits of a sum depend on the machine and must not decide
        keys = np.round(self.scores if least else -self.scores, 12)
        by_place = [(layer, PARTS.index(part), expert) for layer, part, expert in self.places]
        columns = np.lexsort((*np.array(by_place).T[::-1], keys))
        return columns[: self.compared]  # NaN comes last


def rank(
    trace: Trace,
    target: str,
    vs: str | None = None,
    *,
    score: str = "rate_diff",
    part: Part | None = None,
    held_out: float | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ranking:
    """Score, interval, p and rates of every expert.

    `held_out` is a share of the prompts of each class; None is 0.3 where every class has 10. Raises
    UserError where labels, prompts or sites leave nothing to compare.
    """
    if score not in SCORES:
        raise UserError(f"score={score!r} is unknown. Use one of {', '.join(SCORES)}.")
    rows, is_target, notes = classes(trace, target, vs)
    columns, skipped = comparable(trace.sites, score, part)
    names = identities(trace.rows)
    groups = np.array([names[row] for row in rows])
    rest = vs or "the rest"
    share, held, remarks = hold_out(groups, is_target, held_out, (target, rest), seed)

    def sample(which: np.ndarray, score: str) -> Sample:
        values = getattr(trace, SCORES[score].array)[rows[which]][:, columns]
        units = [f"{t:d} {g}" for t, g in zip(is_target[which], groups[which], strict=True)]
        unit = np.unique(units, return_inverse=True)[1]
        return Sample(values, trace.tokens[rows[which]], is_target[which], unit, SCORES[score])

    def spread(values: np.ndarray) -> np.ndarray:
        whole = np.full(trace.counts.shape[1], np.nan)
        whole[columns] = values
        return whole

    ranked = sample(~held, score)
    scores = ranked.scores()
    low, high = ranked.interval(resamples, np.random.default_rng([seed, 1]))
    largest = ranked.largest_by_chance(resamples, np.random.default_rng([seed, 2]))
    rates = dict(zip(("mass_target", "mass_rest"), ranked.rates(), strict=True))
    if SCORES[score].array == "counts":
        rates = {key.replace("mass", "rate"): values for key, values in rates.items()}
    else:
        counted = sample(~held, "rate_diff").rates()
        rates |= dict(zip(("rate_target", "rate_rest"), counted, strict=True))
    skipped += _unlike(trace, columns) if SCORES[score].array == "mass" else []
    closing = [_many(len(scores), resamples), CAUTION]
    return Ranking(
        score=score, target=target, rest=rest, places=places(trace.sites), share=share,
        scores=spread(scores), low=spread(low), high=spread(high),
        p=spread(family_wise(scores, largest)), rates={k: spread(v) for k, v in rates.items()},
        held_out=spread(sample(held, score).scores()) if held.any() else None,
        ids={"ranked": sorted(set(groups[~held])), "held_out": sorted(set(groups[held]))},
        prompts={
            key: [int((is_target & which).sum()), int((~is_target & which).sum())]
            for key, which in (("ranked", ~held), ("held_out", held))
        },
        notes=[*notes, *skipped, *remarks, *repeats(groups), *closing],
    )  # fmt: skip


def places(sites: Sequence[Site]) -> list[tuple[int, Part, int]]:
    """Layer, part and expert of every column of a trace."""
    return [(site.layer, site.part, expert) for site in sites for expert in range(site.experts)]


def comparable(
    sites: Sequence[Site], score: str, part: Part | None
) -> tuple[np.ndarray, list[str]]:
    """Which columns a score can say something of, and notes on the others."""
    if part is not None and not any(site.part == part for site in sites):
        there = " and ".join(sorted({site.part for site in sites}))
        raise UserError(f"part={part!r}: the trace has no router there. It has them in {there}.")
    counted = SCORES[score].array == "counts"
    used, always, skipped = [], 0, []
    for site in sites:
        wanted = part is None or site.part == part
        # a soft gate takes every expert, and so does a top-k of all
        if wanted and counted and site.top_k >= site.experts and site.mode == "token_choice":
            skipped.append(site)
            wanted = False
        on = np.full(site.experts, wanted)
        if wanted and counted:
            on[list(site.always)] = False
            always += len(site.always)
        used.append(on)
    columns = np.flatnonzero(np.concatenate([np.zeros(0, bool), *used]))
    notes = []
    if skipped:
        notes.append(
            f"{len(skipped)} of {len(sites)} routers take every expert for every token, so counts "
            f"say nothing of them ({skipped[0].name} is the first): --score gate_mass_diff ranks "
            "them."
        )
    if always:
        notes.append(
            f"{always:,} experts that are on for every token are left out: counts say nothing of "
            "them, --score gate_mass_diff does where their gates differ."
        )
    if not len(columns):
        raise UserError(" ".join([*notes, "Nothing is left to rank."]))
    return columns, notes


def _unlike(trace: Trace, columns: np.ndarray) -> list[str]:
    """A note where a token's gates add up to more in some routers than in others."""
    sums = []
    for site, start in zip(trace.sites, starts(trace.sites)[:-1], strict=True):
        if start in columns:
            mass = trace.mass[:, start : start + site.experts].sum(dtype=np.float64)
            sums.append((float(mass / trace.tokens.sum()), site.name))
    low, high = min(sums), max(sums)
    if high[0] <= 1.5 * low[0]:
        return []
    return [
        f"a token's gates add up to {low[0]:.3g} in {low[1]} and to {high[0]:.3g} in {high[1]}: "
        "scores of the two are not of one measure. --part ranks one kind of router."
    ]


def _many(experts: int, resamples: int) -> str:
    by_chance = round(experts * (1 - CONFIDENCE))
    return (
        f"{experts:,} experts were compared: at {CONFIDENCE * 100:.0f} % some {by_chance:,} "
        "intervals exclude 0 by chance alone. p is of all of them together: how often the largest "
        f"|score| of {resamples:,} permutations of the labels is as large (no p is below "
        f"1/{resamples + 1:,})."
    )
