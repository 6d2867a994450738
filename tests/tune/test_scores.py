"""Scores against numbers worked out by hand, intervals and p against simulated truth."""

import itertools
import math

import numpy as np
import pytest

from moe.tune.scores import SCORES, Sample, family_wise

TOKENS = np.array([2, 8, 4, 6])
TARGET = np.array([True, True, False, False])
COUNTS = np.array([[1, 1, 0, 0], [2, 6, 0, 0], [1, 3, 0, 4], [0, 6, 0, 3]])
MASS = np.array([[0.5, 1.0, 0, 0], [4.0, 2.0, 0, 0], [1.0, 3.0, 0, 4], [1.5, 3.0, 0, 3]])
BY_HAND = {
    # means of 1/2, 2/8 against 1/4, 0/6; of 1/2, 6/8 against 3/4, 6/6; none; none against 1, 1/2
    "rate_diff": [0.375 - 0.125, 0.625 - 0.875, 0.0, -0.75],
    # means of 0.5/2, 4/8 against 1/4, 1.5/6; of 1/2, 2/8 against 3/4, 3/6
    "gate_mass_diff": [0.375 - 0.25, 0.375 - 0.625, 0.0, -0.75],
    # pooled: 3 of 10 against 1 of 10, 7 against 9, 0 against 0, 0 against 7; half a token on each
    "log_ratio": [math.log(3.5 / 1.5), math.log(7.5 / 9.5), 0.0, math.log(0.5 / 7.5)],
    # joint 3/20, by chance 4/20 · 10/20; joint 7/20, by chance 16/20 · 10/20
    "npmi": [
        math.log(0.15 / 0.1) / math.log(20 / 3), math.log(0.35 / 0.4) / math.log(20 / 7), 0.0, -1.0
    ],
    # SteerMoE: a1/(a1+d1) - a2/(a2+d2)
    "risk_diff": [
        3 / (3 + 7) - 1 / (1 + 9), 7 / (7 + 3) - 9 / (9 + 1), 0.0, 0 / (0 + 10) - 7 / (7 + 3)
    ],
}  # fmt: skip


def sample(name, values=None, tokens=TOKENS, target=TARGET, unit=None):
    if values is None:
        values = COUNTS if SCORES[name].array == "counts" else MASS
    unit = np.arange(len(tokens)) if unit is None else unit
    return Sample(values, tokens, target, unit, SCORES[name])


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_worked_out_by_hand(name):
    np.testing.assert_allclose(sample(name).scores(), BY_HAND[name], rtol=1e-12, atol=1e-15)


def test_no_two_formulas_agree_on_the_example():
    """Negative control: the example tells the five apart."""
    for one, other in itertools.combinations(BY_HAND, 2):
        assert not np.allclose(sample(one).scores(), BY_HAND[other])


def test_npmi_of_what_only_the_target_takes_is_1():
    only = sample("npmi", np.array([[2], [8], [0], [0]]))
    assert only.scores()[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCORES)
def test_blocks_of_experts_do_not_show(name, monkeypatch):
    whole = sample(name)
    whole_interval = whole.interval(50, np.random.default_rng(0))
    maxima = whole.largest_by_chance(50, np.random.default_rng(0))
    monkeypatch.setattr("moe.tune.scores.BLOCK", 3)
    np.testing.assert_array_equal(sample(name).scores(), whole.scores())
    np.testing.assert_array_equal(
        sample(name).interval(50, np.random.default_rng(0)), whole_interval
    )
    np.testing.assert_array_equal(
        sample(name).largest_by_chance(50, np.random.default_rng(0)), maxima
    )


@pytest.mark.parametrize("name", SCORES)
def test_permutations_are_draws_of_all_labellings(name):
    values = COUNTS if SCORES[name].array == "counts" else MASS
    all_six = []
    for two in itertools.combinations(range(4), 2):
        labelled = np.isin(np.arange(4), two)
        all_six.append(np.abs(sample(name, values, target=labelled).scores()).max())
    drawn = sample(name).largest_by_chance(3000, np.random.default_rng(0))
    for value in set(np.round(all_six, 9)):
        expected = np.mean(np.isclose(all_six, value))
        assert np.isclose(drawn, value).mean() == pytest.approx(expected, abs=0.04)
    assert np.isclose(drawn[:, None], all_six).any(1).all()


@pytest.mark.parametrize("name", SCORES)
def test_the_bootstrap_draws_all_resamples_of_each_class(name):
    """Interval of [2 + 2] prompts against the 16 equally likely resamples, enumerated."""
    scores = []
    for one in itertools.product((0, 1), repeat=2):
        for other in itertools.product((2, 3), repeat=2):
            rows = [*one, *other]
            values = (COUNTS if SCORES[name].array == "counts" else MASS)[rows]
            scores.append(sample(name, values, TOKENS[rows]).scores())
    low, high = sample(name).interval(4000, np.random.default_rng(0))
    # of 16 outcomes, 2.5 % lies in the first of them and 97.5 % in the last
    np.testing.assert_allclose(low, np.min(scores, 0), atol=1e-12)
    np.testing.assert_allclose(high, np.max(scores, 0), atol=1e-12)


def test_family_wise_p_counts_the_labels_given():
    p = family_wise(np.array([3.0, -2.0, 0.0]), np.array([1.0, 2.0, 2.5]))
    np.testing.assert_allclose(p, [1 / 4, 3 / 4, 1.0])


@pytest.mark.parametrize("name", ["rate_diff", "npmi"])
def test_a_prompt_asked_twice_is_no_more_evidence(name):
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 40, 30)
    values = rng.binomial(tokens[:, None], 0.3, (30, 20))
    target = np.arange(30) < 15
    once = sample(name, values, tokens, target)
    twice = [np.repeat(array, 2, axis=0) for array in (values, tokens, target)]
    grouped = sample(name, *twice, unit=np.repeat(np.arange(30), 2))
    ungrouped = sample(name, *twice)
    low, high = once.interval(300, np.random.default_rng(0))
    np.testing.assert_allclose(grouped.interval(300, np.random.default_rng(0)), (low, high))
    np.testing.assert_allclose(
        grouped.largest_by_chance(300, np.random.default_rng(0)),
        once.largest_by_chance(300, np.random.default_rng(0)),
    )
    # negative control: taken for other prompts, they narrow the interval by about √2
    narrow_low, narrow_high = ungrouped.interval(300, np.random.default_rng(0))
    assert 1.2 < ((high - low) / (narrow_high - narrow_low)).mean() < 1.7


RATES = 0.25, 0.15
TRUTH = {
    "rate_diff": 0.1,
    "gate_mass_diff": 0.05,
    "log_ratio": math.log(0.25 / 0.15),
    "npmi": math.log(0.25 / 0.2) / -math.log(0.125),
    "risk_diff": 0.1,
}


def overdispersed(rng, prompts, experts, rates):
    """Counts of two classes whose prompts have rates of their own (beta, sd near 0.1)."""
    target = np.arange(2 * prompts) < prompts
    tokens = np.full(2 * prompts, 60)
    own = np.empty((2 * prompts, experts))
    for rows, rate in ((target, rates[0]), (~target, rates[1])):
        own[rows] = rng.beta(15 * rate, 15 * (1 - rate), (prompts, experts))
    return rng.binomial(tokens[:, None], own), tokens, target


@pytest.mark.parametrize("name", SCORES)
def test_intervals_cover_the_truth(name):
    """95 % intervals on 500 simulated experts of 40 + 40 prompts: 90 to 99 % hold the truth."""
    held, token_wise = [], []
    for seed in range(5):
        counts, tokens, target = overdispersed(np.random.default_rng(seed), 40, 100, RATES)
        values = counts if SCORES[name].array == "counts" else counts * 0.5
        low, high = sample(name, values, tokens, target).interval(
            400, np.random.default_rng([seed, 1])
        )
        held.append((low <= TRUTH[name]) & (TRUTH[name] <= high))
        rates = [counts[rows].sum(0) / tokens[rows].sum() for rows in (target, ~target)]
        error = np.sqrt(sum(rate * (1 - rate) / tokens[target].sum() for rate in rates))
        token_wise.append(np.abs(rates[0] - rates[1] - 0.1) <= 1.96 * error)
    assert 0.90 <= np.mean(held) <= 0.99
    # negative control: intervals that take tokens for independent hold it far less often
    assert np.mean(token_wise) < 0.8


def test_the_smallest_p_is_uniform_when_labels_mean_nothing():
    """200 experiments of 30 experts, 20 + 20 prompts: families with a p <= a are a share of a."""
    smallest, naive = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        counts, tokens, target = overdispersed(rng, 20, 30, (0.2, 0.2))
        null = sample("rate_diff", counts, tokens, target)
        maxima = null.largest_by_chance(199, rng)
        smallest.append(family_wise(null.scores(), maxima).min())
        rates = counts / tokens[:, None]
        error = np.sqrt(rates[target].var(0, ddof=1) / 20 + rates[~target].var(0, ddof=1) / 20)
        naive.append((np.abs(null.scores()) / error).max() > 1.96)
    for share in (0.05, 0.1, 0.25, 0.5, 0.75):
        found = np.mean(np.array(smallest) <= share)
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 200), (share, found)
    # negative control: expert by expert at 5 %, most experiments "find" something
    assert np.mean(naive) > 0.5
