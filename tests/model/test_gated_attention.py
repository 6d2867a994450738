"""Gated attention in one kernel against attention and gate apart: masks, windows, caches, rows."""

import pytest
import torch
from tiny import MOH, THRESHOLD, TWO_STAGE, dense_model, routed_model, tokens

from moe.kernels import ops
from moe.model.attention import reach

FEW = {**MOH, "top_k": 1}  # 4 of 9 heads: few enough to leave the others out
KINDS = {"moh": MOH, "moh, few": FEW, "two_stage": {**TWO_STAGE, "top_k": 2},
         "threshold": {**THRESHOLD, "mean_heads": 4},
         "bam": {"kind": "bam", "num_experts": 2}, "bam, shared": {"kind": "bam", "num_experts": 2,
                                                                   "kv": "shared"}}  # fmt: skip
PADDING = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])
INPUTS = {
    "plain": {},
    "padding on the left": {"attention_mask": PADDING},
    "padding on the right": {"attention_mask": PADDING.flip(1)},
    "documents": {"position_ids": (torch.arange(20) % 8)[None].expand(2, -1)},
    "one document": {"attention_mask": torch.ones(2, 20, dtype=torch.long)},
}


@pytest.fixture
def seen(monkeypatch) -> list[bool]:
    """Whether each call of the kernel was given a list of rows."""
    calls: list[bool] = []
    attend = ops.attend_heads

    def spied(*given):
        calls.append(given[6] is not None)
        return attend(*given)

    monkeypatch.setattr(ops, "attend_heads", spied)
    return calls


def both(model, monkeypatch, **given):
    """Logits by the two ways."""
    found = []
    for backend in ("triton", "cpu"):
        monkeypatch.setenv("MOE_KERNELS", backend)
        found.append(model(tokens(2, 20), use_cache=False, **given).logits)
    return found


def relative(actual, expected) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=[pytest.mark.full] * (kind == "threshold")) for kind in KINDS
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_logits_are_those_of_attention_and_gate_apart(family, kind, name, monkeypatch, seen):
    given = INPUTS[name]
    model = routed_model(dense_model(family).double(), KINDS[kind])
    ours, theirs = both(model, monkeypatch, **given)
    valid = given.get("attention_mask", torch.ones(2, 20)).bool()
    assert relative(ours[valid], theirs[valid]) < 1e-12
    few = kind in ("moh, few", "two_stage", "threshold")
    # torch's own attention and a gate after it, unless heads are left out or there is a mask
    masked = family == "mistral" or name not in ("plain", "one document")
    assert seen == [few] * (3 if few or masked else 0)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cpu_leaves_few_heads_out(family, name, monkeypatch, seen):
    """From a length on, which is 0 here; with more heads on the other way is taken."""
    few = {**TWO_STAGE, "top_k": 1}
    model, given = routed_model(dense_model(family).double(), few), INPUTS[name]
    there = given.get("attention_mask", torch.ones(2, 20)).bool()
    found = []
    for shares in (((0, 0.5),), ((21, 0.5),)):
        monkeypatch.setattr(ops, "CPU_SHARES", shares)
        model.zero_grad()
        logits = model(tokens(2, 20), use_cache=False, **given).logits[there]
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert seen == [True] * 3
    for actual, expected in zip(*found, strict=True):  # some gradients are 0 but for rounding
        assert (actual - expected).norm() < 1e-9 * expected.norm().clamp(min=1e-3)
    monkeypatch.setattr(ops, "CPU_SHARES", ((0, 0.4),))
    model(tokens(2, 20))
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["moh, few", "two_stage", "threshold", "bam"])
def test_gradients_are_too(kind, monkeypatch, seen):
    selected = {"straight_through": "selected"} if kind == "threshold" else {}
    model = routed_model(dense_model().double(), {**KINDS[kind], **selected})
    found = []
    for logits in both(model, monkeypatch):
        model.zero_grad()
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert relative(gradient, found[1][name]) < 1e-9, name
    # a straight-through router asks after the heads that are off: they must be computed
    assert seen == [True] * (3 if kind in ("two_stage", "threshold") else 0)


@torch.no_grad()
def test_a_mask_with_holes_takes_the_other_way(monkeypatch, seen):
    mask = PADDING.clone()
    mask[0, 8] = 0
    assert reach(torch.arange(20)[None].expand(2, -1), mask, 0) is None
    ours, theirs = both(routed_model(dense_model().double(), MOH), monkeypatch, attention_mask=mask)
    assert torch.equal(ours, theirs) and not seen


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_generation_with_windows_and_padding(family, monkeypatch, seen):
    model = routed_model(dense_model(family), FEW)
    made = []
    for backend in ("triton", "cpu"):
        monkeypatch.setenv("MOE_KERNELS", backend)
        options = {"attention_mask": PADDING, "max_new_tokens": 6, "do_sample": False}
        made.append(model.generate(tokens(2, 20), pad_token_id=0, **options))
    assert torch.equal(*made) and all(seen) and len(seen) == 3 * 6


@torch.no_grad()
def test_decoding_leaves_out_any_head_that_is_off(monkeypatch, seen):
    """6 of 9 heads on: too many for a list of rows, but one token alone reads fewer keys."""
    monkeypatch.setenv("MOE_KERNELS", "triton")
    model = routed_model(dense_model(), MOH)
    model.generate(tokens(1, 20), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert seen == [True] * 3 * 3


def test_reach_by_hand():
    places = torch.arange(6)[None]
    assert reach(places, None, 0).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert reach(torch.tensor([[0, 1, 0, 1, 2, 0]]), None, 0).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert reach(places[:, :2] + 4, None, 4).tolist() == [[4, 5]]
    padded = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert reach(places, padded, 0).tolist() == [[-2, -1, 0, 1, 2, 3]]
    assert reach(places[:, :1] + 5, padded, 5).tolist() == [[3]]
