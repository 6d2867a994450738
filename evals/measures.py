"""What the harness has found, item by item: values with their errors, and paired differences.

    found = measure(results, loaded["groups"])       # {(task, metric): [Measure of each model …]}
    rows(found)                                      # ready for JSON

A metric is told by what it makes of its items: their mean, bits or a perplexity of sums over them.
Only of these is anything said beyond what the harness itself says.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from moe.evals.chance import FEWEST, reach, sign_flip, wilson

Item = tuple[str, int]  # hash of a document, and which of equal ones
Terms = dict[str, dict[Item, float]]  # by task, for several may ask of the same documents
Measures = dict[tuple[str, str], list["Measure"]]
LIKELIHOOD = "likelihood"


@dataclass(frozen=True, slots=True)
class Measure:
    """A value, its standard error and the interval that holds it in 95 of 100.

    terms: what items add up to: the value or, of perplexities, the log-likelihood behind them.
    influence: how far each item moves the value, to first order. of: what terms are of, alike for
    metrics that are functions of the same sums. linear: the value is the sum of the terms.
    sizes: tokens, words or bytes over which an item's likelihood is spread.
    """

    value: float
    error: float | None = None
    interval: tuple[float, float] | None = None
    terms: Terms | None = None
    influence: Terms | None = None
    of: str = ""
    linear: bool = True
    sizes: tuple[float, ...] = ()

    def times(self, factor: float) -> "Measure":
        """In another unit."""
        low_high = self.interval and (factor * self.interval[0], factor * self.interval[1])
        return replace(
            self,
            value=factor * self.value,
            error=None if self.error is None else factor * self.error,
            interval=low_high,
            terms=_weighted([self.terms], [factor]),
            influence=_weighted([self.influence], [factor]),
        )


def exponential(value: float) -> float:
    """exp, or the largest float where a text is too unlikely for one."""
    return math.exp(min(value, math.log(sys.float_info.max)))


def measure(results: Sequence[Any], groups: Mapping[str, Any] | None = None) -> Measures:
    """Every metric of every task and group, of each of the harness's results."""
    found: Measures = {}
    for task, metrics in results[0]["results"].items():
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            group = (groups or {}).get(task)
            of_each = _of_group if group is not None else _of_task
            each = [of_each(r, task, name, filtered, group) for r in results]
            found[task, _shown(name, filtered)] = each
    return found


def _shown(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _of_task(result: Any, task: str, metric: str, filtered: str, _: Any = None) -> Measure:
    value, error = _said(result, task, metric, filtered)
    items: dict[Item, tuple[float, float]] = {}
    seen: Counter[str] = Counter()
    pairs = False
    samples = (s for s in result.get("samples", {}).get(task, []) if metric in s)
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        if sample.get("filter", "none") != filtered:
            continue
        x = sample[metric]
        pairs = isinstance(x, tuple | list) and len(x) == 2
        if not all(isinstance(part, Real) for part in (x if pairs else [x])):
            return _plain(value, error)
        document = str(sample.get("doc_hash", sample["doc_id"]))
        items[document, seen[document]] = (float(x[0]), float(x[1])) if pairs else (float(x), 1.0)
        seen[document] += 1
    amount = math.fsum(n for _, n in items.values())
    if not amount:
        return _plain(value, error)
    rate = math.fsum(x for x, _ in items.values()) / amount
    for linear, slope, form in _forms(pairs, value):
        if math.isclose(form(rate), value, rel_tol=1e-9, abs_tol=1e-12):
            shown = _shown(metric, filtered)
            return _of_items(task, items, (value, error), rate, (linear, slope, form), shown)
    return _plain(value, error)


Form = tuple[bool, float, Callable[[float], float]]  # linear?, slope at the value, the function


def _forms(pairs: bool, value: float) -> list[Form]:
    """What a metric may be of a mean, by what its items are: numbers, or sums and their sizes."""
    perplexity: Form = (False, -value, lambda rate: exponential(-rate))
    bits: Form = (True, -1 / math.log(2), lambda rate: -rate / math.log(2))
    return [bits if pairs else (True, 1.0, lambda rate: rate), perplexity]


def _of_items(
    task: str, items: dict[Item, tuple[float, float]], said: tuple[float, float | None],
    rate: float, form: Form, metric: str,
) -> Measure:  # fmt: skip
    """A function of the mean of items; perplexities' own error, for the harness has none."""
    (value, error), (linear, slope, function) = said, form
    amount = math.fsum(n for _, n in items.values())
    scale = slope if linear else 1.0
    sizes = tuple(n for _, n in items.values())
    terms = {task: {item: scale * x / amount for item, (x, _) in items.items()}}
    centred = {task: {item: (x - rate * n) / amount for item, (x, n) in items.items()}}
    spread, interval = _spread(centred), None
    if slope == 1.0 and {*items.values()} <= {(0.0, 1.0), (1.0, 1.0)}:
        interval = wilson(value, len(items))
    elif spread is not None and spread[0]:
        half = reach(*spread)
        low, high = sorted((function(rate - half), function(rate + half)))
        interval = low, high
    if spread is not None and (not linear or error is None):
        error = _finite(abs(slope) * spread[0])
    of = metric if slope == 1.0 else LIKELIHOOD
    influence = _weighted([centred], [slope])
    return Measure(value, error, interval, terms, influence, of, linear, sizes)


def _of_group(result: Any, task: str, metric: str, filtered: str, group: Any) -> Measure:
    """A group's, whose items are those of its tasks, weighted as the harness does."""
    value, error = _said(result, task, metric, filtered)
    key = f"{metric},{filtered}"
    found = result["results"]
    leaves = [t.task_name for t in group.get_all_tasks() if key in found.get(t.task_name, {})]
    chosen = [a for a in group.aggregate_metric_list or [] if a.metric == metric]
    if not leaves or not chosen:
        return _plain(value, error)
    sizes = [found[leaf]["sample_len"] if chosen[0].weight_by_size else 1 for leaf in leaves]
    weights = [size / sum(sizes) for size in sizes]
    whole = combine([_of_task(result, leaf, metric, filtered) for leaf in leaves], weights)
    if not math.isclose(whole.value, value, rel_tol=1e-9, abs_tol=1e-12):  # a mean of another kind
        return _plain(value, error)
    return replace(_plain(value, error), terms=whole.terms, influence=whole.influence, of="mean")


def _said(result: Any, task: str, metric: str, filtered: str) -> tuple[float, float | None]:
    found = result["results"][task]
    error = found.get(f"{metric}_stderr,{filtered}")
    return found[f"{metric},{filtered}"], _finite(error) if isinstance(error, Real) else None


def _plain(value: float, error: float | None) -> Measure:
    """What the harness alone knows of, of a number that may be anything."""
    half = 1.959964 * error if error and math.isfinite(value) else None
    return Measure(value, error, (value - half, value + half) if half else None)


def combine(measures: Sequence[Measure], weights: Sequence[float]) -> Measure:
    """A weighted sum. Items that several ask of count once; no error without every item's part."""
    value = math.fsum(w * m.value for m, w in zip(measures, weights, strict=True))
    influence = _weighted([m.influence for m in measures], weights)
    linear = all(m.linear for m in measures)
    terms = _weighted([m.terms for m in measures], weights) if linear else None
    spread, error, interval = influence and _spread(influence), None, None
    if spread:
        error, half = spread[0], reach(*spread)
        interval = (value - half, value + half) if half else None
    return Measure(value, error, interval, terms, influence, "mean")


def mean(measures: Sequence[Measure]) -> Measure:
    """One alone is itself."""
    if len(measures) == 1:
        return measures[0]
    return combine(measures, [1 / len(measures)] * len(measures))


def _weighted(parts: Sequence[Terms | None], weights: Sequence[float]) -> Terms | None:
    """The sum of all; None where one is not known or not a number."""
    total: Terms = {}
    for terms, weight in zip(parts, weights, strict=True):
        if terms is None:
            return None
        for task, items in terms.items():
            own = total.setdefault(task, {})
            for item, value in items.items():
                own[item] = own.get(item, 0.0) + weight * value
    if not all(math.isfinite(v) for items in total.values() for v in items.values()):
        return None
    return total


def _by_item(terms: Terms) -> dict[Item, float]:
    found: dict[Item, float] = {}
    for items in terms.values():
        for item, value in items.items():
            found[item] = found.get(item, 0.0) + value
    return found


def _spread(terms: Terms) -> tuple[float, float] | None:
    """Standard error of a sum over items, and its degrees of freedom (Satterthwaite's); None of a
    single item. Items that the same tasks ask of are drawn together, others apart.
    """
    asked: dict[Item, list[str]] = {}
    for task, items in terms.items():
        for item in items:
            asked.setdefault(item, []).append(task)
    strata: dict[tuple[str, ...], list[float]] = {}
    for item, value in _by_item(terms).items():
        strata.setdefault(tuple(asked[item]), []).append(value)
    if not all(len(values) > 1 and all(map(math.isfinite, values)) for values in strata.values()):
        return None
    with np.errstate(over="ignore"):
        parts = [(len(v) * float(np.var(v, ddof=1)), len(v) - 1) for v in strata.values()]
    whole, squares = sum(v for v, _ in parts), sum(v * v / f for v, f in parts)
    if not math.isfinite(squares):
        return None
    freedom = whole * whole / squares if squares else min(f for _, f in parts)  # none differ
    return math.sqrt(whole), freedom


def paired(first: Measure, second: Measure) -> dict[str, Any]:
    """A difference, ready for JSON: its standard error and interval, and p of the signs of its
    items, unless `why` there is none.
    """
    value = first.value - second.value
    found: dict[str, Any] = {
        "value": value, "error": None, "interval": None, "p": None, "of": first.of, "why": None,
    }  # fmt: skip
    influence = _less(first.influence, second.influence)
    spread = influence and _spread(influence)
    if spread:
        low, high = value - reach(*spread), value + reach(*spread)
        found["error"] = spread[0]
        found["interval"] = (low, high) if math.isfinite(high - low) else None
    terms = _less(first.terms, second.terms)
    if not math.isfinite(value):
        found["why"] = "not a number"
    elif terms is None:
        found["why"] = "not of the same items, or no mean of them"
    elif first.sizes != second.sizes:
        found["why"] = "tokens of other tokenizers"
    else:
        differences = list(_by_item(terms).values())
        if len(differences) < FEWEST:
            found["why"] = f"too few items ({len(differences)})"
        else:
            found["p"] = sign_flip(differences)
    return found


def _less(left: Terms | None, right: Terms | None) -> Terms | None:
    """The difference, where both are of the same items."""
    if left is None or right is None:
        return None
    if {t: i.keys() for t, i in left.items()} != {t: i.keys() for t, i in right.items()}:
        return None
    return _weighted([left, right], [1.0, -1.0])


def rows(found: Measures) -> list[dict[str, Any]]:
    """One a task and metric: each model's value, error and interval, and the first one's difference
    to each baseline. What is no number is null, and `why` says what it was.
    """
    return [{"task": task, "metric": metric, **columns(m)} for (task, metric), m in found.items()]


def columns(measures: Sequence[Measure]) -> dict[str, Any]:
    """The same of one row."""
    values = [_finite(m.value) for m in measures]
    return {
        "values": values,
        "errors": [m.error for m in measures],
        "intervals": [m.interval for m in measures],
        "why": [None if math.isfinite(m.value) else str(m.value) for m in measures],
        "differences": [
            {**d, "value": _finite(d["value"])}
            for d in (paired(measures[0], other) for other in measures[1:])
        ],
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
