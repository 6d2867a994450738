"""What keeps the function exactly, under which condition, and what shows when the condition fails.

The rows that other files do not have: copies to the bit, copies with raw weights, copies told
apart, experts taken out. Permutation, slices, groups and shared slices are in test_slices, BAM and
BTX in test_mixtures and test_branches, native homes of shared experts in tests/hf.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import MOE, copy_experts, dense_model, routed_model, tokens

from moe.upcycle.receipt import Receipt


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def copies(dense, std: float, **spec):
    """Copied experts under routers drawn with deviation `std`."""
    model = routed_model(dense, None, {**MOE, **spec})
    copy_experts(model, dense)
    for layer in model.model.layers:
        layer.mlp.router.weight.data.normal_().mul_(std)
    return model


@pytest.mark.parametrize(
    ("std", "scale", "low", "high"),
    [
        (0.0, 2.0, 0, 1e-5),  # N/k makes up for raw weights of 1/N each
        (0.5, 2.0, 0.05, 10),  # but not where the router prefers anything
        (0.0, 1.0, 0.3, 10),
    ],
)
@torch.no_grad()
def test_raw_weights_need_a_router_of_zeros_and_a_scale(std, scale, low, high):
    dense, ids = dense_model(), tokens(2, 24)
    model = copies(dense, std, renormalise=False, weight_scale=scale)
    assert low <= relative(model(ids).logits, dense(ids).logits) <= high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_copies_are_the_dense_model_bit_for_bit(family, dtype):
    """Where one expert has weight 1, or two have 1/2, and nothing but that touches the numbers.

    Under a drawn router an expert gets some of the tokens: a product of fewer rows is summed in
    another order, so there float32 agrees to rounding alone, and one token alone to the bit.
    """
    dense, ids = dense_model(family).to(dtype), tokens(2, 24)
    expected = dense(ids).logits
    for top_k in (1, 2):  # ties: every token goes to the first experts
        assert torch.equal(copies(dense, 0.0, top_k=top_k)(ids).logits, expected)
    drawn = copies(dense, 0.2, top_k=1)
    for token in ids[0, :6]:
        assert torch.equal(drawn(token.view(1, 1)).logits, dense(token.view(1, 1)).logits)
    if dtype == torch.float32:
        assert relative(drawn(ids).logits, expected) < 1e-6  # measured: 1e-7 to 3e-7
    drawn.model.layers[1].mlp.experts.down_proj *= 1 + 2**-6  # negative control, a bit of bfloat16
    assert relative(drawn(ids).logits, expected) > 1e-4
    assert not torch.equal(drawn(ids[:1, :1]).logits, dense(ids[:1, :1]).logits)


@torch.no_grad()
def test_the_best_of_two_with_raw_weights_is_far_from_both():
    """BAM's text: top-1, its probability as its weight."""
    dense, ids = dense_model(), tokens(2, 24)
    raw = copies(dense, 0.2, renormalise=False, top_k=1)
    renormalised = copies(dense, 0.2, top_k=1)
    assert relative(raw(ids).logits, dense(ids).logits) > 0.1
    assert relative(renormalised(ids).logits, dense(ids).logits) < 1e-5


def difference(moe_upcycle, source: Path, out: Path, *options: object) -> float:
    result = moe_upcycle("copy", "--num-experts", 4, "--top-k", 2, "--source", source, "--out", out,
                         *options)  # fmt: skip
    assert result.code == 0, result.err
    return Receipt.read(out).verification["relative_difference"]


@pytest.mark.slow
def test_the_difference_grows_with_what_tells_copies_apart(dense, moe_upcycle, tmp_path):
    source = dense("llama")
    for kind, amounts, least in (("noise", (0, 1e-4, 1e-3, 1e-2), 2), ("drop", (0, 0.1, 0.5), 1.2)):
        found = [
            difference(moe_upcycle, source, tmp_path / f"{kind}{a}", "--diversify", f"{kind}:{a}")
            for a in amounts
        ]
        assert found[0] < 1e-5
        assert all(b > least * max(a, 1e-5) for a, b in pairwise(found)), found


def test_separate_sets_of_neurons_damage_more(dense, moe_upcycle, weights, tmp_path):
    """Redrawing the same share of gate, up and down apart, as Drop-Upcycling's code does."""
    source, out = dense("llama"), tmp_path / "one"
    one = difference(moe_upcycle, source, out, "--diversify", "drop:0.25")
    parent, own = weights(source), weights(out)
    for layer in range(3):
        at = f"model.layers.{layer}.mlp"
        for expert in range(4):
            gate_up = own[f"{at}.experts.gate_up_proj"][expert]
            changed = (gate_up[:64] != parent[f"{at}.gate_proj.weight"]).any(1)
            assert changed.sum() == 16
            assert torch.equal(changed, (gate_up[64:] != parent[f"{at}.up_proj.weight"]).any(1))
            down = own[f"{at}.experts.down_proj"][expert]
            assert torch.equal(changed, (down != parent[f"{at}.down_proj.weight"]).any(0))
    assert one > 0.1


@torch.no_grad()
def test_experts_taken_out_equal_their_own_masks():
    model, ids = routed_model(dense_model().double(), None, MOE), tokens(2, 24)
    whole = model(ids).logits
    removed = 2

    def masked(before: bool) -> torch.Tensor:
        """Logits with one expert masked before the choice, or its weight set to 0 after it."""
        routers = [layer.mlp.router for layer in model.model.layers]
        hooks = []
        for router in routers:

            def hook(module, given, result):
                indices, weights, load = result[:3]
                if not before:
                    return indices, weights.masked_fill(indices == removed, 0), load
                scores = (given[0] @ module.weight.T).softmax(-1)
                scores[:, removed] = -1
                best = scores.topk(2, dim=-1)
                return best.indices, best.values / best.values.sum(-1, keepdim=True), load

            hooks.append(router.register_forward_hook(hook))
        logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        return logits

    before, after = masked(True), masked(False)
    assert relative(before, whole) > 1e-3 and relative(after, whole) > 1e-3
    assert relative(before, after) > 1e-3  # two different interventions
    biased = routed_model(dense_model().double(), None, {**MOE, "selection_bias": True})
    biased.load_state_dict(model.state_dict(), strict=False)
    for layer in biased.model.layers:
        layer.mlp.router.selection_bias[removed] = -1e4
    assert relative(biased(ids).logits, before) < 1e-14
    fewer = routed_model(dense_model().double(), None, {**MOE, "num_experts": 3})
    kept = [0, 1, 3]
    for layer, source in zip(fewer.model.layers, model.model.layers, strict=True):
        layer.mlp.router.weight.copy_(source.mlp.router.weight[kept])
        layer.mlp.experts.gate_up_proj.copy_(source.mlp.experts.gate_up_proj[kept])
        layer.mlp.experts.down_proj.copy_(source.mlp.experts.down_proj[kept])
    assert relative(fewer(ids).logits, before) < 1e-14
    for layer in model.model.layers:
        layer.mlp.experts.down_proj[removed] = 0
    assert relative(model(ids).logits, after) < 1e-14


def test_one_chosen_expert_with_weight_one_hears_nothing_from_the_loss():
    """Renormalised top-1: the language loss gives its router no gradient, raw weights do."""
    dense, ids = dense_model().double(), tokens(2, 16)
    for renormalise, low, high in ((True, 0, 1e-12), (False, 1e-6, 10)):
        model = routed_model(dense, None, {**MOE, "top_k": 1, "renormalise": renormalise}).eval()
        model(ids, labels=ids).loss.backward()
        norms = [layer.mlp.router.weight.grad.norm().item() for layer in model.model.layers]
        assert all(low <= norm <= high for norm in norms)
