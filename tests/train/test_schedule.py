"""The learning rate of every step is that of the closed form."""

import math
from itertools import pairwise

import pytest

from moe.config import Schedule
from moe.train.schedule import learning_rate

PEAK, STEPS, WARMUP = 3e-4, 100, 10


def rates(kind: str, steps: int = STEPS, warmup_steps: int = WARMUP, **options) -> list[float]:
    schedule = Schedule(kind=kind, warmup_steps=warmup_steps, **options)
    return [learning_rate(step, schedule, PEAK, steps) for step in range(steps)]


def closed_form(kind: str, ratio: float, decay: int = STEPS // 5) -> list[float]:
    """t counts finished steps: warm-up ends at t = 10, everything at t = 100."""

    def rate(t: int) -> float:
        if t <= WARMUP:
            return PEAK * t / WARMUP
        begin = STEPS - decay if kind == "wsd" else WARMUP
        done = max(0.0, (t - begin) / (STEPS - begin))
        if kind == "constant":
            return PEAK
        if kind == "cosine":
            return PEAK * (ratio + (1 - ratio) * (1 + math.cos(math.pi * done)) / 2)
        return PEAK * (1 - (1 - ratio) * done)

    return [rate(t) for t in range(1, STEPS + 1)]


def agree(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-18)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_every_step_has_the_rate_of_the_closed_form(kind, ratio) -> None:
    assert agree(rates(kind, final_ratio=ratio), closed_form(kind, ratio))


def test_wrong_schedules_do_not_agree() -> None:
    """Negative controls: a step late, without its floor, of another kind, decaying elsewhere."""
    right = closed_form("cosine", 0.1)
    assert not agree([*rates("cosine", final_ratio=0.1)[1:], 0.0], right)
    assert not agree(rates("cosine", final_ratio=0.0), right)
    assert not agree(rates("linear", final_ratio=0.1), right)
    assert not agree(rates("wsd", decay_steps=21), closed_form("wsd", 0.05, decay=20))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_landmarks(kind) -> None:
    found = rates(kind, final_ratio=0.05)
    assert found[0] == pytest.approx(PEAK / 10), "the first step moves"
    assert found[4] == pytest.approx(PEAK / 2)
    assert found[9] == pytest.approx(PEAK) == max(found)
    middle = {"constant": 1, "cosine": 0.525, "linear": 0.525, "wsd": 1}[kind]
    assert found[54] == pytest.approx(middle * PEAK)
    last = 1 if kind == "constant" else 0.05
    assert found[99] == pytest.approx(last * PEAK)


def test_decay_of_wsd_has_the_length_asked_for() -> None:
    assert agree(rates("wsd", decay_steps=40, final_ratio=0.2), closed_form("wsd", 0.2, decay=40))
    found = rates("wsd", decay_steps=1, final_ratio=0.2)
    assert found[98] == PEAK
    assert found[99] == pytest.approx(0.2 * PEAK)
    longer = rates("wsd", decay_steps=1000)  # cannot begin before warm-up has ended
    assert max(longer) == longer[9] == PEAK
    assert all(a > b for a, b in pairwise(longer[9:]))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 0), (5, 5)])
def test_short_runs_stay_within_zero_and_the_peak(kind, steps, warmup) -> None:
    found = rates(kind, steps=steps, warmup_steps=warmup, final_ratio=0.0)
    assert all(0 <= rate <= PEAK for rate in found)
    assert all(math.isfinite(rate) for rate in found)
    if warmup:
        assert found[warmup - 1] == pytest.approx(PEAK)


def test_steps_after_the_end_keep_the_last_rate() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=0, final_ratio=0.1)
    assert learning_rate(150, schedule, PEAK, STEPS) == pytest.approx(0.1 * PEAK)
