"""A union of experts against golden numbers of an independent numpy loop, and its identities."""

import pytest
import torch
from golden import HIDDEN, TOKENS, attend, attention, close, config, inputs, weight
from transformers import DynamicCache

from moe.model.experts import RoutedMLP
from moe.model.spec import UoEMLP

WIDTH, EXPERTS = 8, 4


def mlp(num_experts: int = EXPERTS, width: int = WIDTH, **spec) -> RoutedMLP:
    """Slices of the golden FFN; its router too."""
    described = {"kind": "uoe", "num_experts": num_experts, **spec}
    made = config(mlp=described, intermediate_size=width)
    layer = RoutedMLP(made, made.mlp_spec(0)).double()
    gate, up, down = weight(4, width, HIDDEN), weight(5, width, HIDDEN), weight(6, HIDDEN, width)
    fill(layer, gate, up, down)
    layer.router.weight.data = weight(7, num_experts, HIDDEN)
    return layer


def fill(layer: RoutedMLP, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    parts = layer.router.spec.num_experts
    slices = [m.view(parts, -1, m.shape[1]) for m in (gate, up)]
    layer.experts.gate_up_proj.data = torch.cat(slices, dim=1)
    layer.experts.down_proj.data = down.view(len(down), parts, -1).transpose(0, 1).contiguous()


def dense(x: torch.Tensor) -> torch.Tensor:
    gate, up, down = weight(4, WIDTH, HIDDEN), weight(5, WIDTH, HIDDEN), weight(6, HIDDEN, WIDTH)
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def chosen(layer: RoutedMLP) -> list[set[int]]:
    mask = layer.router(inputs(), None, None).mask_TE
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize(("weights", "top_k", "expected"), [
    ("hard", 1, 0.424556), ("soft", 1, 0.424556), ("hard", 2, 4.678803),
])  # fmt: skip
def test_the_hand_computed_union(weights, top_k, expected):
    spec = UoEMLP(num_experts=2, top_k=top_k, weights=weights, intermediate_size=2)
    made = config(intermediate_size=4)
    made.hidden_size = 1
    layer = RoutedMLP(made, spec).double()
    gate = torch.tensor([[1.0], [2.0], [-1.0], [0.5]], dtype=torch.float64)
    fill(layer, gate, gate, torch.ones(1, 4, dtype=torch.float64))
    layer.router.weight.data = torch.tensor([[0.3], [0.7]], dtype=torch.float64).log()
    output, _ = layer(torch.ones(1, 1, 1, dtype=torch.float64), None, None)
    close(output.flatten(), [expected])


def test_the_layer_of_two_experts_a_token():
    layer = mlp(top_k=2)
    assert chosen(layer) == [{2, 3}, {0, 3}, {0, 1}, {1, 2}, {1, 3}]
    output, load = layer(inputs(), None, None)
    close(
        output[0, 0],
        [-0.002556, 0.020201, 0.007202, -0.012979, -0.019554, -0.005468, 0.010027, 0.011597],
    )
    close(output[0, 3, :1], [0.307487])
    assert load.counts.tolist() == [2, 3, 2, 3]
    close(dense(inputs())[0, 0, :3], [0.395323, -0.799485, 0.567425])


def test_every_expert_is_the_whole():
    output, _ = mlp(top_k=EXPERTS)(inputs(), None, None)
    torch.testing.assert_close(output, dense(inputs()), atol=1e-14, rtol=0)
    fewer, _ = mlp(top_k=EXPERTS - 1)(inputs(), None, None)  # negative control
    assert (fewer - dense(inputs())).norm() > 0.1


def test_what_is_missing_is_the_sum_of_the_experts_left_out():
    layer, x = mlp(top_k=2), inputs()
    output, _ = layer(x, None, None)
    others = torch.zeros_like(output)
    for token, kept in enumerate(chosen(layer)):
        for expert in set(range(EXPERTS)) - kept:
            inner = layer.experts.gate_up_proj[expert] @ x[0, token]
            gate, up = inner.chunk(2)
            silu = torch.nn.functional.silu(gate) * up
            others[0, token] += layer.experts.down_proj[expert] @ silu
    torch.testing.assert_close(dense(x) - output, others, atol=1e-14, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_soft_weights_are_shares_of_k_and_the_scale_is_linear(scale):
    layer, x = mlp(top_k=2, weights="soft", output_scale=scale), inputs()
    choice = layer.router(x, None, None)
    probability = torch.softmax(x[0] @ layer.router.weight.T, -1) * choice.mask_TE
    expected = 2 * probability / probability.sum(-1, keepdim=True)
    torch.testing.assert_close(choice.weights_TE, expected)
    plain, _ = mlp(top_k=2, weights="soft")(x, None, None)
    torch.testing.assert_close(layer(x, None, None)[0], scale * plain)


def test_a_threshold_takes_what_reaches_an_even_share_and_at_least_one():
    layer, x = mlp(top_k=2, mode="threshold"), inputs()
    probability = torch.softmax(x[0] @ layer.router.weight.T, -1)
    mask = layer.router(x, None, None).mask_TE
    assert torch.equal(mask, probability >= 1 / EXPERTS)
    layer.router.selection_bias -= 1.0  # nothing reaches it now
    mask = layer.router(x, None, None).mask_TE
    assert torch.equal(mask, torch.nn.functional.one_hot(probability.argmax(-1), EXPERTS).bool())
    masked, _ = layer(x, None, None)
    best, _ = mlp(top_k=1)(x, None, None)
    torch.testing.assert_close(masked, best)


def test_expert_choice_gives_each_expert_its_share_of_a_sequence():
    layer, x = mlp(top_k=2, mode="expert_choice"), inputs()
    mask = layer.router(x, None, None).mask_TE
    assert mask.sum(0).tolist() == [3, 3, 3, 3]  # ⌈5 · 2/4⌉
    probability = torch.softmax(x[0] @ layer.router.weight.T, -1)
    for expert in range(EXPERTS):
        best = probability[:, expert].topk(3).indices
        assert mask[best, expert].all()
    padded = torch.tensor([True, True, True, True, False])
    assert layer.router(x, padded, None).mask_TE[:4].sum(0).tolist() == [2, 2, 2, 2]


def test_a_sequence_has_one_set_that_decoding_keeps():
    layer, x, memory = mlp(top_k=2, mode="sequence"), inputs(), {}
    pooled = torch.softmax(x[0, :3].mean(0) @ layer.router.weight.T, -1)
    layer(x[:, :3], None, None, memory)
    assert torch.equal(
        memory["expert_set"][0].nonzero().flatten(), pooled.topk(2).indices.sort()[0]
    )
    alone, _ = mlp(top_k=2, mode="sequence")(x[:, 3:4], None, None)
    kept, _ = layer(x[:, 3:4], None, None, memory)
    assert (kept - alone).norm() > 1e-3, "this token alone would have chosen the same"


SMHA_1 = [-0.022656, 0.898174, 0.042307, -0.010914, -0.107212, -0.594267, 0.024071, 0.051562]
SMHA_4 = [-0.151172, -0.321288, 0.237671, 0.869831, -0.026957, -0.406315, -0.007170, 0.566185]
paths = pytest.mark.parametrize("path", ["naive", "compact"])


def heads(path: str, monkeypatch, top_k: int = 1, **spec):
    monkeypatch.setenv("MOE_KERNELS", "naive" if path == "naive" else "cpu")
    layer = attention(kind="uoe", num_experts=2, top_k=top_k, **spec)
    layer.router.weight.data = weight(8, 2, HIDDEN)
    return layer


@paths
def test_the_attention_of_one_group_a_token(path, monkeypatch):
    layer = heads(path, monkeypatch)
    mask = layer.router(inputs(), None, None, forced_T=torch.arange(TOKENS) < 1).mask_TE
    assert mask.tolist() == [[True, True], [True, False], [True, False], [True, False],
                             [False, True]]  # fmt: skip
    output, load = attend(layer)
    whole, _ = attend(attention())
    torch.testing.assert_close(output[0], whole[0])
    close(output[1], SMHA_1)
    close(output[4], SMHA_4)
    assert load.tokens == TOKENS


@paths
def test_every_group_is_the_dense_attention(path, monkeypatch):
    output, _ = attend(heads(path, monkeypatch, top_k=2))
    plain = attention()
    plain.config._attn_implementation = "sdpa"  # eager attention's softmax is in float32
    whole, _ = attend(plain)
    torch.testing.assert_close(output, whole, atol=1e-14, rtol=0)
    fewer, _ = attend(heads(path, monkeypatch, sink_tokens=0))  # negative control
    assert (fewer - whole).norm() > 0.1


@paths
@pytest.mark.parametrize("chunks", [[1] * 5, [3, 2], [2, 1, 2]])
def test_any_cut_of_the_prompt_gives_the_same(path, chunks, monkeypatch):
    layer, cache, start = heads(path, monkeypatch), DynamicCache(), 0
    pieces = []
    for length in chunks:
        pieces.append(attend(layer, cache, slice(start, start + length))[0])
        start += length
    torch.testing.assert_close(torch.cat(pieces), attend(layer)[0], atol=1e-14, rtol=0)


def test_dropped_keys_split_the_dense_softmax(monkeypatch):
    """H_dense = (1 - ρ) H_selected + ρ H_dropped, ρ the dense softmax's mass on what is dropped."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    values = torch.randn(TOKENS, 3, generator=generator, dtype=torch.float64)
    kept = torch.tensor([True, False, True, True, False])
    a = scores.softmax(0)
    selected = scores[kept].softmax(0) @ values[kept]
    dropped = scores[~kept].softmax(0) @ values[~kept]
    rho = a[~kept].sum()
    torch.testing.assert_close(a @ values, (1 - rho) * selected + rho * dropped)
    bound = 2 * rho * values.norm(dim=1).max()
    assert (a @ values - selected).norm() <= bound
