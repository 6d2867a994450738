"""transformers' own mixtures with experts_implementation="moe" against their own experts."""

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe.errors import UserError
from moe.model import foreign

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig,
                  {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4}),
}  # fmt: skip
SILU = ("mixtral", "qwen3_moe", "olmoe")
RUNS = [*((m, b) for m in SILU for b in ("", "cpu", "grouped_mm", "triton")),
        ("gpt_oss", "naive"), ("gpt_oss", "triton")]  # fmt: skip


def build(name: str, implementation: str):
    torch.manual_seed(0)
    model_class, config_class, own = MODELS[name]
    config = config_class(**SIZES, **own, experts_implementation=implementation)
    model = model_class._from_config(config, experts_implementation=implementation)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.train()


def results(model) -> dict[str, torch.Tensor]:
    ids = torch.arange(60).view(2, 30) % 64
    output = model(ids, labels=ids)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_logits_and_every_gradient_are_those_of_their_own_experts(name, backend, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", backend)
    expected = results(build(name, "eager"))
    model = build(name, "moe")
    called = []
    run = foreign.ops.routed_mlp
    monkeypatch.setattr(foreign.ops, "routed_mlp", lambda *a, **k: called.append(1) or run(*a, **k))
    actual = results(model)
    assert len(called) == 2, "not through our kernels"
    for key, value in expected.items():
        error = (actual[key] - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 2e-5, f"{key}: {error:.1e}"


def test_experts_of_other_ranks_add_nothing():
    experts = build("mixtral", "moe").model.layers[0].mlp.experts
    x, indices = torch.randn(5, 32), torch.tensor([[0, 4], [4, 9], [1, 2], [3, 4], [4, 4]])
    weights = torch.rand(5, 2)
    found = foreign.run_experts(experts, x, indices, weights)
    alone = foreign.run_experts(experts, x, indices.clamp(max=3), weights * (indices < 4))
    torch.testing.assert_close(found, alone)
    assert found[1].abs().sum() == 0 and found[2].abs().sum() > 0


def test_generation_is_the_same(monkeypatch):
    ids = torch.tensor([[3, 9, 27]])
    made = [
        build("qwen3_moe", how).eval().generate(ids, max_new_tokens=8, do_sample=False)
        for how in ("eager", "moe")
    ]
    assert torch.equal(*made)


def test_what_the_kernels_do_not_have_is_refused():
    model = build("mixtral", "moe")
    experts = model.model.layers[0].mlp.experts
    experts.act_fn = torch.nn.GELU()
    with pytest.raises(UserError, match="neither SiLU"):
        model(torch.tensor([[1, 2]]))
    experts = build("olmoe", "moe").model.layers[0].mlp.experts
    experts.has_gate = False
    with pytest.raises(UserError, match="without a gate"):
        foreign.layout_of(experts)


def test_gpt_oss_on_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS", raising=False)
    with pytest.raises(ValueError, match="use naive or triton"):
        results(build("gpt_oss", "moe"))
