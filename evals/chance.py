"""Chance: how often a difference as large comes without a reason, and how far a mean may be off.

    p = sign_flip([0.5, 0.0, -0.25, ...])          # of paired differences; McNemar's of shares
    low, high = wilson(7 / 10, 10)

All of it holds at any number of items: of five that agree no p is below 2 / 2^5 = 0.0625.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, stdtrit

LEVEL = 0.05  # of what is called a finding; an interval holds the rest
FEWEST = 6  # items, of which a finding can come at all: 2 / 2^6 is below the level, 2 / 2^5 is not
ENUMERATED = 16  # differences whose signs are all tried
DRAWS = 99_999  # of signs of more: no p is below 1 / (DRAWS + 1)
CHUNK = 2**22  # signs at a time
ALIKE = 1e-9  # relative: as large, in floating point


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the sum of paired differences, if each had either sign as often.

    Exact where all are of one size, as of answers that are right or wrong (McNemar's test: a coin
    for each item on which the two differ), and of ENUMERATED or fewer; else from DRAWS of signs,
    the same every time.
    """
    d = np.asarray([x for x in differences if x], dtype=np.float64)
    count = len(d)
    if not count:
        return 1.0
    d /= np.abs(d).max()
    if np.abs(d).min() > 1 - ALIKE:
        fewer = min(int((d > 0).sum()), int((d < 0).sum()))
        return min(1.0, 2 * float(bdtr(fewer, count, 0.5)))
    least = abs(d.sum()) - ALIKE * np.abs(d).sum()
    if count <= ENUMERATED:
        every = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs(2 * (every @ d) - d.sum()) >= least).mean())
    draw, reached, left = np.random.default_rng(0), 0, DRAWS
    while left:
        rows = min(left, max(1, CHUNK // count))
        packed = np.frombuffer(draw.bytes(rows * -(-count // 8)), dtype=np.uint8)
        signs = np.unpackbits(packed.reshape(rows, -1), axis=1, count=count)
        reached += int((np.abs(2 * (signs @ d) - d.sum()) >= least).sum())
        left -= rows
    return (1 + reached) / (1 + DRAWS)


def reach(error: float, freedom: float) -> float:
    """Half of the interval around a mean with an estimated standard error (Student's t)."""
    return float(stdtrit(freedom, 1 - LEVEL / 2)) * error


def wilson(share: float, items: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share of so many items (Wilson 1927)."""
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z * math.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2) / (1 + z * z / items)
    return max(0.0, middle - half), min(1.0, middle + half)
