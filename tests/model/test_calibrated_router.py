"""Calibrated routers of heads against loops over plain numbers: gates, gradients, budgets."""

import math

import pytest
import torch
from tiny import CALIBRATED, THRESHOLD, dense_config, dense_model, routed_model, tokens

from moe.errors import UserError
from moe.hf.families import routed_config
from moe.kernels import ops
from moe.model import RoutedLlamaForCausalLM
from moe.model.accounting import active_heads, attention_parameters, flops_per_token
from moe.model.router import CalibratedRouter
from moe.model.spec import MoHAttention, attention_spec, to_dict

SCALED = {"routed_scale": 1.5}
SPECS = {
    "topk": {**CALIBRATED, **SCALED},
    "topk, selected": {**CALIBRATED, "straight_through": "selected"},
    "topk, kv_group": {**CALIBRATED, "granularity": "kv_group", "shared_heads": [1], "top_k": 1},
    "threshold": {**THRESHOLD, **SCALED},
    "threshold, selected": {**THRESHOLD, "straight_through": "selected"},
    "threshold, kv_group": {**THRESHOLD, "granularity": "kv_group", "mean_heads": 2},
}
HIDDEN, HEADS, GROUPS = 6, 9, 3


def router_of(spec, dtype=torch.float64) -> CalibratedRouter:
    torch.manual_seed(3)
    router = CalibratedRouter(attention_spec(spec), HEADS, GROUPS, HIDDEN).to(dtype)
    for parameter in router.parameters():
        parameter.data.normal_()
    return router


def inputs(count: int = 40, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=dtype)


def scores(router: CalibratedRouter, x: torch.Tensor) -> list[list[float]]:
    """w·x + b of each token and routed unit, in float64."""
    weight, bias = router.weight.tolist(), router.bias.tolist()
    return [
        [sum(w * v for w, v in zip(row, t, strict=True)) + b
         for row, b in zip(weight, bias, strict=True)]
        for t in x.tolist()
    ]  # fmt: skip


def routed_of(spec) -> list[int]:
    units = GROUPS if spec.get("granularity") == "kv_group" else HEADS
    return [u for u in range(units) if u not in spec["shared_heads"]]


def on_of(spec, row: list[float]) -> list[bool]:
    """Which of the routed units are on, by the rule."""
    if spec.get("budget") == "threshold":
        return [s >= 0 for s in row]
    best = sorted(range(len(row)), key=lambda i: -row[i])[: spec["top_k"]]
    return [i in best for i in range(len(row))]


def probability_of(spec, row: list[float]) -> list[float]:
    if spec.get("budget") == "threshold":
        return [1 / (1 + math.exp(-s)) for s in row]
    total = sum(math.exp(s) for s in row)
    return [math.exp(s) / total for s in row]


@pytest.mark.parametrize("name", SPECS)
def test_the_gate_by_hand(name):
    spec, x = SPECS[name], inputs()
    router = router_of(spec)
    gate, load = router(x, None, None, None)
    per_unit = HEADS // GROUPS if "kv_group" in name else 1
    routed, counts = routed_of(spec), [0] * len(routed_of(spec))
    for token, row in enumerate(scores(router, x)):
        expected = [1.0] * (HEADS // per_unit)
        for place, (unit, on) in enumerate(zip(routed, on_of(spec, row), strict=True)):
            expected[unit] = spec.get("routed_scale", 1.0) if on else 0.0
            counts[place] += on
        wide = [value for value in expected for _ in range(per_unit)]
        assert gate[token].tolist() == wide  # exactly
    assert load.counts.tolist() == counts and load.tokens == len(x)
    if "threshold" in name:  # else this would say nothing of thresholds
        assert len(set(gate.count_nonzero(1).tolist())) > 1


@pytest.mark.parametrize("name", SPECS)
def test_the_straight_through_gradient_by_hand(name):
    """dL/ds_i = p_i (g_i - Σ p g) of a softmax, g_i σ_i (1 - σ_i) of sigmoids, g = dL/dgate."""
    spec, x = SPECS[name], inputs()
    router = router_of(spec)
    gate, _ = router(x, None, None, None)
    weight = torch.randn_like(gate)
    (gate * weight).sum().backward()
    per_unit = HEADS // GROUPS if "kv_group" in name else 1
    factor = spec.get("routed_scale", 1.0)
    expected_bias = [0.0] * len(router.bias)
    expected_weight = torch.zeros_like(router.weight)
    for token, row in enumerate(scores(router, x)):
        p, on = probability_of(spec, row), on_of(spec, row)
        g = [factor * sum(weight[token, u * per_unit : (u + 1) * per_unit].tolist())
             for u in routed_of(spec)]  # fmt: skip
        if "selected" in name:
            g = [v if o else 0.0 for v, o in zip(g, on, strict=True)]
        if "threshold" in name:
            found = [v * q * (1 - q) for v, q in zip(g, p, strict=True)]
        else:
            mean = sum(v * q for v, q in zip(g, p, strict=True))
            found = [q * (v - mean) for v, q in zip(g, p, strict=True)]
        for unit, value in enumerate(found):
            expected_bias[unit] += value
            expected_weight[unit] += value * x[token]
    expected = torch.tensor(expected_bias, dtype=torch.float64)
    torch.testing.assert_close(router.bias.grad, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(router.weight.grad, expected_weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["threshold", "threshold, selected", "threshold, kv_group"])
def test_the_budget_loss_and_its_gradient_by_hand(name):
    """(kept / aim - 1)², kept over valid tokens; d kept / d b_i = mean σ_i (1 - σ_i)."""
    spec, x = SPECS[name], inputs()
    router, aim = router_of(spec), spec["mean_heads"] - len(spec["shared_heads"])
    valid = torch.arange(len(x)) >= 7
    _, load = router(x, None, valid, None)
    load.balance.backward()
    rows = scores(router, x)[7:]
    kept = sum(sum(on_of(spec, row)) for row in rows) / len(rows)
    assert load.balance.item() == pytest.approx((kept / aim - 1) ** 2, rel=1e-12)
    slope = 2 * (kept / aim - 1) / aim
    for unit in range(len(router.bias)):
        sigma = [probability_of(spec, row)[unit] for row in rows]
        expected = slope * sum(s * (1 - s) for s in sigma) / len(rows)
        assert router.bias.grad[unit].item() == pytest.approx(expected, rel=1e-10)
    assert load.counts.sum() == pytest.approx(kept * len(rows)) and load.tokens == len(rows)


def test_padding_has_no_say_and_neither_has_a_load_of_before():
    router, x = router_of(THRESHOLD), inputs()
    valid = torch.arange(len(x)) < 30
    _, load = router(x, None, valid, None)
    other = torch.where(valid[:, None], x, -9 * x)
    _, same = router(other, None, valid, torch.full((8,), 0.9))
    for name, a, b in zip(load._fields, load, same, strict=True):
        if a is not None:
            assert torch.equal(a, b), name
    assert not torch.equal(load.balance, router(other, None, None, None)[1].balance)
    _, nothing = router(x, None, torch.zeros_like(valid), None)
    assert nothing.tokens == 0 and torch.isfinite(torch.stack(nothing[2:6])).all()


def test_topk_balances_as_the_norm_router_does():
    """R · Σ P f in the code's norm: by hand."""
    router, x = router_of(SPECS["topk"]), inputs()
    _, load = router(x, None, None, None)
    rows = scores(router, x)
    total = 0.0
    for unit in range(6):
        p = sum(probability_of(CALIBRATED, row)[unit] for row in rows) / len(rows)
        total += p * sum(on_of(CALIBRATED, row)[unit] for row in rows) / len(rows)
    assert load.balance.item() == pytest.approx(6 * total, rel=1e-12)
    reference = torch.linspace(0, 1, 6)
    spec = {**CALIBRATED, "balance_scope": "global"}
    _, load = router_of(spec)(x, None, None, reference)
    shares = [sum(probability_of(spec, row)[u] for row in rows) / len(rows) for u in range(6)]
    expected = 6 * sum(s * f for s, f in zip(shares, reference.tolist(), strict=True))
    assert load.balance.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_wide_under_autocast_too(dtype):
    router = router_of(THRESHOLD, dtype)
    x = inputs(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        gate, _ = router(x, None, None, None)
    wide = x.double() @ router.weight.double().T + router.bias.double()
    sure = wide.abs() > 1e-5
    assert gate.dtype == torch.float32 and sure.float().mean() > 0.9
    assert torch.equal((router.units.take_routed(gate) > 0)[sure], (wide >= 0)[sure])


@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_none_and_all_may_be_on(bias):
    """With none on, attention adds nothing; with all of them the model is the dense one."""
    spec = {**THRESHOLD, "shared_heads": []}
    dense, ids = dense_model(), tokens(2, 16)
    model = routed_model(dense, spec).train()
    for layer in model.model.layers:
        layer.self_attn.router.bias.data.fill_(bias)
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    kept = 9 if bias > 0 else 0
    for attention, _ in output.routing:
        assert attention.balance.item() == pytest.approx((kept / 5.5 - 1) ** 2)
        assert attention.counts.sum() == kept * 32
    with torch.no_grad():
        found = model(ids).logits
        if bias > 0:
            assert torch.equal(found, dense(ids).logits)
            return
        for layer in dense.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        torch.testing.assert_close(found, dense(ids).logits)


def test_the_budget_loss_alone_brings_the_mean_to_the_budget():
    router = router_of({**THRESHOLD, "mean_heads": 3.0}).float()
    x = inputs(2000, torch.float32)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    kept = []
    for _ in range(150):
        gate, load = router(x, None, None, None)
        kept.append((gate > 0).sum(1).double().mean().item())
        optimizer.zero_grad()
        load.balance.backward()
        optimizer.step()
    assert kept[0] > 3.5 and abs(kept[-1] - 3.0) < 0.1


@pytest.mark.parametrize("spec", [CALIBRATED, {**THRESHOLD, "mean_heads": 3.0}, THRESHOLD])
def test_a_fresh_router_keeps_its_budget(spec):
    fields = routed_config(dense_config(hidden_size=288, head_dim=8)).to_dict()
    config = type(routed_config(dense_config())).from_dict({**fields, "attention": spec})
    torch.manual_seed(0)
    model = RoutedLlamaForCausalLM(config)
    with torch.no_grad():
        routing = model(tokens(8, 64)).routing
    for layer, (attention, _) in zip(model.model.layers, routing, strict=True):
        bias = layer.self_attn.router.bias
        if "mean_heads" not in spec:
            assert bias.eq(0).all()
            continue
        kept = (attention.counts.sum() / attention.tokens).item() + 1
        assert abs(kept - spec["mean_heads"]) < 0.6
        assert abs(kept - 5) > 0.2 or spec["mean_heads"] > 4  # half of eight: what 0 would give


def test_decoding_may_drop_and_take_heads_from_token_to_token():
    model, ids = routed_model(dense_model(), THRESHOLD), tokens(1, 24)
    with torch.no_grad():
        whole = model(ids).routing[0].attention.counts
        halves = [model(ids[:, :n]).routing[0].attention.counts for n in (12, 24)]
    assert torch.equal(halves[1], whole) and not torch.equal(2 * halves[0], whole)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [
    THRESHOLD, pytest.param(SPECS["topk"], marks=pytest.mark.full),
], ids=["threshold", "topk"])  # fmt: skip
def test_compiled_layers_compute_the_same(spec):
    model, ids = routed_model(dense_model(), spec), tokens(2, 16)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    layer = model.model.layers[1].self_attn.router
    gradient, layer.weight.grad = layer.weight.grad, None
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-4, atol=1e-6)


BAD = [
    ({"budget": "threshold", "router": "qnorm"}, ["router=qnorm has no threshold"]),
    ({"top_k": 2}, ["attention.top_k=2: budget=threshold fixes no number"]),
    ({"mean_heads": 1.0}, ["mean_heads=1 must be more than the 1 shared and at most 9 heads"]),
    ({"mean_heads": 9.5}, ["mean_heads=9.5 must be more than the 1 shared"]),
    ({"mean_heads": float("nan")}, ["mean_heads=nan"]),
    ({"granularity": "kv_group", "mean_heads": 3.5}, ["mean_heads=3.5", "3 KV groups"]),
    ({"balance_scope": "global"}, ["balance_scope=global: budget=threshold has no balance loss"]),
    ({"shared_heads": list(range(9))}, ["all 9 heads are shared"]),
    ({"budget": "topk", "top_k": 3}, ["mean_heads=5.5 is for budget=threshold"]),
    ({"budget": "topk", "mean_heads": 0}, ["top_k=0 must be between 1 and 8"]),
    ({"top_k": 1, "mean_heads": 12, "router": "two_stage"}, ["top_k=1", "=12 must", "two_stage"]),
]


@pytest.mark.parametrize(("fields", "said"), BAD, ids=[str(b) for b, _ in BAD])
def test_what_cannot_be_is_refused_with_its_reason(fields, said):
    found = attention_spec({**THRESHOLD, **fields}).problems(9, 3)
    assert len(found) == (3 if len(fields) == 3 else 1)
    assert all(any(part in problem for problem in found) for part in said), found
    with pytest.raises(UserError):
        routed_model(dense_model(), {**THRESHOLD, **fields})


def test_a_good_spec_has_no_problem_and_survives_json():
    for spec in SPECS.values():
        read = attention_spec(spec)
        assert not read.problems(9, 3) and attention_spec(to_dict(read)) == read
    assert MoHAttention().budget == "topk" and "budget" not in to_dict(MoHAttention())


def test_accounting_by_hand():
    """Router rows, and the queries' and outputs' rows of heads that are on."""
    fields = routed_config(dense_config()).to_dict()
    config = type(routed_config(dense_config())).from_dict({**fields, "attention": THRESHOLD})
    spec = config.attention_spec(0)
    assert active_heads(config, spec) == 5.5
    counts = attention_parameters(config, spec)
    router, matrix = 8 * (72 + 1), 72 * 8
    assert counts.total == router + (9 + 3 + 3 + 9) * matrix
    assert counts.active == router + 6 * matrix + 5.5 * 2 * matrix
    some = attention_parameters(config, attention_spec(CALIBRATED))
    assert some.active == 6 * 73 + 6 * matrix + 6 * 2 * matrix
    parts = (p for n, p in routed_model(dense_model(), THRESHOLD).named_parameters()
             if "layers.0.self_attn" in n)  # fmt: skip
    assert counts.total == sum(p.numel() for p in parts)
    fewer = type(config).from_dict({**fields, "attention": {**THRESHOLD, "mean_heads": 4.5}})
    saved = 3 * (6 * 2 * matrix + 12 * 8 * 64)
    assert flops_per_token(config, 64) - flops_per_token(fewer, 64) == saved


@pytest.mark.parametrize(
    "spec",
    [
        {**THRESHOLD, "mean_heads": 4.5, "straight_through": "selected"},
        {**CALIBRATED, "top_k": 1, "straight_through": "selected"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_queries_of_heads_that_are_off_are_skipped(spec, family, monkeypatch):
    """Where that pays: the same logits and gradients as with all of them, biases and norms too."""
    model, ids = routed_model(dense_model(family).double(), spec), tokens(2, 20)
    seen = []
    project = ops.project_heads
    monkeypatch.setattr(ops, "project_heads", lambda *g: (seen.append(g), project(*g))[1])
    found = []
    for rows in (1, 10**6):
        monkeypatch.setattr(ops, "PROJECTION_ROWS", rows)
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(seen) == 3 and all((~on).any() for *_, on in seen)
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).norm() < 1e-11 * expected.norm().clamp(min=1e-3)


def test_queries_are_computed_where_heads_that_are_off_learn(monkeypatch):
    """Negative control: with straight_through all a head that is off is asked what it is worth."""
    monkeypatch.setattr(ops, "PROJECTION_ROWS", 1)
    model = routed_model(dense_model(), {**THRESHOLD, "mean_heads": 4.5})
    seen = []
    project = ops.project_heads
    monkeypatch.setattr(ops, "project_heads", lambda *g: (seen.append(g), project(*g))[1])
    model(tokens(2, 20), use_cache=False).logits.sum().backward()
    assert not seen
    with torch.no_grad():
        model(tokens(2, 20), use_cache=False)
        assert len(seen) == 3
        routed_model(dense_model(), {**THRESHOLD, "mean_heads": 8})(tokens(2, 20))
    assert len(seen) == 3  # so many on do not pay
