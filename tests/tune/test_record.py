"""Recording: counts and mass against hand counts, batches with padding, tokens, tunings."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import recordings
import torch
from recordings import CAUSAL, TEXTS, recorded, subject

from moe.errors import UserError
from moe.tune import record as module
from moe.tune.families import columns
from moe.tune.generation import Sampling, respond
from moe.tune.intervene import tuned, watching
from moe.tune.prompts import places
from moe.tune.record import Meter
from moe.tune.trace import Trace
from moe.tune.tuning import Edit, Tuning

ROOT = Path(__file__).resolve().parents[2]
RESPONSES = ["yes", "no, it is not", "", "7", "q", "a b c d e f", "maybe"]


def blocks(trace: Trace, array: np.ndarray) -> list[np.ndarray]:
    """An array cut into the sites' columns."""
    starts = columns(trace.sites)
    return [array[:, a:b] for a, b in itertools.pairwise(starts)]


def alike(left: Trace, right: Trace) -> None:
    """Equal counts, mass to the rounding of float32."""
    assert np.array_equal(left.tokens, right.tokens)
    assert np.array_equal(left.counts, right.counts)
    np.testing.assert_allclose(left.mass, right.mass, rtol=1e-4, atol=1e-4)


def ids_of(of, text: str) -> torch.Tensor:
    return torch.tensor([of.tokenizer(text)["input_ids"]])


@torch.no_grad()
def counted(of, text: str) -> list[torch.Tensor]:
    """Tokens per expert of each router, from what models return or by the family's formula."""
    ids = ids_of(of, text)
    if of.folder.name in recordings.ROUTED:
        loads = [load for layer in of.model(ids).routing for load in (layer.mlp, layer.attention)]
        return [load.counts for load in loads if load is not None]
    if of.folder.name == "mixtral":
        logits = of.model(ids, output_router_logits=True).router_logits
        chosen = [layer.softmax(-1).topk(2).indices for layer in logits]
    else:
        chosen = [_deepseek(layer, of, ids) for layer in of.model.model.layers[1:]]
    return [
        c.flatten().bincount(minlength=s.experts) for c, s in zip(chosen, of.sites, strict=True)
    ]


def _deepseek(layer, of, ids: torch.Tensor) -> torch.Tensor:
    """Experts [T, K]: sigmoid and bias, the best 2 of 4 groups, the best 3 of those."""
    held = []
    handle = layer.mlp.gate.register_forward_pre_hook(lambda module, given: held.append(given[0]))
    of.model(ids)
    handle.remove()
    score = (held[0].flatten(0, -2) @ layer.mlp.gate.weight.T).sigmoid()
    score = score + layer.mlp.gate.e_score_correction_bias
    groups = score.view(len(score), 4, 2).sum(-1).topk(2).indices
    allowed = torch.zeros(len(score), 4).scatter(1, groups, 1.0).repeat_interleave(2, 1)
    return score.masked_fill(allowed == 0, -1.0).topk(3).indices


@pytest.mark.parametrize("name", ["moe", "bam", "mixtral", "deepseek_v3", "threshold"])
def test_counts_are_those_of_a_hand_count(name):
    of = subject(name)
    trace = recorded(of, TEXTS)
    assert trace.tokens.tolist() == [len(t) for t in TEXTS]
    for row, text in enumerate(TEXTS):
        for block, expected in zip(blocks(trace, trace.counts), counted(of, text), strict=True):
            if block.shape[1] == 3:  # BAM's experts are all on; a load counts their shares
                assert (block[row] == len(text)).all()
                continue
            assert block[row].tolist() == expected.tolist(), text


def test_heads_that_are_always_on_are_counted_for_every_token():
    of = subject("moh")
    trace = recorded(of, TEXTS)
    for row, text in enumerate(TEXTS):
        for block, routed in zip(blocks(trace, trace.counts), counted(of, text), strict=True):
            shared = [0, 1, 4]
            assert (block[row, shared] == len(text)).all()
            assert np.delete(block[row], shared).tolist() == routed.tolist()


@pytest.mark.parametrize(
    ("name", "scale"), [("mixtral", 1), ("moe", 1), ("bam", 1), ("deepseek_v3", 2.5)]
)
def test_mass_is_the_sum_of_the_weights_and_those_of_a_token_add_up(name, scale):
    of = subject(name)
    trace = recorded(of, TEXTS)
    for block, counts in zip(blocks(trace, trace.mass), blocks(trace, trace.counts), strict=True):
        np.testing.assert_allclose(block.sum(1), scale * trace.tokens, rtol=1e-5)
        assert ((block > 0) == (counts > 0)).all() and (block <= scale * counts + 1e-4).all()


@pytest.mark.parametrize("tokens", ["prompt", "last", "generated", "all"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_batch_with_padding_is_its_prompts_one_by_one(name, tokens):
    of = subject(name)
    together = recorded(of, TEXTS, RESPONSES, tokens=tokens, batch_size=5)
    alone = recorded(of, TEXTS, RESPONSES, tokens=tokens, batch_size=1)
    alike(together, alone)
    assert together.counts.any()


@pytest.mark.parametrize("name", ["expert_choice", "sequence"])
def test_prompts_of_models_that_look_ahead(name):
    of = subject(name)
    alike(recorded(of, TEXTS, batch_size=5), recorded(of, TEXTS, batch_size=1))
    with pytest.raises(UserError, match=r"not causal.*Use prompt or last"):
        recorded(of, TEXTS, RESPONSES, tokens="all")


def test_a_recorder_that_counts_padding_is_found(monkeypatch):
    """Negative control."""
    monkeypatch.setattr(module, "watched", lambda mask, batch, tokens: torch.ones_like(mask).bool())
    of = subject("moe")
    together, alone = (recorded(of, TEXTS, batch_size=n) for n in (5, 1))
    with pytest.raises(AssertionError):
        alike(together, alone)


def test_positions_that_count_padding_are_found(monkeypatch):
    """Negative control: the RoPE of a padded row would be relative, so UoE's sinks are asked."""
    whole = module.pad

    def shifted(*given, **more):
        found = whole(*given, **more)
        places = torch.arange(found["input_ids"].shape[1])
        return {**found, "position_ids": places.expand_as(found["input_ids"])}

    monkeypatch.setattr(module, "pad", shifted)
    of = subject("uoe")
    together, alone = (recorded(of, TEXTS, batch_size=n) for n in (5, 1))
    with pytest.raises(AssertionError):
        alike(together, alone)


@pytest.mark.parametrize("name", ["moe", "mixtral"])
def test_modes_add_up(name):
    """`all` is prompt and response; `last` is the last token of the prompt."""
    of = subject(name)
    parts = {t: recorded(of, TEXTS, RESPONSES, tokens=t) for t in module.TOKENS}
    assert parts["generated"].tokens.tolist() == [len(r) for r in RESPONSES]
    assert parts["last"].tokens.tolist() == [1] * len(TEXTS)
    total = parts["prompt"].counts + parts["generated"].counts
    assert np.array_equal(parts["all"].counts, total)
    shorter = [t[:-1] for t in TEXTS if len(t) > 1]
    before = recorded(of, shorter)
    rows = [i for i, t in enumerate(TEXTS) if len(t) > 1]
    last = parts["prompt"].counts[rows] - before.counts
    assert np.array_equal(parts["last"].counts[rows], last)


@pytest.mark.parametrize("name", ["moe", "mixtral", "deepseek_v3"])
def test_generated_tokens_route_as_they_did_in_decoding(name):
    """The teacher-forced pass against what routers did while `generate` fed token after token."""
    of = subject(name)
    trace = recorded(of, TEXTS[:3], sampling=sampled(8), tokens="generated")
    assert trace.tokens.tolist() == [8] * 3
    names = places(recordings.prompts(TEXTS[:3]))
    for row, text in enumerate(TEXTS[:3]):
        seen = torch.zeros(columns(of.sites)[-1], dtype=torch.int64)

        def see(number, indices, weights, chosen, text=text, seen=seen):
            if len(indices) == 1 < len(text):  # the prompt came in one piece
                seen[columns(of.sites)[number] + indices[0]] += 1

        with watching(of.model, of.sites, see):  # the ninth token is not fed again
            ids = ids_of(of, text).tolist()
            respond(of.model, ids, sampled(9), names[row : row + 1], [2])
        if len(text) > 1:
            assert trace.counts[row].tolist() == seen.tolist()


def sampled(length: int) -> Sampling:
    return Sampling(max_new_tokens=length, temperature=1.0, seed=3)


@pytest.mark.parametrize("name", ["moe", "mixtral"])
def test_the_tuned_choice_is_what_is_recorded(name):
    of = subject(name)
    plain = recorded(of, TEXTS)
    hot = int(plain.counts[:, : of.sites[0].experts].sum(0).argmax())
    layer = of.sites[0].layer
    edits = [Edit(layer=layer, expert=hot)]
    for semantics, count, mass in (("pre_topk", 0, 0), ("post_zero", 1, 0)):
        tuning = Tuning(semantics=semantics, experts=edits)
        trace = recorded(subject(name, tuning=tuning), TEXTS)
        assert bool(trace.counts[:, hot].any()) == bool(count)
        assert bool(trace.mass[:, hot].any()) == bool(mass)
        if count:
            assert np.array_equal(trace.counts[:, hot], plain.counts[:, hot])
        of_dial = recorded(subject(name, tuning=tuning, scale=0.0), TEXTS)
        assert np.array_equal(of_dial.counts, plain.counts)


def test_a_router_that_something_goes_around_is_named():
    of = subject("mixtral")
    of.model.model.layers[1].mlp.forward = lambda x, *rest, **more: x
    with pytest.raises(UserError, match=r"1 of 3 routers did not run once .*layer 1 mlp: 0 times"):
        recorded(of, TEXTS)


def test_a_router_that_sees_other_tokens_is_named():
    of = subject("moe")
    meter = Meter(of.sites, torch.device("cpu"))
    meter.begin(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="saw 4 tokens of 6"):
        meter.see(0, torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2), None)


def test_nothing_is_left_in_the_model():
    of = subject("mixtral", tuning=Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=1)]))
    before = of.model.generation_config
    recorded(of, TEXTS, sampling=Sampling(max_new_tokens=3), tokens="all")
    assert of.model.generation_config is before
    assert not any(m._forward_hooks for m in of.model.modules())
    with tuned(of.model, of.tuning):
        pass
