"""A union of experts against golden numbers of an independent numpy loop, and its identities."""

import itertools

import pytest
import torch
from golden import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    TOKENS,
    attend,
    attention,
    close,
    config,
    inputs,
    weight,
)
from transformers import DynamicCache

from moe.model.experts import RoutedMLP
from moe.model.llama import LlamaRotaryEmbedding
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


def shares(probability: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Soft weights as specified: as many times its share as a token has experts, one by one."""
    weights = torch.zeros_like(probability)
    for token, row in enumerate(mask):
        found = row.nonzero().flatten().tolist()
        total = sum(probability[token, e] for e in found)
        for expert in found:
            weights[token, expert] = len(found) * probability[token, expert] / total
    return weights


def test_soft_weights_count_the_experts_a_token_has():
    """Not the k of the specification: a threshold gives 1 to E of them, a sink is given all."""
    layer, x = mlp(top_k=2, mode="threshold", weights="soft"), inputs()
    layer.router.selection_bias += torch.tensor([0.2, 0.0, -0.2, 0.1])
    choice = layer.router(x, None, None)
    probability = torch.softmax(x[0] @ layer.router.weight.T, -1)
    assert len(set(choice.mask_TE.sum(-1).tolist()) - {2}) > 1
    torch.testing.assert_close(choice.weights_TE, shares(probability, choice.mask_TE))
    forced = mlp(top_k=1, weights="soft").router(x, None, None, forced_T=torch.arange(TOKENS) < 2)
    assert forced.mask_TE.sum(-1).tolist() == [4, 4, 1, 1, 1]
    torch.testing.assert_close(forced.weights_TE, shares(probability, forced.mask_TE))
    # negative control: what k of them would be
    assert (forced.weights_TE.sum(-1) - 1).abs().max() > 2


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


def test_padding_has_no_say_in_the_set_of_a_sequence():
    layer, x = mlp(top_k=1, mode="sequence"), inputs()
    valid = torch.tensor([False, False, True, True, True])
    alone = layer.router(x[:, 2:], None, None).set_BE
    towards = 50 * torch.linalg.pinv(layer.router.weight.detach()).T  # states of one expert each
    for expert in range(EXPERTS):
        noisy = torch.cat([towards[expert].expand(1, 2, -1), x[:, 2:]], 1)
        assert torch.equal(layer.router(noisy, valid, None).set_BE, alone)
        tipped = layer.router(noisy, None, None).set_BE  # negative control
        assert tipped[0].nonzero().tolist() == [[expert]]


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


@paths
def test_dropped_keys_split_the_dense_softmax(path, monkeypatch):
    """H_dense = (1 - ρ) H_selected + ρ H_dropped, ρ the dense softmax's mass on what is dropped.

    All three by the model's own layer, head by head, at the last token: group 1 has dropped three
    keys there, group 0 has dropped the token.
    """
    eager, x, last = attention(), inputs(), TOKENS - 1
    causal = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    positions = LlamaRotaryEmbedding(eager.config)(x, torch.arange(TOKENS)[None])
    mass = eager(x, positions, causal)[1][0, :, last, 1:last].sum(-1)
    unseen = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    unseen[..., last, [0, last]] = False  # what group 1 selected
    union, every = heads(path, monkeypatch), heads(path, monkeypatch, top_k=2)
    for head in range(HEADS):
        for layer, index in itertools.product((union, every), range(HEADS)):
            columns = slice(index * HEAD_DIM, (index + 1) * HEAD_DIM)
            whole = weight(3, HIDDEN, HEADS * HEAD_DIM)[:, columns]
            layer.o_proj.weight.data[:, columns] = whole * (index == head)
        dense, selected = attend(every)[0][last], attend(union)[0][last]
        if head < HEADS // 2:
            assert dense.norm() > 0.01 and selected.norm() == 0
            continue
        dropped = every(x, positions, unseen, places_BS=torch.arange(TOKENS)[None])[0][0, last]
        rho = mass[head]
        assert 0.05 < rho < 0.95
        torch.testing.assert_close(dense, (1 - rho) * selected + rho * dropped, atol=1e-6, rtol=0)
        column = weight(3, HIDDEN, HEADS * HEAD_DIM)[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        largest = eager.v_proj(x)[0].unflatten(-1, (GROUPS, HEAD_DIM))[:, 1].norm(dim=-1).max()
        bound = 2 * rho * largest * torch.linalg.matrix_norm(column, 2)
        assert (dense - selected).norm() <= bound
        other = mass[head - 1]  # negative control
        assert (dense - (1 - other) * selected - other * dropped).norm() > 1e-3
