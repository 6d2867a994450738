"""Unions with a bias that learns, and with a budget of experts, against plain numbers."""

import math

import pytest
import torch
from tiny import BUDGET, dense_config, dense_model, routed_model, tokens

from moe.hf.families import routed_config
from moe.kernels import ops
from moe.model import RoutedLlamaForCausalLM
from moe.model.accounting import mlp_parameters
from moe.model.spec import mlp_spec, routed_on, to_dict
from moe.model.union import UnionRouter

SLICES = {"kind": "uoe", "num_experts": 4, "top_k": 2, "router_bias": True}
SHARED = {"shared_intermediate_size": 16}


def router_of(spec) -> UnionRouter:
    torch.manual_seed(1)
    router = UnionRouter(mlp_spec(spec), 6).double()
    for parameter in router.parameters():
        parameter.data.normal_()
    return router


def logits_of(router, x) -> list[list[float]]:
    return [
        [sum(w * v for w, v in zip(row, t, strict=True)) + b
         for row, b in zip(router.weight.tolist(), router.bias.tolist(), strict=True)]
        for t in x.flatten(0, 1).tolist()
    ]  # fmt: skip


def test_a_budget_by_hand():
    """On where the logit is not negative, with weight 1 and the gradient of its sigmoid."""
    router, x = router_of({**BUDGET, "z_coef": 0.1}), torch.randn(2, 20, 6, dtype=torch.float64)
    choice, rows = router(x, None, None), logits_of(router, x)
    assert choice.mask_TE.tolist() == [[v >= 0 for v in row] for row in rows]
    assert choice.weights_TE.tolist() == [[float(v >= 0) for v in row] for row in rows]
    assert choice.indices_TK is None and len(set(choice.mask_TE.sum(1).tolist())) > 2
    weight = torch.randn_like(choice.weights_TE)
    (choice.weights_TE * weight).sum().backward()
    for expert in range(4):
        expected = 0.0
        for g, row in zip(weight[:, expert].tolist(), rows, strict=True):
            s = 1 / (1 + math.exp(-row[expert]))
            expected += g * s * (1 - s) * (row[expert] >= 0)
        assert router.bias.grad[expert].item() == pytest.approx(expected, rel=1e-10)
    squares = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in rows]
    assert choice.load.z.item() == pytest.approx(sum(squares) / len(squares))


def test_its_loss_by_hand():
    router, x = router_of(BUDGET), torch.randn(2, 20, 6, dtype=torch.float64)
    valid = torch.arange(40) >= 3
    load = router(x, valid, torch.full((4,), 0.9)).load
    load.balance.backward()
    rows = logits_of(router, x)[3:]
    kept = sum(v >= 0 for row in rows for v in row) / len(rows)
    assert load.balance.item() == pytest.approx((kept / 2 - 1) ** 2)
    for expert in range(4):
        sigma = [1 / (1 + math.exp(-row[expert])) for row in rows]
        mean = sum(s * (1 - s) for s in sigma) / len(rows)
        assert router.bias.grad[expert].item() == pytest.approx((kept / 2 - 1) * mean)


def test_a_bias_moves_the_choice_and_the_scores():
    router, x = router_of(SLICES), torch.randn(1, 30, 6, dtype=torch.float64)
    choice, rows = router(x, None, None), logits_of(router, x)
    for token, row in enumerate(rows):
        best = sorted(range(4), key=lambda e: -row[e])[:2]
        assert choice.indices_TK[token].tolist() == best
    choice.weights_TE[:, 0].sum().backward()
    expected = 0.0
    for token, row in enumerate(rows):
        p = math.exp(row[0]) / sum(map(math.exp, row))
        expected += p * (1 - p) * (0 in choice.indices_TK[token].tolist())
    assert router.bias.grad[0].item() == pytest.approx(expected, rel=1e-9)
    router.bias.data[3] += 100
    assert router(x, None, None).mask_TE[:, 3].all()


@pytest.mark.parametrize("shared", [{}, SHARED])
@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_none_and_all_may_be_on(bias, shared):
    model, ids = routed_model(dense_model(), None, {**BUDGET, **shared}).train(), tokens(2, 12)
    for layer in model.model.layers:
        layer.mlp.router.bias.data.fill_(bias)
    output = model(ids, labels=ids)
    output.loss.backward()
    for layer, (_, load) in zip(model.model.layers, output.routing, strict=True):
        assert load.balance.item() == pytest.approx(1.0)  # nothing or twice the two aimed at
        mlp, x = layer.mlp, torch.randn(1, 5, 72)
        y = mlp(x, None, None)[0]
        expected = mlp.shared_expert(x) if shared else torch.zeros_like(x)
        gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        for w1, w2 in zip(gate_up, down, strict=True) if bias > 0 else ():
            gate, up = (x @ w1.T).chunk(2, -1)
            expected = expected + (torch.nn.functional.silu(gate) * up) @ w2.T
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert (gate_up.grad.norm() > 0) == (bias > 0)


@pytest.mark.parametrize("mean", [1, 3])
def test_a_fresh_router_keeps_its_budget(mean):
    fields = routed_config(dense_config(hidden_size=288, head_dim=8)).to_dict()
    mlp = {**BUDGET, "mean_experts": mean}
    config = type(routed_config(dense_config())).from_dict({**fields, "mlp": mlp})
    torch.manual_seed(0)
    with torch.no_grad():
        routing = RoutedLlamaForCausalLM(config)(tokens(8, 64)).routing
    for _, load in routing:
        assert abs(load.counts.sum().item() / load.tokens.item() - mean) < 0.5


def test_annealing_leaves_a_budget_alone():
    router, x = router_of({**BUDGET, "output_scale": 1.5}), torch.randn(1, 9, 6).double()
    before = router(x, None, None).mask_TE
    router.use(4)
    assert torch.equal(before, router(x, None, None).mask_TE) and router.output_scale == 1.5


BAD = [
    ({"mean_experts": 0}, "mean_experts=0 must be more than 0 and at most num_experts=4"),
    ({"mean_experts": 4.5}, "mean_experts=4.5 must be"),
    ({"top_k": 2}, "top_k=2: mode=budget fixes no number"),
    ({"router_bias": False}, "mode=budget has its threshold in the bias"),
    ({"weights": "soft"}, "weights=soft: mode=budget has experts on or off"),
    ({"balance_scope": "global"}, "balance_scope=global: mode=budget"),
    ({"mode": "token_choice", "top_k": 2}, "mean_experts=2 is for mode=budget"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_what_cannot_be_is_refused_with_its_reason(fields, said):
    (found,) = mlp_spec({**BUDGET, **fields}).problems("silu", False)
    assert said in found


def test_a_good_spec_has_no_problem_and_is_counted_by_its_mean():
    spec = mlp_spec({**BUDGET, "intermediate_size": 16, "mean_experts": 1.5})
    assert not spec.problems("silu", False) and mlp_spec(to_dict(spec)) == spec
    assert routed_on(spec) == 1.5
    config = routed_model(dense_model(), None, BUDGET).config
    counts = mlp_parameters(config, spec)
    assert counts.total == 4 * (72 + 1) + 4 * 3 * 72 * 16
    assert counts.active == 4 * (72 + 1) + 1.5 * 3 * 72 * 16


@pytest.mark.parametrize("mode", ["token_choice", "threshold", "sequence", "budget"])
def test_without_gradients_all_slices_run_at_once_with_the_same_result(mode, monkeypatch):
    spec = BUDGET if mode == "budget" else {**SLICES, "mode": mode}
    if mode == "threshold":
        spec = {**spec, "router_bias": False}
    model = routed_model(dense_model("llama"), mlp={**spec, **SHARED})
    model, ids = model.double(), tokens(2, 12)
    calls, at_once = [], ops.masked_mlp
    monkeypatch.setattr(ops, "masked_mlp", lambda *given: calls.append(1) or at_once(*given))
    apart = model(ids).logits.detach()
    assert not calls
    with torch.no_grad():
        fast = model(ids).logits
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(fast, apart, rtol=1e-12, atol=1e-12)
