"""Experts with room for so many tokens, against a list of choices worked off by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.engines.parameters import limit_experts
from moe.errors import UserError
from moe.kernels import ops
from moe.model import RoutedLlamaConfig
from moe.model.experts import RoutedMLP
from moe.model.router import ExpertChoice
from moe.model.spec import mlp_spec

HIDDEN, EXPERTS, TOKENS, K = 16, 6, 25, 2
SHAPE = 5, 5
MOE = {"kind": "moe", "num_experts": EXPERTS, "top_k": K, "intermediate_size": 8}
SPECS: dict[str, dict[str, Any]] = {
    "mixture": MOE,
    "sigmoid, shared": {**MOE, "score": "sigmoid", "shared_intermediate_size": 8},
    "union": {**MOE, "kind": "uoe"},
    "soft union of sequences": {**MOE, "kind": "uoe", "weights": "soft", "mode": "sequence"},
}


def layer_of(spec: dict[str, Any], capacity: float | None) -> RoutedMLP:
    torch.manual_seed(0)
    layer = RoutedMLP(RoutedLlamaConfig(hidden_size=HIDDEN, intermediate_size=48), mlp_spec(spec))
    for parameter in layer.parameters():
        parameter.data.normal_()
    layer.capacity = capacity
    return layer.train()


def kept_by_hand(indices: Tensor, weights: Tensor, room: int, valid: Tensor | None) -> list[list]:
    """Expert by expert: its choices from the heaviest down, earlier tokens first, padding last."""
    rows = indices.tolist()
    for expert in range(EXPERTS):
        found = []
        for token, row in enumerate(rows):
            padded = valid is not None and not valid[token]
            for k in [k for k, chosen in enumerate(row) if chosen == expert]:
                found.append((padded, 0.0 if padded else -weights[token, k].item(), token, k))
        for _, _, token, k in sorted(found)[room:]:
            rows[token][k] = EXPERTS
    return rows


def draw(case: str) -> tuple[Tensor, Tensor, Tensor | None]:
    indices = torch.rand(TOKENS, EXPERTS).topk(K).indices
    weights, valid = torch.rand(TOKENS, K), None
    if case == "ties":
        weights = weights.mul(3).floor()
    elif case == "all to one":
        indices = torch.full((TOKENS, 1), 4)
        weights = weights[:, :1]
    elif case == "padding":
        valid = torch.rand(TOKENS) < 0.6
    elif case == "some nowhere":
        indices[torch.rand(TOKENS, K) < 0.3] = EXPERTS
    elif case == "no tokens":
        indices, weights = indices[:0], weights[:0]
    return indices, weights, valid


CASES = "even", "ties", "all to one", "padding", "some nowhere", "no tokens"


@pytest.mark.parametrize("room", [0, 1, 3, 8, 99])
@pytest.mark.parametrize("case", CASES)
def test_the_heaviest_choices_stay(case, room):
    indices, weights, valid = draw(case)
    found = ops.limit_load(indices, weights, EXPERTS, room, valid)
    assert found.tolist() == kept_by_hand(indices, weights, room, valid)
    if len(indices):
        counts = torch.bincount(found.flatten(), minlength=EXPERTS)[:EXPERTS]
        assert counts.max() <= room


def test_other_rules_are_told_apart():
    """Negative controls: the lightest stay, later tokens stay, padding counts like all others."""
    indices, weights, _ = draw("even")
    right = kept_by_hand(indices, weights, 3, None)
    assert ops.limit_load(indices, -weights, EXPERTS, 3, None).tolist() != right
    indices, weights, valid = draw("padding")
    right = kept_by_hand(indices, weights, 3, valid)
    assert ops.limit_load(indices, weights, EXPERTS, 3, None).tolist() != right
    indices, weights = indices[:, :1], torch.ones(TOKENS, 1)
    late = ops.limit_load(indices.flip(0), weights, EXPERTS, 3, None).flip(0).tolist()
    assert late != kept_by_hand(indices, weights, 3, None)


def test_opcheck():
    indices, weights, valid = draw("padding")
    tests = ("test_schema", "test_faketensor")
    for given in (valid, None):
        arguments = indices, weights, EXPERTS, 3, given
        torch.library.opcheck(torch.ops.moe.limit_load.default, arguments, test_utils=tests)


def by_hand(layer: RoutedMLP, x: Tensor, valid: Tensor | None) -> tuple[Tensor, int]:
    """The layer's output as a plain sum over the choices that stay, and how many do not."""
    assert layer.capacity is not None
    if layer.router.spec.kind == "moe":
        choice = ExpertChoice(*layer.router(x.flatten(0, 1), valid, None))
        indices, weights = choice.indices_TK, choice.weights_TK
    else:
        union = layer.router(x, valid, None)
        indices, weights = union.indices_TK, union.weights_TE.gather(1, union.indices_TK)
    room = math.ceil(layer.capacity * TOKENS * K / EXPERTS)
    kept = kept_by_hand(indices, weights, room, valid)
    rows, dropped = [], 0
    for token, x_H in enumerate(x.flatten(0, 1)):
        y_H = torch.zeros(HIDDEN)
        if layer.shared_expert is not None:
            y_H = y_H + layer.shared_expert(x_H)
        for k, expert in enumerate(kept[token]):
            if expert == EXPERTS:
                dropped += valid is None or bool(valid[token])
                continue
            gate, up = (layer.experts.gate_up_proj[expert] @ x_H).chunk(2)
            mine = layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            y_H = y_H + weights[token, k] * mine
        rows.append(y_H)
    return torch.stack(rows).view_as(x), dropped


@pytest.mark.parametrize("backend", ["naive", "cpu", "grouped_mm", "triton"])
@pytest.mark.parametrize("capacity", [0.5, 1.0])
@pytest.mark.parametrize("name", SPECS)
def test_a_layer_leaves_out_what_has_no_room(name, capacity, backend, monkeypatch):
    """Outputs, gradients and the number dropped, padding on and off."""
    monkeypatch.setenv("MOE_KERNELS", backend)
    layer = layer_of(SPECS[name], capacity)
    for valid in (None, torch.arange(TOKENS) % 5 < 4):
        x = torch.randn(*SHAPE, HIDDEN, requires_grad=True)
        y, load = layer(x, valid, None)
        with monkeypatch.context() as patch:
            patch.setenv("MOE_KERNELS", "naive")
            expected, dropped = by_hand(layer, x, valid)
        assert load.dropped == dropped and 0 < dropped < K * TOKENS
        assert load.counts.sum() == K * (TOKENS if valid is None else int(valid.sum()))
        leaves = [x, *layer.parameters()]
        found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
        wanted = [expected, *torch.autograd.grad(expected.square().sum(), leaves)]
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_all_tokens_to_one_expert():
    layer = layer_of({**MOE, "top_k": 1}, 1.25)
    layer.router.weight.data[3] = 1.0
    x = torch.rand(*SHAPE, HIDDEN) + 5
    layer.router.weight.data[[0, 1, 2, 4, 5]] = -1.0
    y, load = layer(x, None, None)
    room = math.ceil(1.25 * TOKENS / EXPERTS)
    assert load.counts.tolist() == [0, 0, 0, TOKENS, 0, 0] and load.dropped == TOKENS - room
    assert int((y.flatten(0, 1) != 0).any(1).sum()) == room
    # with one weight for all, the first come
    assert (y.flatten(0, 1)[:room] != 0).any()


def test_nothing_is_dropped_in_evaluation_or_where_there_is_room():
    x = torch.randn(*SHAPE, HIDDEN)
    free, load = layer_of(MOE, None)(x, None, None)
    assert load.dropped is None
    roomy, load = layer_of(MOE, float(EXPERTS))(x, None, None)
    assert torch.equal(roomy, free) and load.dropped == 0
    tight = layer_of(MOE, 0.5)
    still, load = tight.eval()(x, None, None)
    assert torch.equal(still, free) and load.dropped is None
    assert not torch.equal(tight.train()(x, None, None)[0], free)


@pytest.mark.parametrize("mode", ["threshold", "expert_choice", "budget"])
def test_unions_without_a_fixed_number_are_refused(mode):
    model = torch.nn.ModuleList([layer_of({**MOE, "kind": "uoe", "mode": mode}, None)])
    with pytest.raises(UserError, match=rf"parallel\.capacity=1\.5: mlp\.mode={mode}"):
        limit_experts(model, 1.5)
    limit_experts(model, None)
    with pytest.raises(UserError, match="has no routed MLP"):
        limit_experts(torch.nn.Linear(2, 2), 1.5)
