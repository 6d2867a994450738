"""Experts of a token's best groups alone, against the rule written out in words."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from moe.kernels import ops
from moe.model import RoutedLlamaConfig
from moe.model.router import ExpertRouter
from moe.model.spec import MoEMLP, mlp_spec, to_dict

HIDDEN, TOKENS = 16, 60
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"num_experts": 8, "top_k": 2, "num_groups": 4, "top_groups": 2},
    "sigmoid": {"num_experts": 8, "top_k": 3, "num_groups": 2, "top_groups": 1, "score": "sigmoid"},
    "biased": {"num_experts": 12, "top_k": 3, "num_groups": 4, "top_groups": 2,
               "score": "sigmoid", "selection_bias": True},
    "biased softmax": {"num_experts": 12, "top_k": 2, "num_groups": 3, "top_groups": 1,
                       "selection_bias": True, "renormalise": False},
    "groups of one": {"num_experts": 6, "top_k": 2, "num_groups": 6, "top_groups": 3},
    "as many as there are": {"num_experts": 8, "top_k": 4, "num_groups": 4, "top_groups": 2},
}  # fmt: skip


def router_of(case: dict[str, Any]) -> tuple[ExpertRouter, Tensor]:
    torch.manual_seed(0)
    router = ExpertRouter(MoEMLP(**case), HIDDEN)
    router.weight.data.normal_()
    if router.selection_bias is not None:
        router.selection_bias.normal_(std=0.3)
    return router, torch.randn(TOKENS, HIDDEN)


def by_hand(router: ExpertRouter, x: Tensor) -> list[list[int]]:
    """The experts of each token, best first."""
    spec, chosen = router.spec, []
    size = spec.num_experts // spec.num_groups
    assert spec.top_groups is not None
    for x_H in x:
        logits = router.weight @ x_H
        scores = logits.softmax(0) if spec.score == "softmax" else logits.sigmoid()
        if router.selection_bias is not None:
            scores = scores + router.selection_bias
        score = scores.tolist()
        groups = [range(g * size, (g + 1) * size) for g in range(spec.num_groups)]
        worth = [sum(sorted((score[e] for e in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: spec.top_groups]
        allowed = [e for g in best for e in groups[g]]
        chosen.append(sorted(allowed, key=lambda e: -score[e])[: spec.top_k])
    return chosen


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_tokens_choose_within_their_best_groups(name, backend, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", backend)
    router, x = router_of(CASES[name])
    spec = router.spec
    indices, weights, load, plan = router(x, None, None)
    assert plan is None and indices.tolist() == by_hand(router, x)
    size = spec.num_experts // spec.num_groups
    groups = [len(set(row)) for row in (indices // size).tolist()]
    assert max(groups) <= spec.top_groups
    free, _ = router_of({**CASES[name], "top_groups": None})
    unlimited = free(x, None, None)
    # negative control: there was something to limit, but for groups of one, where the best groups
    # hold the best experts
    assert torch.equal(indices, unlimited.indices_TK) == (size == 1)
    # weights are of the chosen ones, the load is of all
    scores = (x @ router.weight.T).softmax(1)
    if spec.score == "sigmoid":
        scores = (x @ router.weight.T).sigmoid()
    expected = ops.weigh(scores, indices, spec.renormalise)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert torch.allclose(load.probability, unlimited.load.probability, atol=1e-4)
    assert load.counts.sum() == TOKENS * spec.top_k


def test_all_groups_are_no_limit(monkeypatch):
    """And take the fast way where there is one."""
    monkeypatch.setenv("MOE_KERNELS", "triton")
    results = []
    for top_groups in (None, 4):
        router, x = router_of({**CASES["softmax"], "top_groups": top_groups})
        assert not router.spec.limited
        results.append(router(x, None, None))
    assert results[0].plan is not None and torch.equal(*(r.indices_TK for r in results))


def test_a_token_travels_to_no_more_ranks_than_groups():
    """Groups on ranks: rows of x packed for them, with the limit and without."""
    rows = {}
    for top_groups in (None, 2):
        router, x = router_of({"num_experts": 16, "top_k": 6, "num_groups": 4,
                               "top_groups": top_groups})  # fmt: skip
        choice = router(x, None, None)
        packed = ops.pack(x, choice.indices_TK, choice.weights_TK, 16, 4)
        rows[top_groups] = int(packed.offset_W1[-1])
    assert rows[2] <= 2 * TOKENS < rows[None]


def test_gradients_reach_the_router():
    router, x = router_of(CASES["biased"])
    choice = router(x, None, None)
    (gradient,) = torch.autograd.grad(choice.weights_TK.square().sum(), [router.weight])
    assert gradient.abs().sum() > 0 and gradient.isfinite().all()


@pytest.mark.parametrize(("fields", "said"), [
    ({"num_groups": 3}, r"num_groups=3 does not divide num_experts=8\. Use one of 1, 2, 4, 8"),
    ({"num_groups": 0}, r"num_groups=0 does not divide"),
    ({"num_groups": 4, "top_groups": 5}, r"top_groups=5 must be between 1 and num_groups=4"),
    ({"num_groups": 4, "top_groups": 0}, r"top_groups=0 must be between"),
    ({"top_groups": 2}, r"top_groups=2 must be between 1 and num_groups=1"),
    ({"num_groups": 4, "top_groups": 1, "top_k": 3},
     r"top_k=3: mlp\.top_groups=1 of 2 experts each leave 2 .* at least 2"),
])  # fmt: skip
def test_impossible_groups_are_refused_in_words(fields, said):
    values = {"kind": "moe", "num_experts": 8, "top_k": 2, **fields}
    with pytest.raises(UserError, match=said):
        RoutedLlamaConfig(hidden_size=HIDDEN, mlp=values)


def test_groups_are_kept_in_the_config():
    spec = MoEMLP(**CASES["biased"])
    assert mlp_spec(to_dict(spec)) == spec
    assert "num_groups" not in to_dict(MoEMLP(num_experts=8, top_k=2))
    with pytest.raises(UserError, match="num_groups is not a field of kind uoe"):
        mlp_spec({"kind": "uoe", "num_experts": 4, "top_k": 2, "num_groups": 2})
