"""Rankings of traces with planted truth; who is compared, and what is held out."""

import dataclasses
import functools

import numpy as np
import pytest
import traces
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import UserError
from moe.tune import classes
from moe.tune.families import Site
from moe.tune.rank import CAUTION, rank
from moe.tune.scores import SCORES

SIZES = {"58x256": (58, 256, 8, 10), "30x64": (30, 64, 4, 10), "4x8": (4, 8, 2, 3)}
# dispersion and prompts a class with which the planted drown
NOISE = {"58x256": (50.0, 60), "30x64": (10.0, 60), "4x8": (1.0, 6)}


@functools.cache
def planted(size, kind, dispersion=traces.DISPERSION, prompts=60):
    layers, experts, top_k, number = SIZES[size]
    return traces.planted(
        layers, experts, top_k, kind=kind, prompts=prompts, planted=number, dispersion=dispersion
    )


def first(ranking, number, least=False):
    return {(ranking.places[c][0], ranking.places[c][2]) for c in ranking.order(least)[:number]}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", SIZES)
def test_every_score_finds_exactly_what_was_planted(size, kind):
    """60 prompts a class, 50 to 150 tokens, 3 times as likely, prompts' rates as of 2000 counts."""
    trace, truth = planted(size, kind)
    for score in SCORES:
        ranking = rank(trace, "BAD", score=score, resamples=20)
        assert first(ranking, len(truth)) == truth, score
        # what is held out says the same, and the other class ranks them last
        chosen = ranking.order()[: len(truth)]
        assert (ranking.held_out[chosen] > 0).all()
    opposite = rank(trace, "GOOD", resamples=20)
    assert first(opposite, len(truth), least=True) == truth


@pytest.mark.parametrize("size", SIZES)
def test_no_score_finds_it_in_more_noise(size):
    """Negative control: the same truth among prompts that differ more, or fewer of them."""
    trace, truth = planted(size, "softmax", *NOISE[size])
    for score in SCORES:
        ranking = rank(trace, "BAD", score=score, resamples=20)
        assert first(ranking, len(truth)) != truth, score


@pytest.mark.parametrize("score", SCORES)
def test_planted_experts_are_beyond_chance_and_the_others_are_not(score):
    trace, truth = planted("30x64", "softmax")
    ranking = rank(trace, "BAD", score=score)
    significant = {
        (layer, expert)
        for (layer, _, expert), p, value in zip(
            ranking.places, ranking.p, ranking.scores, strict=True
        )
        if p <= 0.05 and value > 0
    }
    assert significant == truth
    assert ((ranking.low <= ranking.scores) & (ranking.scores <= ranking.high)).mean() > 0.99


def test_without_an_effect_scores_are_not_zero_yet_p_is_large():
    """What a fresh upcycle shows: scores alone prove nothing, and every ranking says so."""
    trace, _ = traces.planted(30, 64, 4, lift=1.0)
    ranking = rank(trace, "BAD")
    chosen = ranking.order()[:10]
    assert (ranking.scores[chosen] > 0.01).all() and (ranking.p > 0.05).all()
    assert (ranking.low[chosen] > 0).all()  # each for itself would pass for a finding
    assert CAUTION in ranking.notes
    assert any(n.startswith("1,920 experts were compared: at 95 % some 96 ") for n in ranking.notes)


def test_the_same_seed_ranks_the_same_and_another_draws_anew():
    trace, _ = planted("4x8", "softmax")
    one, same, other = (rank(trace, "BAD", seed=seed) for seed in (3, 3, 4))
    for name in ("scores", "low", "high", "p", "held_out"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    assert one.ids == same.ids != other.ids


def test_ties_are_broken_by_layer_part_and_expert():
    found = [
        Site(layer=layer, part=part, experts=2, top_k=1, kind="softmax", module="m")
        for layer, part in ((0, "mlp"), (0, "attention"), (1, "mlp"))
    ]
    counts = np.array([[2, 1, 2, 1, 2, 1]] * 2 + [[1, 2, 1, 2, 1, 2]] * 2)
    trace = traces.trace_of(found, counts, counts, [4] * 4, [True, True, False, False])
    ranking = rank(trace, "BAD")
    best = [ranking.places[column] for column in ranking.order()]
    assert best[:3] == [(0, "mlp", 0), (0, "attention", 0), (1, "mlp", 0)]
    assert [ranking.places[c] for c in ranking.order(least=True)][:3] == best[3:]
    assert best[3:] == [(0, "mlp", 1), (0, "attention", 1), (1, "mlp", 1)]


def test_two_labels_can_be_compared_without_the_others():
    trace, _ = planted("4x8", "softmax")
    rows = [row | {"label": "OTHER"} if n % 3 == 0 else row for n, row in enumerate(trace.rows)]
    three = dataclasses.replace(trace, rows=rows)
    pair, rest = rank(three, "BAD", "GOOD"), rank(three, "BAD")
    assert sum(pair.prompts["ranked"] + pair.prompts["held_out"]) == 80
    assert sum(rest.prompts["ranked"] + rest.prompts["held_out"]) == 120
    assert (pair.rest, rest.rest) == ("GOOD", "the rest")
    only = [n for n, row in enumerate(rows) if row["label"] != "OTHER"]
    cut = dataclasses.replace(
        trace, rows=[rows[n] for n in only], counts=trace.counts[only], mass=trace.mass[only],
        tokens=trace.tokens[only],
    )  # fmt: skip
    np.testing.assert_array_equal(rank(cut, "BAD").scores, pair.scores)


def soft_and_sharp():
    """A router of experts, one of heads with two always on, and one that takes all."""
    found = [
        Site(layer=0, part="mlp", experts=3, top_k=1, kind="softmax", module="a"),
        Site(layer=0, part="attention", experts=4, top_k=3, kind="moh", module="b", always=(0, 2)),
        Site(layer=1, part="attention", experts=2, top_k=2, kind="bam", module="c"),
    ]
    rng = np.random.default_rng(0)
    tokens = np.full(12, 10)
    counts = np.hstack([rng.integers(0, 4, (12, 7)), np.full((12, 2), 10)])
    counts[:, [3, 5]] = 10
    mass = counts * rng.uniform(0.2, 0.8, counts.shape)
    return traces.trace_of(found, counts, mass, tokens, np.arange(12) < 6)


def test_counts_skip_what_is_always_on_and_gate_mass_does_not():
    trace = soft_and_sharp()
    by_counts = rank(trace, "BAD")
    compared = [by_counts.places[c] for c in sorted(by_counts.order())]
    mlp = [(0, "mlp", expert) for expert in range(3)]
    assert compared == [*mlp, (0, "attention", 1), (0, "attention", 3)]
    assert sum("--score gate_mass_diff" in note for note in by_counts.notes) == 2
    assert np.isnan(by_counts.p).sum() == 4
    by_mass = rank(trace, "BAD", score="gate_mass_diff")
    assert by_mass.compared == 9 and not any("always" in note for note in by_mass.notes)
    assert set(by_mass.rates) == {"rate_target", "rate_rest", "mass_target", "mass_rest"}
    np.testing.assert_allclose(by_mass.rates["rate_target"][-2:], 1.0)
    assert rank(trace, "BAD", part="attention").compared == 2
    with pytest.raises(UserError, match=r"say nothing of them.*Nothing is left"):
        rank(traces.small([[5, 5]] * 4, [5] * 4, [1, 1, 0, 0], kind="bam", top_k=2), "BAD")


def test_gates_of_unlike_sums_are_noted():
    trace = soft_and_sharp()
    (note,) = [n for n in rank(trace, "BAD", score="gate_mass_diff").notes if "add up to" in n]
    sums = [trace.mass[:, s].sum() / 120 for s in (slice(0, 3), slice(3, 7), slice(7, 9))]
    low, high = sums.index(min(sums)), sums.index(max(sums))
    names = [site.name for site in trace.sites]
    assert (
        f"add up to {sums[low]:.3g} in {names[low]} and to {sums[high]:.3g} in {names[high]}"
        in (note)
    )
    alike, _ = planted("4x8", "softmax")
    for quiet, score in ((alike, "gate_mass_diff"), (trace, "rate_diff")):
        assert not any("add up to" in n for n in rank(quiet, "BAD", score=score).notes)


def test_prompts_without_tokens_or_label_are_left_out_with_a_note():
    trace, _ = planted("4x8", "softmax")
    tokens, counts = trace.tokens.copy(), trace.counts.copy()
    tokens[[0, 3]] = 0
    counts[[0, 3]] = 0
    rows = [row | {"label": None} if n == 5 else row for n, row in enumerate(trace.rows)]
    ranking = rank(dataclasses.replace(trace, tokens=tokens, counts=counts, rows=rows), "BAD")
    assert "2 prompts had 0 tokens watched and are left out (rows 1, 4 of the trace)." in (
        ranking.notes
    )
    assert "1 of 120 prompts have no label and are left out." in ranking.notes
    assert sum(ranking.prompts["ranked"] + ranking.prompts["held_out"]) == 117
    assert np.isfinite(ranking.scores).all()


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 15), st.booleans()), min_size=1, max_size=60),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_a_split_keeps_prompts_whole_and_classes_in_proportion(prompts, share, seed):
    groups = np.array([f"g{group}" for group, _ in prompts])
    target = np.array([of for _, of in prompts])
    held = classes.split(groups, target, share, seed)
    assert not set(groups[held]) & set(groups[~held])
    for which in (target, ~target):
        of_class = set(groups[which])
        # prompts of one class only, and of both, are each cut to the nearest whole
        assert abs(len(of_class & set(groups[held])) - share * len(of_class)) <= 1.0 + 1e-9
    np.testing.assert_array_equal(held, classes.split(groups, target, share, seed))
    backwards = classes.split(groups[::-1], target[::-1], share, seed)
    np.testing.assert_array_equal(held, backwards[::-1])


def test_rows_that_repeat_a_prompt_stay_on_one_side():
    trace, _ = planted("4x8", "softmax")
    rows = [
        {**row, "id": trace.rows[n % 40]["id"], "prompt": trace.rows[n % 40]["prompt"]}
        for n, row in enumerate(trace.rows)
    ]
    ranking = rank(dataclasses.replace(trace, rows=rows), "BAD")
    assert not set(ranking.ids["ranked"]) & set(ranking.ids["held_out"])
    assert len(ranking.ids["ranked"]) + len(ranking.ids["held_out"]) == 40
    assert any(note.startswith("80 prompts repeat another") for note in ranking.notes)


def test_the_same_text_or_the_same_id_is_the_same_prompt():
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}, {"prompt": "x"},
            {"id": "b", "prompt": "z"}, {"label": "no name"}, {"label": "no name"}]  # fmt: skip
    names = classes.identities(rows)
    assert names[0] == names[2] and names[1] == names[3] and len(set(names)) == 4
    bridged = classes.identities([*rows, {"id": "a", "prompt": "z"}])
    assert len({bridged[n] for n in (0, 1, 2, 3, 6)}) == 1 and len(set(bridged)) == 3


def test_few_prompts_hold_nothing_out_unasked():
    trace = traces.small([[3, 1]] * 4 + [[1, 3]] * 4, [4] * 8, [1] * 4 + [0] * 4)
    ranking = rank(trace, "BAD")
    assert ranking.share == 0 and ranking.held_out is None
    assert any("'BAD' has 4 different prompts, fewer than 10" in note for note in ranking.notes)
    assert rank(trace, "BAD", held_out=0.3).prompts == {"ranked": [3, 3], "held_out": [1, 1]}


def test_held_out_prompts_do_not_touch_the_ranking():
    trace, _ = planted("4x8", "softmax")
    before = rank(trace, "BAD", seed=1)
    held = [n for n, row in enumerate(trace.rows) if row["id"] in before.ids["held_out"]]
    changed = trace.counts.copy()
    changed[held] = 0
    after = rank(dataclasses.replace(trace, counts=changed), "BAD", seed=1)
    np.testing.assert_array_equal(before.scores, after.scores)
    np.testing.assert_array_equal(before.p, after.p)
    assert not np.array_equal(before.held_out, after.held_out)
    changed = trace.counts.copy()  # negative control: any other prompt does
    changed[next(n for n in range(len(trace.rows)) if n not in held)] = 0
    assert not np.array_equal(
        before.scores, rank(dataclasses.replace(trace, counts=changed), "BAD", seed=1).scores
    )
