"""Whether a tuning does what its ranking suggests: against other experts, dose by dose.

    result = control(subject, tuning, cases, Plan(kinds=KINDS, seeds=3))

Every condition (nothing, the tuning at several doses, sets of other experts) sees the same prompts,
so changes are paired. P prompts, C experts of all sites in a row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from moe.errors import UserError
from moe.progress import Progress
from moe.tune.families import columns
from moe.tune.generation import Sampling, respond, stops
from moe.tune.intervene import tuned, watching
from moe.tune.labels import Labels
from moe.tune.matched import KINDS, Kind, draw, with_edits
from moe.tune.measure import losses
from moe.tune.prompts import Encoded, Prompt, chunks, places
from moe.tune.record import Meter, observe
from moe.tune.subject import Subject
from moe.tune.tuning import Edit, Tuning

Measure = Literal["loss", "label"]
DOSES = (0.25, 0.5, 0.75, 1.0)  # of the number of experts, and of the scale
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cases:
    """What is looked at: prompts in groups, and what of them is measured.

    `loss`: perplexity of their tokens. `label`: the share of responses that `source` calls
    `target`.
    """

    prompts: list[Prompt]
    encoded: list[Encoded]
    groups: list[str]
    measure: Measure
    target: str
    source: Labels | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which conditions there are."""

    kinds: tuple[Kind, ...] = KINDS
    seeds: int = 3
    doses: tuple[float, ...] = DOSES
    batch_size: int = 8


@dataclass(kw_only=True, slots=True)
class Condition:
    """A set of edits at a scale, and what each prompt gave [P]: a sum and what it is over."""

    kind: str  # plain, tuned or a kind of control
    edits: list[Edit]
    scale: float
    seed: int | None = None
    rate: float = 0.0  # how busy these experts are in the model as it is, mean over them
    texts: list[str | None] = field(default_factory=list)  # responses, where they are measured
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    over: np.ndarray = field(default_factory=lambda: np.zeros(0))


def conditions(tuning: Tuning, subject: Subject, rate_C: np.ndarray, plan: Plan) -> list[Condition]:
    """The tuning's doses, experts first and then the dial, and the controls at its full dose."""
    count, full = len(tuning.experts), tuning.scale
    found = []
    for number in sorted({max(1, round(dose * count)) for dose in plan.doses}):
        found.append(Condition(kind="tuned", edits=tuning.experts[:number], scale=full))
    for dose in plan.doses:
        if dose < 1:
            found.append(Condition(kind="tuned", edits=tuning.experts, scale=dose * full))
    for kind in plan.kinds:
        sets: list[list[Edit]] = []
        for seed in range(10 * plan.seeds):  # there may be fewer sets than are asked for
            if len(sets) == plan.seeds:
                break
            edits = draw(kind, tuning, subject.sites, rate_C, seed)
            if edits not in sets:
                sets.append(edits)
                found.append(Condition(kind=kind, edits=edits, scale=full, seed=seed))
    firsts = columns(subject.sites)
    starts = {(s.layer, s.part): firsts[n] for n, s in enumerate(subject.sites)}
    for condition in found:
        on = [rate_C[starts[edit.layer, edit.part] + edit.expert] for edit in condition.edits]
        condition.rate = float(np.mean(on))
    return found


def control(
    subject: Subject, tuning: Tuning, cases: Cases, plan: Plan, quiet: bool = False
) -> list[Condition]:
    """Every condition, measured; the first is the model as it is. Raises UserError."""
    rate_C = rates(subject, cases.encoded, plan.batch_size)
    plain = Condition(kind="plain", edits=[], scale=0.0)
    found = [plain, *conditions(tuning, subject, rate_C, plan)]
    with Progress("control", total=len(found), unit="conditions", quiet=quiet) as progress:
        for condition in found:
            change = with_edits(tuning, condition.edits, condition.scale)
            with tuned(subject.model, change if condition.edits else None):
                if cases.measure == "loss":
                    given = subject, cases.encoded, plan.batch_size
                    condition.total, condition.over = losses(*given)
                else:
                    condition.texts = _responses(subject, cases, plan.batch_size)
            progress.advance(1)
    if cases.measure == "label":
        _call(found, cases)
    return found


def rates(subject: Subject, encoded: Sequence[Encoded], batch_size: int) -> np.ndarray:
    """How busy each expert is with these prompts' tokens, the model being as it is [C].

    The share of tokens that it is on for, or of attention experts, which always are, its gate mass.
    """
    meter = Meter(subject.sites, subject.device)
    counts, mass, tokens = np.zeros(columns(subject.sites)[-1]), 0.0, 0
    with watching(subject.model, subject.sites, meter.see):
        for numbers in chunks(range(len(encoded)), batch_size):
            some, weighed, watched = observe(
                subject.model, meter, [encoded[n] for n in numbers], "prompt"
            )
            counts, mass = counts + some.sum(0), mass + weighed.sum(0)
            tokens += int(watched.sum())
    soft_C = np.concatenate([np.full(s.experts, s.kind == "bam") for s in subject.sites])
    return np.where(soft_C, mass, counts) / max(tokens, 1)


def _responses(subject: Subject, cases: Cases, batch_size: int) -> list[str | None]:
    assert cases.sampling is not None
    names = places(cases.prompts)
    ends = stops(subject.model, subject.tokenizer)
    texts: list[str | None] = []
    for numbers in chunks(range(len(cases.encoded)), batch_size):
        ids = respond(
            subject.model, [cases.encoded[n].prompt for n in numbers], cases.sampling,
            [names[n] for n in numbers], ends,
        )  # fmt: skip
        texts += [subject.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    return texts


def _call(found: Sequence[Condition], cases: Cases) -> None:
    """What the responses of all conditions are called, at once: a judge is loaded for each call."""
    assert cases.source is not None
    texts = [text for condition in found for text in condition.texts]
    labels = cases.source.label(list(cases.prompts) * len(found), texts)
    hits = np.array([float(label == cases.target) for label in labels])
    for condition, own in zip(found, hits.reshape(len(found), -1), strict=True):
        condition.total, condition.over = own, np.ones(len(own))


def value(measure: Measure, total: np.ndarray, over: np.ndarray) -> float:
    """Perplexity, or the share of responses, of some prompts together."""
    mean = float(total.sum() / over.sum())
    return math.exp(min(mean, 700.0)) if measure == "loss" else mean


def summarise(found: Sequence[Condition], cases: Cases, tuning: Tuning) -> dict[str, Any]:
    """Values per group and condition, the tuning's paired change, and where controls stand."""
    groups = sorted(dict.fromkeys(cases.groups), key=lambda group: group != cases.target)
    full = next(c for c in found if c.kind == "tuned" and len(c.edits) == len(tuning.experts)
                and c.scale == tuning.scale)  # fmt: skip
    rows = []
    for group in groups:
        which = np.array([g == group for g in cases.groups])
        rows.append({"group": group, "prompts": int(which.sum())}
                    | _row(found, full, which, cases.measure))  # fmt: skip
    return {
        "measure": cases.measure,
        "target": cases.target,
        "groups": rows,
        "points": list(_points(found, cases, groups)),
        "conditions": [
            {"kind": c.kind, "scale": c.scale, "seed": c.seed, "rate": c.rate, "experts": [
                asdict(e) | {"found": {}} for e in c.edits]}
            for c in found
        ],
    }  # fmt: skip


def _row(
    found: Sequence[Condition], full: Condition, which: np.ndarray, measure: Measure
) -> dict[str, Any]:
    """One group: plain, tuned, its change with an interval, and the controls' changes."""
    plain = found[0]

    def effect(condition: Condition) -> float:
        """Log ratio of perplexities, or difference of shares."""
        change = _mean(condition, which) - _mean(plain, which)
        return float(change)

    own = effect(full)
    low, high = _interval(plain, full, which)
    controls: dict[str, Any] = {}
    for kind in dict.fromkeys(c.kind for c in found[1:] if c.kind != "tuned"):
        some = [c for c in found if c.kind == kind]
        effects = [effect(c) for c in some]
        controls[kind] = {
            "values": [value(measure, c.total[which], c.over[which]) for c in some],
            "changes": effects,
            "smaller": int(sum(abs(e) < abs(own) for e in effects)),
        }
    return {
        "plain": value(measure, plain.total[which], plain.over[which]),
        "tuned": value(measure, full.total[which], full.over[which]),
        "change": own,
        "interval": [low, high],
        "controls": controls,
    }


def _mean(condition: Condition, which: np.ndarray) -> float:
    return float(condition.total[which].sum() / condition.over[which].sum())


def _interval(
    plain: Condition, full: Condition, which: np.ndarray
) -> tuple[float | None, float | None]:
    """95 % of the paired change, prompts drawn again; None of one prompt."""
    before, after, over = plain.total[which], full.total[which], plain.over[which]
    if len(over) < 2:
        return None, None
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(over), np.full(len(over), 1 / len(over)), size=RESAMPLES)
    changes = (drawn @ (after - before)) / (drawn @ over)
    low, high = np.percentile(changes, [2.5, 97.5])
    return float(low), float(high)


def _points(
    found: Sequence[Condition], cases: Cases, groups: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What the dose curve shows."""
    for group in groups:
        which = np.array([g == group for g in cases.groups])
        for c in found:
            yield {
                "kind": c.kind, "experts": len(c.edits), "scale": c.scale, "seed": c.seed,
                "label": group, "value": value(cases.measure, c.total[which], c.over[which]),
            }  # fmt: skip


def leave_out(
    prompts: Sequence[Prompt], tuning: Tuning, say: Callable[[str], None]
) -> list[Prompt]:
    """The prompts that the tuning's ranking has not seen. Raises UserError where none is left."""
    seen = set(tuning.method.get("ids", {}).get("ranked", []))
    left = [prompt for prompt in prompts if prompt.id not in seen]
    if not left:
        raise UserError(
            f"all {len(prompts)} prompts were used to rank these experts: an effect on them is "
            "flattered by the choice. Rank with --held-out, give other prompts, or --all-prompts."
        )
    if len(left) < len(prompts):
        say(
            f"{len(prompts) - len(left)} of {len(prompts)} prompts were used to rank these experts "
            "and are left out"
        )
    return left
