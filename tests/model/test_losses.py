"""Balance and z losses: values by hand, scopes, padding, and the bias that replaces them."""

import pytest
import torch
from tiny import MOE, MOH, dense_model, routed_model, tokens

from moe.model import LayerLoad
from moe.model.losses import measure, update_selection_bias


@pytest.mark.parametrize(("norm", "value"), [("paper", 0.5), ("code", 2.0), ("unit", 1.0)])
def test_a_perfectly_uniform_router(norm, value):
    """Balanced values: K/R, K and 1."""
    probability = torch.full((4, 4), 0.25)
    indices = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    assert measure(probability, indices, None, norm).balance == pytest.approx(value)


def test_sums_count_valid_tokens_only():
    probability = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    indices = torch.tensor([[0], [1], [1]])
    valid = torch.tensor([True, True, False])
    load = measure(probability, indices, valid, "unit", logits_TE=torch.zeros(3, 2))
    assert load.counts.tolist() == [1, 1] and load.tokens == 2
    torch.testing.assert_close(load.probability, torch.tensor([0.9, 1.1]))
    assert load.balance == pytest.approx(2 * (0.45 * 0.5 + 0.55 * 0.5))
    assert load.z == pytest.approx(torch.log(torch.tensor(2.0)).item() ** 2)
    entropy = -(0.7 * torch.tensor(0.7).log() + 0.3 * torch.tensor(0.3).log())
    entropy -= 0.2 * torch.tensor(0.2).log() + 0.8 * torch.tensor(0.8).log()
    torch.testing.assert_close(load.entropy, entropy)


def test_all_padding_gives_zero_and_no_nan():
    load = measure(torch.full((2, 2), 0.5), torch.tensor([[0], [1]]), torch.zeros(2), "unit")
    assert load.tokens == 0 and load.balance == 0 and torch.isfinite(torch.stack(load[2:6])).all()


@pytest.mark.parametrize("mode", ["token_choice", "threshold", "expert_choice", "sequence"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_of_a_union_is_1_when_balanced(mode, top_k):
    """E / k · Σ P f, whatever k is: over the tokens' experts, counted one by one."""
    slices = {"kind": "uoe", "num_experts": 4, "top_k": top_k, "mode": mode}
    router = routed_model(dense_model(), None, slices).model.layers[0].mlp.router
    x, valid = torch.randn(2, 16, 72), torch.ones(32, dtype=torch.bool)
    valid[:5] = False
    choice = router(x, valid, None)
    scored = x
    if mode == "sequence":
        scored = torch.stack([x[0, 5:].mean(0), x[1].mean(0)])[:, None].expand(-1, 16, -1)
    probability = torch.softmax(scored.flatten(0, 1) @ router.weight.T, -1)[5:].mean(0)
    fraction = choice.mask_TE[5:].float().mean(0)
    assert choice.load.counts.tolist() == choice.mask_TE[5:].sum(0).tolist()
    torch.testing.assert_close(choice.load.balance, 4 / top_k * (probability @ fraction))
    router.weight.data.zero_()  # even scores: a threshold takes all four, the others k of them
    if mode != "expert_choice":
        balanced = 4 / top_k if mode == "threshold" else 1.0
        assert router(x, valid, None).load.balance.item() == pytest.approx(balanced)


def router_gradients(model, batches, reference):
    model.zero_grad()
    total = sum(b.numel() for b in batches)
    for batch in batches:
        loss = model(batch, reference_load=reference).router_loss
        (loss * batch.numel() / total).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_scope_global_has_one_gradient_for_every_split_of_the_batch(scope):
    """And scope micro has not, which is the negative control."""
    attention, mlp = {**MOH, "balance_scope": scope}, {**MOE, "balance_scope": scope, "z_coef": 0.1}
    model = routed_model(dense_model().double(), attention, mlp).train()
    ids = tokens(4, 12)
    routing = model(ids).routing
    reference = [
        LayerLoad(r.attention.counts / r.attention.tokens, r.mlp.counts / r.mlp.tokens)
        for r in routing
    ]
    whole = router_gradients(model, [ids], reference)
    split = router_gradients(model, list(ids.split(1)), reference)
    largest = max((whole[n] - split[n]).abs().max() / whole[n].abs().max() for n in whole)
    assert (largest < 1e-10) == (scope == "global")


def test_loss_gets_the_router_loss_in_training_only():
    model, ids = routed_model(dense_model(), MOH, MOE), tokens(2, 12)
    quiet = model.eval()(ids, labels=ids)
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, quiet.loss + quiet.router_loss)
    assert quiet.router_loss > 0


def test_router_loss_is_the_mean_over_routed_layers():
    dense, ids = dense_model(), tokens(2, 12)
    model = routed_model(dense, None, [MOE, {"kind": "dense"}, {**MOE, "z_coef": 0.5}])
    output = model(ids)
    first, third = output.routing[0].mlp, output.routing[2].mlp
    expected = (0.01 * first.balance + 0.01 * third.balance + 0.5 * third.z) / 2
    torch.testing.assert_close(output.router_loss, expected)
    assert dense_has_no_router_loss(dense, ids)


def dense_has_no_router_loss(dense, ids) -> bool:
    return routed_model(dense)(ids).router_loss.item() == 0


def test_selection_bias_moves_against_the_load_and_only_steers_the_choice():
    bias = torch.zeros(3)
    update_selection_bias([bias], [torch.tensor([9.0, 1.0, 5.0])], [torch.tensor(5.0)], rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0]))
    model = routed_model(dense_model(), None, {**MOE, "selection_bias": True, "renormalise": False})
    router = model.model.layers[0].mlp.router
    x = torch.randn(20, 72)
    before = router(x, None, None)
    router.selection_bias += torch.tensor([0.0, 0.0, 0.0, 10.0])
    indices, weights, load = router(x, None, None)[:3]
    assert load.counts[3] == 20 and (indices == 3).any(-1).all()
    scores = torch.softmax(x @ router.weight.T, -1)
    torch.testing.assert_close(weights, scores.gather(1, indices))  # without the bias
    torch.testing.assert_close(load.probability, before[2].probability)


def test_selection_bias_evens_out_a_skewed_router():
    model = routed_model(dense_model(), None, {**MOE, "selection_bias": True, "top_k": 1})
    router = model.model.layers[0].mlp.router
    x = torch.randn(512, 72) + router.weight[0].detach() * 0.7
    first = router(x, None, None)[2].counts
    for _ in range(300):
        counts = router(x, None, None)[2].counts
        update_selection_bias([router.selection_bias], [counts], [counts.mean()], rate=0.01)
    assert first.max() / first.mean() > 2 > 1.3 > counts.max() / counts.mean()
