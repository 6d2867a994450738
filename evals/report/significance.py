"""Which differences are more than chance: Holm's correction of the p that `moe eval` has found.

judged = judge([rows, …])             # {(table, row, baseline): Verdict}
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe.evals.chance import LEVEL

WIDTH = 1.959964  # standard errors to each side of a 95 % interval


class Verdict(NamedTuple):
    p: float
    adjusted: float  # by Holm
    among: int  # comparisons that were judged together

    @property
    def significant(self) -> bool:
        return self.adjusted < LEVEL


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p: the chance of one false finding among all stays below the level.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def judge(tables: Sequence[Sequence[dict[str, Any]]]) -> dict[tuple[int, int, int], Verdict]:
    """Every comparison with a p, by (table, row, baseline), corrected over all of them.

    Metrics that are functions of the same sums are one comparison.
    """
    p: dict[tuple[Any, ...], float] = {}
    places: dict[tuple[int, int, int], tuple[Any, ...]] = {}
    for table, rows in enumerate(tables):
        for row, found in enumerate(rows):
            for baseline, d in enumerate(found["differences"]):
                if d["p"] is not None:
                    comparison = table, found["task"], d["of"] or row, baseline
                    p[comparison] = d["p"]
                    places[table, row, baseline] = comparison
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    return {place: Verdict(p[c], adjusted[c], len(p)) for place, c in places.items()}
