"""Known behaviour experts: rates find them, and switching them off, not others, ends it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from planted import Planted, plant, refusal_margin, refusals
from torch.nn import functional as F

from moe.hf.loading import load_model, load_tokenizer
from moe.tune.families import columns, sites
from moe.tune.intervene import tuned, watching
from moe.tune.legality import SEMANTICS, Semantics
from moe.tune.tuning import Edit, Tuning

# signal: a planted expert's logit over the spread of the others', so 4 is on for most marked tokens
# and 2.5 for some; 3 of 10 tokens of one class are marked and 1 of 50 of the other's.
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"family": "routed_llama"},
    "softmax, noisy gate": {"family": "routed_llama", "signal": 2.5, "prompts": 128},
    "sigmoid": {"family": "deepseek_v3", "top_k": 4, "groups": (4, 2)},
    "sigmoid, noisy gate": {
        "family": "deepseek_v3", "top_k": 4, "groups": (4, 2), "signal": 3.0, "prompts": 128,
    },
    "61 layers": {
        "family": "deepseek_v3", "layers": 61, "experts": 256, "top_k": 8, "groups": (8, 4),
        "count": 10, "prompts": 24,
    },
}  # fmt: skip
FAST = ("softmax", "sigmoid")
NAMES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


@pytest.fixture(scope="module", params=NAMES)
def planted(request: Any) -> Planted:
    return plant(**CASES[request.param])


def rates(planted: Planted, label: str) -> np.ndarray:
    """Share of a prompt's tokens that each expert is on for: [prompts, experts of all layers]."""
    found, ids = sites(planted.model), planted.prompts(label)
    starts = columns(found)
    counts = np.zeros((len(ids), starts[-1]))

    def see(number: int, indices: Any, weights: Any, chosen: Any) -> None:
        on = F.one_hot(indices, found[number].experts).sum(1).view(*ids.shape, -1).sum(1)
        counts[:, starts[number] : starts[number + 1]] += on.numpy()

    with torch.no_grad(), watching(planted.model, found, see):
        planted.model(ids)
    return counts / ids.shape[1]


def places(planted: Planted, order: np.ndarray) -> set[tuple[int, int]]:
    """Layer and expert of columns."""
    found = sites(planted.model)
    return {(found[i // found[0].experts].layer, int(i % found[0].experts)) for i in order}


def ranked(planted: Planted) -> np.ndarray:
    """Columns, those first that are on more often in prompts that are refused."""
    return np.argsort(-(rates(planted, "refused").mean(0) - rates(planted, "answered").mean(0)))


def off(experts: set[tuple[int, int]], semantics: Semantics, action: str = "off") -> Tuning:
    edits = [Edit(layer=layer, expert=expert, action=action) for layer, expert in sorted(experts)]
    return Tuning(semantics=semantics, experts=edits)


def rate_matched(planted: Planted, seed: int) -> set[tuple[int, int]]:
    """For each planted expert one of the eight others that are on about as often."""
    rate = (rates(planted, "refused").mean(0) + rates(planted, "answered").mean(0)) / 2
    found, draw = sites(planted.model)[0], np.random.default_rng(seed)
    own = [(layer - found.layer) * found.experts + e for layer, e in sorted(planted.experts)]
    taken = set(own)
    for column in own:
        near = [i for i in np.argsort(abs(rate - rate[column])) if i not in taken]
        taken.add(near[int(draw.integers(8))])
    return places(planted, np.array(sorted(taken - set(own))))


def test_the_best_by_rate_are_the_planted_ones(planted):
    found = places(planted, ranked(planted)[: len(planted.experts)])
    assert found == planted.experts


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_switching_them_off_ends_what_they_do_and_no_more(planted, semantics):
    refused, answered = planted.prompts("refused"), planted.prompts("answered")
    assert refusals(planted, refused) >= 0.95 and refusals(planted, answered) <= 0.05
    with tuned(planted.model, off(planted.experts, semantics)):
        assert refusals(planted, refused) <= 0.05
        assert refusals(planted, answered) <= 0.05
    assert refusals(planted, refused) >= 0.95


def test_switching_others_off_that_are_on_as_often_does_not(planted):
    refused = planted.prompts("refused")
    for seed, semantics in enumerate(SEMANTICS):
        others = rate_matched(planted, seed)
        assert len(others) == len(planted.experts) and not others & planted.experts
        with tuned(planted.model, off(others, semantics)):
            assert refusals(planted, refused) >= 0.9


def test_forcing_them_brings_the_refusal_nearer_where_it_was_answered(planted):
    """By as much as the weight of an expert's own score allows."""
    ids = planted.prompts("answered")
    before = refusal_margin(planted, ids)
    with tuned(planted.model, off(planted.experts, "pre_topk", "force")):
        assert refusal_margin(planted, ids) > 1.5 * before > 0


def test_half_the_dial_is_between(planted):
    """Gains of ½ on what writes the refusal: the logit's margin is less, not gone."""
    ids = planted.prompts("refused")
    found = [refusal_margin(planted, ids)]
    for scale in (0.5, 1.0):
        with tuned(planted.model, off(planted.experts, "post_zero"), scale):
            found.append(refusal_margin(planted, ids))
    assert found[0] > 1.0 and 0.2 * found[0] < found[1] < 0.8 * found[0]
    assert abs(found[2]) < 0.01 * found[0]


def test_routers_that_do_not_know_the_marker_are_not_found():
    """Negative control: experts that write the same thing, on for any token."""
    planted = plant("routed_llama", signal=0.0)
    found = places(planted, ranked(planted)[: len(planted.experts)])
    assert len(found & planted.experts) <= 1


def test_a_saved_one_is_read_back(tmp_path):
    planted = plant("deepseek_v3", layers=3, top_k=4, groups=(4, 2), prompts=4, count=1)
    rows = [json.loads(line) for line in planted.save(tmp_path).read_text().splitlines()]
    assert [row["label"] for row in rows] == ["refused", "answered"] * 4
    ids = torch.tensor(load_tokenizer(tmp_path)([rows[0]["prompt"]])["input_ids"])
    assert torch.equal(ids, planted.prompts("refused")[:1])
    with torch.no_grad():
        logits = load_model(tmp_path)(ids).logits
        assert torch.equal(logits, planted.model(ids).logits)
