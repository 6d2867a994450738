"""`moe import` of transformers' own mixtures, made by transformers, in every layout it writes."""

import json

import pytest
import torch
from invoke import moe
from native_folders import difference, load
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, MOE, dense_model, routed_model, tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from moe.hf import layouts

SIZES = {
    "hidden_size": 72,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24}
GRANITE = {"num_local_experts": 4, "attention_multiplier": 8**-0.5}

CASES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "sliding_window": 7}),
    "mixtral, head size of its own": (MixtralConfig, {"head_dim": 12, "tie_word_embeddings": True}),
    "granitemoe": (GraniteMoeConfig, {**GRANITE, "attention_bias": True}),
    "granitemoeshared": (GraniteMoeSharedConfig, {**GRANITE, "shared_intermediate_size": 24}),
    "granitemoeshared without": (GraniteMoeSharedConfig, {**GRANITE, "num_experts_per_tok": 3}),
    "qwen2_moe": (Qwen2MoeConfig, QWEN),
    "qwen2_moe, every second layer": (
        Qwen2MoeConfig, {**QWEN, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen2_moe, some layers dense and some sliding": (
        Qwen2MoeConfig,
        {**QWEN, "mlp_only_layers": [0], "qkv_bias": False, "use_sliding_window": True,
         "sliding_window": 6, "rope_parameters": LLAMA3_ROPE}),
}  # fmt: skip


def write(folder, case, original_names=True, gate=0.0):
    """Save a mixture with O(1) weights; the gates of shared experts are `gate`."""
    config_class, fields = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **fields})).eval()
    for name, parameter in model.named_parameters():
        if "shared_expert_gate" in name:
            parameter.data.fill_(gate)
        elif "bias" in name or "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        elif "embed" not in name:
            parameter.data.mul_(8)
    model.save_pretrained(folder, save_original_format=original_names)
    return model


def change(folder, tensors=None, drop=(), **fields):
    """Damage a folder: tensors added or replaced, others left out, config fields set."""
    stored = {**load_file(folder / "model.safetensors"), **(tensors or {})}
    kept = {name: tensor for name, tensor in stored.items() if name not in drop}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(code, folder):
    result = moe("import", folder, "--out", folder.parent / "out")
    assert result.code == code, result
    assert not list(folder.parent.glob("out*"))
    return result.err


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_mixture_of_transformers_becomes_a_routed_llama(case, original_names, tmp_path):
    original = write(tmp_path / "native", case, original_names)
    result = moe("import", tmp_path / "native", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    loaded = load(tmp_path / "out")
    assert loaded.config.model_type == "routed_llama"
    assert loaded.config.eos_token_id == [2, 5]
    assert difference(loaded, original) <= 1e-5
    assert moe("verify", tmp_path / "out").code == 0
    layers = json.loads(moe("inspect", tmp_path / "out", "--json").out)["layers"]
    kinds = [layer["mlp"]["kind"] for layer in layers]
    dense = {"qwen2_moe, every second layer": {0, 2},
             "qwen2_moe, some layers dense and some sliding": {0}}.get(case, set())  # fmt: skip
    assert kinds == ["dense" if i in dense else "moe" for i in range(3)]


def test_two_matrices_in_each_others_place_would_be_noticed(tmp_path, monkeypatch):
    """Negative control of the test above."""
    first, second, third = layouts.EXPERTS["mixtral"]
    monkeypatch.setitem(layouts.EXPERTS, "mixtral", [second, first, third])
    original = write(tmp_path / "native", "mixtral")
    assert moe("import", tmp_path / "native", "--out", tmp_path / "out").code == 0
    assert difference(load(tmp_path / "out"), original) > 1e-2


def test_a_shared_expert_at_half_weight_is_halved(tmp_path, monkeypatch):
    """Negative control: taken over as it is, it would count twice."""
    monkeypatch.setattr(layouts, "SHARED_GATE", 1.0)
    original = write(tmp_path / "native", "qwen2_moe")
    assert moe("import", tmp_path / "native", "--out", tmp_path / "out").code == 0
    assert difference(load(tmp_path / "out"), original) > 1e-2


def test_the_dtype_is_the_folders_or_the_one_asked_for(tmp_path):
    write(tmp_path / "native", "qwen2_moe")
    for dtype in ("float32", "bfloat16"):
        options = ("--dtype", dtype) if dtype == "bfloat16" else ()
        out = tmp_path / dtype
        assert moe("import", tmp_path / "native", "--out", out, *options).code == 0
        tensors = load_file(out / "model.safetensors").values()
        assert {t.dtype for t in tensors} == {getattr(torch, dtype)}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_config_fields_are_mapped_back(tmp_path):
    write(tmp_path / "native", "qwen2_moe, some layers dense and some sliding")
    assert moe("import", tmp_path / "native", "--out", tmp_path / "out").code == 0
    config = load(tmp_path / "out").config
    spec = config.mlp_spec(2)
    assert (spec.num_experts, spec.top_k, spec.intermediate_size) == (4, 2, 20)
    assert not spec.renormalise and spec.shared_intermediate_size == 24
    assert spec.balance_coef == 0.002  # twice theirs: it sums a token's two shares
    assert config.rope_parameters["rope_type"] == "llama3" and config.head_dim == 8
    assert config.sliding_window == 6 and set(config.layer_types) == {
        "full_attention", "sliding_attention"
    }  # fmt: skip
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["architectures"] == ["RoutedLlamaForCausalLM"]
    assert fields["rope_theta"] == 5e5 and "num_experts" not in fields


def test_a_gate_that_depends_on_the_token_is_named(tmp_path):
    write(tmp_path / "native", "qwen2_moe", gate=0.1)
    message = refused(2, tmp_path / "native")
    assert "layers.0.mlp.shared_expert_gate.weight is not zero" in message
    assert "moe export --to qwen2_moe" in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"residual_multiplier": 0.22}, ["residual_multiplier=0.22"]),
        ({"attention_multiplier": 0.5, "logits_scaling": 6.0, "embedding_multiplier": 12.0},
         ["attention_multiplier=0.5", "logits_scaling=6.0", "embedding_multiplier=12.0"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["dequantised"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ],
)  # fmt: skip
def test_what_a_routed_llama_does_not_do_is_named_at_once(fields, said, tmp_path):
    write(tmp_path / "native", "granitemoe")
    change(tmp_path / "native", **fields)
    message = refused(2, tmp_path / "native")
    assert all(part in message for part in (*said, str(tmp_path / "native"))), message


def test_damaged_folders_are_refused(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    write(tmp_path / "native", "mixtral")
    sound = load_file(tmp_path / "native/model.safetensors")[name]
    change(tmp_path / "native", drop=[name])
    assert f"{name} is missing" in refused(3, tmp_path / "native")
    change(tmp_path / "native", {name: sound[:-1].clone()})
    assert f"{name} is (63, 72), the config says (64, 72)" in refused(3, tmp_path / "native")
    change(tmp_path / "native", {name: sound, "model.layers.1.mlp.extra": torch.ones(3)})
    assert "model.layers.1.mlp.extra has no place" in refused(2, tmp_path / "native")


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_the_tokenizer_stays_of_its_class(case, tmp_path):
    write(tmp_path / "native", case)
    tokenizer().save_pretrained(tmp_path / "native")
    change_class = json.loads((tmp_path / "native/tokenizer_config.json").read_text())
    change_class.pop("tokenizer_class")
    (tmp_path / "native/tokenizer_config.json").write_text(json.dumps(change_class))
    assert moe("import", tmp_path / "native", "--out", tmp_path / "out").code == 0
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / f) for f in ("native", "out"))
    assert type(ours) is type(theirs) and ours("a b")["input_ids"] == theirs("a b")["input_ids"]


def test_the_history_comes_along(tmp_path):
    routed_model(dense_model(), None, MOE).save_pretrained(tmp_path / "routed")
    out = tmp_path / "native"
    assert moe("export", tmp_path / "routed", "--to", "granitemoe", "--out", out).code == 0
    assert moe("import", out, "--out", tmp_path / "back").code == 0
    steps = json.loads((tmp_path / "back/receipt.json").read_text())["steps"]
    assert [step["recipe"] for step in steps] == ["export", "import"]
