"""Whether differences are more than chance: p and intervals against scipy and under the null, at
any number of items; Holm's correction.
"""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe.evals import chance, measures
from moe.evals.report.significance import Verdict, holm, judge
from moe.evals.suites import cell


def result(metric: str, items: list[Any], value: float | None = None, task: str = "t") -> Any:
    """What the harness gives: a metric, by default the items' mean, and its items."""
    value = sum(items) / len(items) if value is None else value
    samples = [{"doc_id": i, "doc_hash": f"{i}", metric: x} for i, x in enumerate(items)]
    return {"results": {task: {f"{metric},none": value, "sample_len": len(items)}},
            "samples": {task: samples[::-1]}}  # fmt: skip


def row(metric: str, *models: list[Any], of: Any = None) -> dict[str, Any]:
    """A comparison of models by their items; `of` makes the value from them."""
    results = [result(metric, items, of and of(items)) for items in models]
    (found,) = measures.rows(measures.measure(results))
    return found


def loss(items: list[tuple[float, float]]) -> float:
    return -sum(x for x, _ in items) / sum(n for _, n in items)


OF_SUMS = {
    "bits_per_byte": lambda items: loss(items) / math.log(2),
    "byte_perplexity": lambda items: math.exp(loss(items)),
    "word_perplexity": lambda items: math.exp(loss(items)),
}


@pytest.mark.parametrize(
    ("better", "worse", "ties"),
    [(6, 0, 0), (500, 0, 0), (5, 0, 45), (4, 9, 7), (1, 1, 9), (0, 0, 9)],
)
def test_of_right_and_wrong_it_is_mcnemars_exact_test(better, worse, ties):
    left, right = [1.0] * better + [0.0] * (worse + ties), [0.0] * better + [1.0] * worse
    (found,) = row("acc", left, right + [0.0] * ties)["differences"]
    discordant = better + worse
    expected = stats.binomtest(better, discordant).pvalue if discordant else 1.0
    assert found["p"] == pytest.approx(expected)
    if worse == ties == 0:
        assert found["p"] == pytest.approx(2.0 ** (1 - better)), "all better: as small as it gets"


def test_of_other_scores_it_is_the_permutation_test():
    draw = np.random.default_rng(3)
    for count in (8, 12, 60):
        d = draw.normal(0.4, 1.0, count)
        theirs = stats.permutation_test(
            (d,), np.sum, permutation_type="samples", n_resamples=20000, rng=1
        ).pvalue
        assert chance.sign_flip(list(d)) == pytest.approx(theirs, rel=1e-9 if count < 14 else 0.15)
    strong = [1.0 + i / 1000 for i in range(200)]
    assert chance.sign_flip(strong) == 1 / (chance.DRAWS + 1), "no less than was drawn"


@pytest.mark.parametrize("items", [1, 2, 5])
def test_too_few_items_are_said_in_the_place_of_p(items):
    """Not even where all are better; one more, and it can be a finding."""
    (found,) = row("acc", [1.0] * items, [0.0] * items)["differences"]
    assert found["p"] is None and found["why"] == f"too few items ({items})"
    documents = [(-3.0, 1.0)] * items, [(-9.0, 1.0)] * items
    (found,) = row("bits_per_byte", *documents, of=OF_SUMS["bits_per_byte"])["differences"]
    assert found["p"] is None and "too few" in found["why"]
    (found,) = row("acc", [1.0] * 6, [0.0] * 6)["differences"]
    assert found["p"] == 2**-5 < chance.LEVEL


def scores(draw: np.random.Generator, count: int, kind: str) -> tuple[list[Any], list[Any]]:
    """Two models that are alike but for chance."""
    if kind == "acc":
        same = draw.random(count) < 0.5
        left, right = draw.random((2, count)) < 0.5
        return list(map(float, left)), list(map(float, np.where(same, left, right)))
    losses, sizes = draw.gamma(4, 0.5, count), draw.integers(50, 200, count)
    noise = draw.normal(0, 0.1, (2, count))
    sums = [-(losses + n) * sizes for n in noise]
    return tuple([(float(x), float(n)) for x, n in zip(s, sizes, strict=True)] for s in sums)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
@pytest.mark.parametrize("metric", ["acc", "byte_perplexity"])
def test_models_that_are_alike_are_seldom_found_to_differ(metric, count):
    draw, found = np.random.default_rng(count), 0
    for _ in range(500):
        (d,) = row(metric, *scores(draw, count, metric), of=OF_SUMS.get(metric))["differences"]
        found += d["p"] is not None and d["p"] < chance.LEVEL
    assert found / 500 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)


def test_the_normal_distribution_would_have_found_differences():
    """Negative control of the simulation: what was done before, of two documents."""
    draw, found = np.random.default_rng(0), 0
    for _ in range(500):
        (d,) = row("byte_perplexity", *scores(draw, 2, ""), of=OF_SUMS["byte_perplexity"])[
            "differences"
        ]
        found += math.erfc(abs(d["value"] / d["error"]) / math.sqrt(2)) < chance.LEVEL
    assert found / 500 > 0.2


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_intervals_of_perplexities_hold_the_truth(count):
    """95 of 100 at any number of documents, of one size and of several."""
    draw, of = np.random.default_rng(count), OF_SUMS["byte_perplexity"]
    for sizes in (np.full(count, 100), None):
        held = 0
        for _ in range(600):
            own = draw.integers(60, 160, count) if sizes is None else sizes
            sums = -(3 + draw.normal(0, 0.2, count)) * own
            items = [(float(x), float(n)) for x, n in zip(sums, own, strict=True)]
            ((low, high),) = row("byte_perplexity", items, of=of)["intervals"]
            held += low <= math.exp(3) <= high
        assert 0.92 < held / 600 < 0.985, (count, held)
    assert row("byte_perplexity", items[:1], of=of)["intervals"] == [None]


def test_metrics_of_the_same_sums_are_one_comparison():
    left, right = scores(np.random.default_rng(5), 9, "")
    found = [row(metric, left, right, of=of) for metric, of in OF_SUMS.items()]
    assert len({round(f["differences"][0]["p"], 12) for f in found}) == 1
    other = row("acc", [1.0] * 8, [0.0] * 8)
    judged = judge([[*found, other]])
    assert {v.among for v in judged.values()} == {2}
    assert judged[0, 3, 0].adjusted == pytest.approx(2 * 2**-7)


def test_errors_of_perplexities_are_those_of_resampling():
    """To first order: against a bootstrap of many documents, paired and not."""
    draw = np.random.default_rng(1)
    sizes = draw.integers(50, 200, 200)
    sides = [draw.gamma(4.0, 0.5, 200) * sizes]
    sides.append(sides[0] + draw.normal(0.1, 0.02, 200) * sizes)  # a little worse everywhere
    items = [[(-float(x), float(n)) for x, n in zip(s, sizes, strict=True)] for s in sides]
    found = row("byte_perplexity", *items, of=OF_SUMS["byte_perplexity"])
    chosen = draw.integers(0, 200, (4000, 200))
    draws = [np.exp(s[chosen].sum(1) / sizes[chosen].sum(1)) for s in sides]
    assert found["errors"] == pytest.approx([d.std() for d in draws], rel=0.1)
    assert found["intervals"][0] == pytest.approx(np.quantile(draws[0], [0.025, 0.975]), rel=0.03)
    (difference,) = found["differences"]
    assert difference["error"] == pytest.approx((draws[0] - draws[1]).std(), rel=0.1)
    assert difference["error"] < 0.3 * found["errors"][0], "what both find hard cancels"


def test_what_is_no_mean_of_items_has_no_p():
    """A metric of pairs that are no sums (f1's), one whose items are another model's, of tokens of
    another tokenizer, and a number that is none.
    """
    pairs = [(1, 1), (0, 1)] * 5
    (f1,) = row("f1", pairs, pairs, of=lambda _: 0.66)["differences"]
    assert f1["p"] is f1["error"] is None and "no mean of them" in f1["why"]
    (more,) = row("acc", [1.0] * 8, [1.0] * 9)["differences"]
    assert more["p"] is None and "not of the same items" in more["why"]
    words, tokens = [(-3.0, 2.0)] * 8, [(-3.0, 3.0)] * 8
    (other,) = row("byte_perplexity", words, tokens, of=OF_SUMS["byte_perplexity"])["differences"]
    assert other["why"] == "tokens of other tokenizers"
    found = row("acc", [math.nan] * 8, [1.0] * 8)
    assert found["values"] == [None, 1.0] and found["why"] == ["nan", None]
    assert found["differences"][0]["value"] is None
    assert found["differences"][0]["why"] == "not a number"
    assert cell(None, None, "nan") == "nan"
    known = result("acc", [math.nan] * 8)
    known["results"]["t"]["acc_stderr,none"] = 0.1
    json.dumps(measures.rows(measures.measure([known])), allow_nan=False)


def test_a_text_too_unlikely_for_a_float_is_a_number():
    items = [(-9e5, 2.0), (-8e5, 1.0)]

    def unlikely(items: list[tuple[float, float]]) -> float:
        return measures.exponential(loss(items))

    most = measures.exponential(1e9)
    found = row("byte_perplexity", items, items, of=lambda _: most)
    assert found["values"][0] == most and all(map(math.isfinite, found["intervals"][0]))
    assert cell(most) == "1.798e+308"
    few = [(-3.0, 2.0), (-2.0, 1.0)]
    json.dumps(row("byte_perplexity", items, few, of=unlikely), allow_nan=False)
    assert row("byte_perplexity", items, few, of=unlikely)["differences"][0]["interval"] is None


class Group:
    """As the harness's."""

    def __init__(self, tasks: list[str], weighted: bool) -> None:
        self.tasks = tasks
        self.aggregate_metric_list = [
            type("Metric", (), {"metric": "acc", "weight_by_size": weighted})
        ]

    def get_all_tasks(self) -> list[Any]:
        return [type("Task", (), {"task_name": name}) for name in self.tasks]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_groups_difference_is_paired_over_the_items_of_its_tasks(weighted):
    draw = np.random.default_rng(7)
    sizes = {"a": 30, "b": 90}
    left, right = ({t: draw.random(n) for t, n in sizes.items()} for _ in range(2))
    weights = {"a": 0.25, "b": 0.75} if weighted else {"a": 0.5, "b": 0.5}
    results = []
    for side in (left, right):
        found: dict[str, Any] = {"results": {}, "samples": {}}
        for task, items in side.items():
            one = result("acc", list(map(float, items)), task=task)
            found["results"] |= one["results"]
            found["samples"] |= {
                task: [{**s, "doc_hash": task + s["doc_hash"]} for s in one["samples"][task]]
            }
        value = sum(weights[t] * float(x.mean()) for t, x in side.items())
        found["results"]["g"] = {"acc,none": value, "acc_stderr,none": 0.1}
        results.append(found)
    rows = measures.rows(measures.measure(results, {"g": Group([*sizes], weighted)}))
    (difference,) = next(r for r in rows if r["task"] == "g")["differences"]
    d = {t: left[t] - right[t] for t in sizes}
    error = math.sqrt(sum(weights[t] ** 2 * x.var(ddof=1) / len(x) for t, x in d.items()))
    assert difference["error"] == pytest.approx(error)
    assert difference["value"] == pytest.approx(sum(weights[t] * x.mean() for t, x in d.items()))
    shares = [weights[t] * float(v) / len(x) for t, x in d.items() for v in x]
    assert difference["p"] == pytest.approx(chance.sign_flip(shares))
    results[0]["results"]["g"]["acc,none"] += 0.01  # negative control: not that mean
    rows = measures.rows(measures.measure(results, {"g": Group([*sizes], weighted)}))
    (difference,) = next(r for r in rows if r["task"] == "g")["differences"]
    assert difference["error"] is difference["p"] is None


def test_a_mean_over_tasks_of_the_same_items_has_their_own_error():
    """As TruthfulQA's: correlated answers do not count as independent; of other items they do."""
    draw = np.random.default_rng(0)
    a = draw.random(800)
    b = 0.8 * a + 0.1 * draw.random(800)
    found = {}
    for apart in ("", "other"):
        parts = [result("x", list(map(float, a)), task="a"), result("x", list(b), task="b")]
        for sample in parts[1]["samples"]["b"]:
            sample["doc_hash"] = apart + sample["doc_hash"]
        each = [measures.measure([p])[t, "x"][0] for p, t in zip(parts, "ab", strict=True)]
        found[apart] = measures.mean(each).error
    assert found[""] == pytest.approx(((a + b) / 2).std(ddof=1) / math.sqrt(800))
    independent = math.hypot(a.std(ddof=1), b.std(ddof=1)) / 2 / math.sqrt(800)
    assert found["other"] == pytest.approx(independent) and independent < 0.75 * found[""]


def test_holms_own_example():
    # the steps by hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, then 1 · 0.04 held at what came before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_one_false_finding_among_many_is_rare_and_without_correction_it_is_not():
    draw = random.Random(0)
    families = [[draw.random() for _ in range(20)] for _ in range(2000)]
    corrected = sum(min(holm(family)) < 0.05 for family in families) / len(families)
    raw = sum(min(family) < 0.05 for family in families) / len(families)
    assert corrected == pytest.approx(0.05, abs=0.015)
    assert raw > 0.5, "the control: one of twenty is below 0.05 more often than not"


def test_all_tables_of_a_page_are_one_family():
    def rows(*p: float | None) -> list[dict[str, Any]]:
        return [{"task": "t", "differences": [{"p": x, "of": "acc"} for x in p]}]

    alone = judge([rows(0.02)])
    both = judge([rows(0.02, None), rows(0.01)])
    assert set(both) == {(0, 0, 0), (1, 0, 0)}, "what has no p is not counted"
    assert alone[0, 0, 0] == Verdict(0.02, 0.02, 1)
    assert both[1, 0, 0].adjusted == pytest.approx(0.02)
    assert both[0, 0, 0].significant


def test_intervals_of_shares_are_wilsons():
    """7 of 10 as in Wilson's formula worked out by hand; a share of 0 or 1 has one too, no end lies
    outside 0..1; a mean of anything else has Student's.
    """
    ends = {7: (0.3968, 0.8922), 10: (0.7225, 1.0), 0: (0.0, 0.2775)}
    for right, expected in ends.items():
        (found,) = row("acc", [1.0] * right + [0.0] * (10 - right))["intervals"]
        assert found == pytest.approx(expected, abs=1e-4)
    (found,) = row("f", [0.8, 1.0, 0.9])["intervals"]
    assert found == pytest.approx(stats.t.interval(0.95, 2, 0.9, 0.1 / math.sqrt(3)))
    assert row("f", [0.5])["intervals"] == [None]
