"""BAM: the identities of one wide attention, and of the block it lives in."""

import pytest
import torch
from tiny import MOE, copy_experts, dense_model, routed_model, tokens

from moe.model.cache import CACHE

KV = ("expert", "shared")
EXPERTS = 3


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def wide_rows(matrices: list[torch.Tensor], groups: int, kv: str) -> torch.Tensor:
    """Rows of query heads of all experts in the order of the wide attention."""
    if kv == "expert":
        return torch.cat(matrices)
    per_group = [m.unflatten(0, (groups, -1)) for m in matrices]
    return torch.cat([m.unsqueeze(1) for m in per_group], dim=1).flatten(0, 2)


def mixture(sources: list, kv: str, mlp=None, **overrides):
    """A BAM model from dense ones, put together by hand."""
    first = sources[0]
    spec = {"kind": "bam", "num_experts": len(sources), "kv": kv}
    model = routed_model(first, spec, mlp, **overrides)
    for index, layer in enumerate(model.model.layers):
        experts = [s.model.layers[index].self_attn for s in sources]
        own, groups = layer.self_attn, first.config.num_key_value_heads
        q = [e.q_proj.weight for e in experts]
        own.q_proj.weight.data = wide_rows(q, groups, kv)
        o = [e.o_proj.weight.T for e in experts]
        own.o_proj.weight.data = wide_rows(o, groups, kv).T.contiguous()
        for name in ("k_proj", "v_proj"):
            each = torch.stack([getattr(e, name).weight for e in experts])
            getattr(own, name).weight.data = each.flatten(0, 1) if kv == "expert" else each.mean(0)
    return model


@pytest.fixture
def sources():
    return [dense_model(seed=s).double() for s in range(EXPERTS)]


@pytest.mark.parametrize("kv", KV)
@torch.no_grad()
def test_one_wide_attention_is_the_gated_sum_of_the_experts(kv, sources):
    """Σ_e g_e · O_e attention_e(x), the loop that the model does not run."""
    model = mixture(sources, kv)
    x = torch.randn(2, 12, 72, dtype=torch.float64)
    embeddings = model.model.rotary_emb(x, torch.arange(12)[None])
    own = model.model.layers[0].self_attn
    gate = torch.softmax(x @ own.router.weight.T, -1)
    expected = torch.zeros_like(x)
    experts = [s.model.layers[0].self_attn for s in sources]
    for name in ("k_proj", "v_proj") if kv == "shared" else ():
        mean = torch.stack([getattr(e, name).weight for e in experts]).mean(0)
        for expert in experts:
            getattr(expert, name).weight.data = mean
    for index, attention in enumerate(experts):
        expected += gate[..., index : index + 1] * attention(x, embeddings, None)[0]
    actual = own(x, embeddings)[0]
    assert relative(actual, expected) < 1e-14
    own.router.weight.neg_()  # negative control
    assert relative(own(x, embeddings)[0], expected) > 0.01


@pytest.mark.parametrize("kv", KV)
@torch.no_grad()
def test_identical_experts_are_their_source(kv):
    dense, ids = dense_model().double(), tokens(2, 20)
    model = mixture([dense] * EXPERTS, kv, MOE)
    copy_experts(model, dense)
    assert relative(model(ids).logits, dense(ids).logits) < 1e-13
    model.model.layers[1].self_attn.o_proj.weight[:, :4] *= 1.02  # negative control
    assert relative(model(ids).logits, dense(ids).logits) > 1e-5


@torch.no_grad()
def test_even_gates_are_not_the_mean_attention():
    """So `btx`, which averages, and BAM with a zero router are different models."""
    jitter = []
    for seed in range(EXPERTS):
        source = dense_model().double()
        torch.manual_seed(seed)
        for parameter in source.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        jitter.append(source)
    soft = mixture(jitter, "expert")
    for layer in soft.model.layers:
        layer.self_attn.router.weight.zero_()
    x = torch.randn(1, 12, 72, dtype=torch.float64)
    embeddings = soft.model.rotary_emb(x, torch.arange(12)[None])
    mean = jitter[0].model.layers[0].self_attn
    for name, parameter in mean.named_parameters():
        each = [s.model.layers[0].self_attn.get_parameter(name) for s in jitter]
        parameter.copy_(torch.stack([e.clone() for e in each]).mean(0))
    soft_attention = soft.model.layers[0].self_attn
    difference = relative(soft_attention(x, embeddings)[0], mean(x, embeddings, None)[0])
    assert 1e-4 < difference < 0.5


@torch.no_grad()
def test_a_parallel_block_is_one_norm_and_one_sum():
    dense, ids = dense_model().double(), tokens(2, 12)
    model = routed_model(dense, None, None, block="parallel")
    assert not any("post_attention" in n for n, _ in model.named_parameters())
    layer = model.model.layers[0]
    x = torch.randn(1, 12, 72, dtype=torch.float64)
    embeddings = model.model.rotary_emb(x, torch.arange(12)[None])
    normed = layer.input_layernorm(x)
    expected = x + layer.self_attn(normed, embeddings)[0] + layer.mlp(normed)
    torch.testing.assert_close(layer(x, position_embeddings=embeddings)[0], expected)
    # never the sequential model's function
    assert relative(model(ids).logits, dense(ids).logits) > 0.1


@pytest.mark.parametrize("kv", KV)
@torch.no_grad()
def test_decoding_caches_what_the_kind_of_keys_says(kv):
    model, ids = mixture([dense_model(seed=s) for s in range(2)], kv), tokens(1, 8)
    cache = model(ids, use_cache=True)[CACHE]
    keys = cache.layers[0].keys
    assert keys.shape[1] == (6 if kv == "expert" else 3)
