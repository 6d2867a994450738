"""MoH against golden numbers computed by an independent numpy loop written from the formulas."""

import pytest
import torch
from golden import HEAD_DIM, HEADS, TOKENS, attend, attention, close, inputs, weight

from moe.model.losses import measure
from moe.model.router import NormRouter, TwoStageRouter, standardise, straight_through
from moe.model.spec import MoHAttention


def run(layer):
    """Output [S, H], gate [S, N] and load."""
    output, load = attend(layer)
    gate = None
    if layer.router is not None:
        x = inputs()
        queries = layer.q_proj(x).view(TOKENS, HEADS, HEAD_DIM)
        gate, load = layer.router(x[0], queries, None, None)
    return output, gate, load


def test_hand_computed_norm_router():
    spec = MoHAttention(top_k=2, balance_norm="paper")
    norms = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    z = standardise(norms, spec)
    close(z[0], [0.774597, 1.549193, 2.323790, 3.098387], 3e-6)
    close(z.softmax(-1)[0], [0.055274, 0.119929, 0.260212, 0.564586])
    router = NormRouter(spec, 4, 4)
    queries = norms[..., None].float()
    gate, load = router(torch.zeros(1, 1), queries, None, None)
    assert gate.tolist() == [[0, 0, 1, 1]]
    for norm, value in (("paper", 0.824797), ("code", 3.299189), ("unit", 1.649594)):
        measured = measure(z.softmax(-1), torch.tensor([[3, 2]]), None, norm)
        close(measured.balance, value, 3e-6)
    close(load.balance, 0.824797, 3e-6)


def test_hand_computed_two_stage_router():
    spec = MoHAttention(router="two_stage", shared_heads=(0, 1), top_k=2)
    router = TwoStageRouter(spec, 5, 1).double()
    router.shared.weight.data = torch.tensor([1.0, 3.0]).double().log()[:, None]
    router.mix.weight.data = torch.tensor([1.0, 3.0]).double().log()[:, None]
    router.routed.weight.data = torch.tensor([1.0, 2.0, 5.0]).double().log()[:, None]
    gate, _ = router(torch.ones(1, 1).double(), torch.zeros(1, 5, 1), None, None)
    close(gate[0], [0.25, 0.75, 0, 6 / 7, 15 / 7])


def test_dense_layer():
    output, _, load = run(attention())
    assert load is None
    close(
        output[0],
        [-0.415944, 0.306675, 0.613724, 2.046085, -0.148938, -1.414220, 0.030492, 1.252080],
    )


@pytest.mark.parametrize(
    ("norm", "balance"), [("paper", 0.511441), ("code", 2.045765), ("unit", 1.022883)]
)
def test_norm_router_layer(norm, balance):
    output, gate, load = run(attention(kind="moh", shared_heads=[0, 1], top_k=2, balance_norm=norm))
    chosen = [set(row.nonzero().flatten().tolist()) - {0, 1} for row in gate]
    assert chosen == [{2, 4}, {2, 4}, {3, 5}, {3, 5}, {2, 5}]
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    close(
        output[0],
        [0.461499, 0.743350, -0.593277, 0.719030, -0.057223, -0.939086, -0.324097, 0.775068],
    )
    close(
        output[4],
        [-0.227570, 0.229751, 0.228794, -0.213744, -0.234419, -0.585029, 0.122422, 0.693716],
    )
    close(load.balance, balance)
    assert load.counts.tolist() == [3, 2, 2, 3] and load.tokens == 5


def test_norm_router_probabilities():
    layer = attention(kind="moh", shared_heads=[0, 1], top_k=2)
    queries = layer.q_proj(inputs()).view(TOKENS, HEADS, HEAD_DIM)
    p = standardise(queries[:, 2:].norm(dim=-1), layer.router.spec).softmax(-1)
    close(p[0], [0.598840, 0.103207, 0.237109, 0.060844])


def test_two_stage_layer():
    layer = attention(kind="moh", router="two_stage", shared_heads=[0, 1], top_k=2)
    for seed, linear in (
        (9, layer.router.shared),
        (10, layer.router.routed),
        (11, layer.router.mix),
    ):
        linear.weight.data = weight(seed, *linear.weight.shape)
    output, gate, _ = run(layer)
    close(gate[0], [1.355375, 1.319837, 0, 0, 1.045897, 0.278891])
    close(output[0, 0], 0.490317)


def test_straight_through_gradient_is_the_frozen_surrogates():
    layer = attention(kind="moh", shared_heads=[0, 1], top_k=2)
    output, _, _ = run(layer)
    (0.5 * output.square().sum()).backward()
    close(
        layer.q_proj.weight.grad[4],
        [0.275949, -0.056282, -0.217323, 0.022643, 0.375136, -0.311274, -0.030849, 0.068960],
    )


def test_without_the_surrogate_the_gradient_differs(monkeypatch):
    """Negative control: a gate that passes no gradient must not give the golden gradient."""
    monkeypatch.setattr("moe.model.router.straight_through", lambda mask, p: mask)
    layer = attention(kind="moh", shared_heads=[0, 1], top_k=2)
    output, _, _ = run(layer)
    (0.5 * output.square().sum()).backward()
    with pytest.raises(AssertionError):
        close(layer.q_proj.weight.grad[4, 0], 0.275949, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_exactly_the_mask(dtype):
    p = torch.rand(4096).to(dtype)
    mask = (torch.rand(4096) < 0.5).to(dtype)
    assert torch.equal(straight_through(mask, p), mask)
    assert not torch.equal(mask + p - p, mask)  # the usual association is not exact


def test_equal_norms_choose_the_first_heads_and_stay_finite():
    router = NormRouter(MoHAttention(top_k=2), 4, 4)
    queries = torch.ones(3, 4, 2, requires_grad=True)
    gate, load = router(torch.zeros(3, 1), queries, None, None)
    (gate.sum() + load.balance).backward()
    assert gate.tolist() == [[1, 1, 0, 0]] * 3
    assert torch.isfinite(queries.grad).all()


def test_two_routed_heads_have_a_constant_probability():
    router = NormRouter(MoHAttention(top_k=1), 2, 2)
    queries = torch.randn(6, 2, 4, requires_grad=True)
    _, load = router(torch.zeros(6, 1), queries, None, None)
    sides = torch.sort(load.probability).values.sum()
    assert torch.isclose(sides, torch.tensor(6.0))
    p = standardise(queries.norm(dim=-1), router.spec).softmax(-1)
    close(p.max(-1).values, [0.8044] * 6, 1e-4)


def test_one_routed_head_is_always_on():
    router = NormRouter(MoHAttention(shared_heads=(0,), top_k=1), 2, 2)
    gate, load = router(torch.zeros(4, 1), torch.randn(4, 2, 3), None, None)
    assert gate.tolist() == [[1, 1]] * 4 and torch.isfinite(load.balance)
