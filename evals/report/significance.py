"""Whether differences are more than chance: two-sided p of paired differences, Holm's correction.

for row in rows: ...                  # as `moe eval` writes them
judged = judge(rows)                  # {(row, baseline): Verdict}
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

LEVEL = 0.05
WIDTH = 1.959964  # standard errors to each side of a 95 % interval


class Verdict(NamedTuple):
    p: float
    adjusted: float  # by Holm, over all comparisons that were judged with it

    @property
    def significant(self) -> bool:
        return self.adjusted < LEVEL


def p_value(difference: float, error: float | None) -> float | None:
    """Of a difference with a standard error, by the normal distribution; None where it says
    nothing: no error, or none at all between the items.
    """
    if not error:
        return None
    return math.erfc(abs(difference / error) / math.sqrt(2))


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
    """Every comparison with a paired error, by (table, row, baseline), corrected over all of
    them.
    """
    p = {
        (table, row, baseline): value
        for table, rows in enumerate(tables)
        for row, found in enumerate(rows)
        for baseline, d in enumerate(found["differences"])
        if d["value"] is not None and (value := p_value(d["value"], d["error"])) is not None
    }
    adjusted = holm(list(p.values()))
    return {key: Verdict(p[key], a) for key, a in zip(p, adjusted, strict=True)}
