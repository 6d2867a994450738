"""Whether differences are more than chance: p and Holm's correction, against tables and chance."""

import random

import pytest

from moe.evals.report.significance import holm, judge, p_value
from moe.evals.run import intervals


@pytest.mark.parametrize(
    ("difference", "error", "p"),
    [(0.0, 1.0, 1.0), (1.959964, 1.0, 0.05), (-1.959964, 1.0, 0.05), (0.05152, 0.02, 0.01)],
)
def test_p_is_the_normal_distributions(difference, error, p):
    assert p_value(difference, error) == pytest.approx(p, rel=1e-3)


def test_without_an_error_nothing_is_claimed():
    assert p_value(1.0, None) is None
    assert p_value(1.0, 0.0) is None


def test_holms_own_example():
    # the steps by hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, then 1 · 0.04 held at what came before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_one_false_finding_among_many_is_rare_and_without_correction_it_is_not():
    draw = random.Random(0)
    families = [[p_value(draw.gauss(0, 1), 1.0) for _ in range(20)] for _ in range(2000)]
    corrected = sum(min(holm(family)) < 0.05 for family in families) / len(families)
    raw = sum(min(family) < 0.05 for family in families) / len(families)
    assert corrected == pytest.approx(0.05, abs=0.015)
    assert raw > 0.5, "the control: one of twenty is below 0.05 more often than not"


def test_all_tables_of_a_page_are_one_family():
    def rows(*errors):
        return [{"differences": [{"value": 0.05, "error": e} for e in errors]}]

    alone = judge([rows(0.02)])
    both = judge([rows(0.02, None), rows(0.01)])
    assert set(both) == {(0, 0, 0), (1, 0, 0)}, "what has no error is not counted"
    assert alone[0, 0, 0].adjusted == pytest.approx(alone[0, 0, 0].p)
    assert both[1, 0, 0].adjusted == pytest.approx(2 * both[1, 0, 0].p)
    assert both[0, 0, 0].significant


def test_intervals_of_shares_are_wilsons():
    """7 of 10 as in Wilson's formula worked out by hand; a share of 0 or 1 has one too, no end lies
    outside 0..1, and a mean of anything else keeps the normal distribution's.
    """
    shares = [dict(enumerate([1.0] * n + [0.0] * (10 - n))) for n in (7, 10, 0)]
    found = intervals([0.7, 1.0, 0.0], [0.15, 0.0, 0.0], None, shares)
    assert found[0] == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert found[1] == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert found[2] == pytest.approx((0.0, 0.2775), abs=1e-4)
    (found,) = intervals([0.9], [0.1], None, [{0: 0.8, 1: 1.0}])
    assert found == pytest.approx((0.704, 1.096))
    assert intervals([0.9], [None], None, [{}]) == [None]
