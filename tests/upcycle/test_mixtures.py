"""`moe upcycle btx` and `bam`: several models of one shape become one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe.upcycle.receipt import Receipt

KV = pytest.mark.parametrize("kv", ["expert", "shared"])


def sources(folders: list[Path]) -> list[object]:
    return [word for folder in folders for word in ("--source", folder)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("recipe", [("btx",), ("bam",), ("bam", "--kv", "shared")], ids=str)
def test_a_model_mixed_with_itself_is_proved_the_same(
    recipe, family, branches, moe_upcycle, tmp_path
):
    same = sources(branches(family)[:1] * 3)
    result = moe_upcycle(*recipe, *same, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    record = Receipt.read(tmp_path / "out").verification
    assert record["status"] == "pass" and record["relative_difference"] < 1e-5
    assert record["decoding"]["relative_difference"] < 1e-5
    assert len(Receipt.read(tmp_path / "out").steps[0]["sources"]) == 3


def test_raw_weights_do_not_preserve_and_nothing_is_claimed(branches, moe_upcycle, tmp_path):
    """Negative control of the test above, and the paper's own choice."""
    same = sources(branches("llama")[:1] * 3)
    options = ("--ffn-weights", "raw", "--top-k", "1")
    result = moe_upcycle("bam", *same, *options, "--out", tmp_path / "out")
    assert result.code == 0 and "raw" in result.err
    record = Receipt.read(tmp_path / "out").verification
    assert record["status"] == "measured" and record["relative_difference"] > 0.1


@KV
def test_everything_goes_where_the_paper_puts_it(kv, branches, moe_upcycle, weights, tmp_path):
    folders = branches("llama")
    out = tmp_path / "out"
    result = moe_upcycle("bam", *sources(folders), "--kv", kv, "--out", out, "--no-verify")
    assert result.code == 0, result.err
    parents, own = [weights(f) for f in folders], weights(out)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        mean = torch.stack([p[name] for p in parents]).double().mean(0)
        torch.testing.assert_close(own[name].double(), mean, rtol=1e-6, atol=1e-6)
    for expert, parent in enumerate(parents):
        gate = parent["model.layers.1.mlp.gate_proj.weight"]
        up = parent["model.layers.1.mlp.up_proj.weight"]
        experts = own["model.layers.1.mlp.experts.gate_up_proj"]
        assert torch.equal(experts[expert], torch.cat([gate, up]))
    keys = own["model.layers.1.self_attn.k_proj.weight"]
    each = torch.stack([p["model.layers.1.self_attn.k_proj.weight"] for p in parents])
    if kv == "expert":
        assert torch.equal(keys, each.flatten(0, 1))
    else:
        torch.testing.assert_close(keys.double(), each.double().mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@KV
@torch.no_grad()
def test_the_attention_is_the_gated_sum_of_the_branches(
    kv, family, branches, moe_upcycle, tmp_path
):
    """Biases and head norms included; with shared keys, over keys and values averaged."""
    folders = branches(family)
    result = moe_upcycle(
        "bam", *sources(folders), "--kv", kv, "--out", tmp_path / "out", "--no-verify"
    )
    assert result.code == 0, result.err
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double().model.layers[2].self_attn
    models = [AutoModelForCausalLM.from_pretrained(f).double().model for f in folders]
    parts = [m.layers[2].self_attn for m in models]
    if kv == "shared":
        for name, _ in parts[0].named_parameters():
            if name.startswith(("k_", "v_")):
                mean = torch.stack([p.get_parameter(name) for p in parts]).mean(0)
                for part in parts:
                    part.get_parameter(name).copy_(mean)
    x = torch.randn(1, 10, 72, dtype=torch.float64)
    embeddings = models[0].rotary_emb(x, torch.arange(10)[None])
    gate = torch.softmax(x @ own.router.weight.T, -1)
    expected = sum(gate[..., [i]] * part(x, embeddings, None)[0] for i, part in enumerate(parts))
    assert relative(own(x, embeddings)[0], expected) < 1e-6
    shuffled = sum(gate[..., [i]] * p(x, embeddings, None)[0] for i, p in enumerate(parts[::-1]))
    assert relative(own(x, embeddings)[0], shuffled) > 1e-4  # negative control


def test_each_sources_perplexity_is_measured(branches, moe_upcycle, tmp_path):
    folders = branches("llama")
    result = moe_upcycle("btx", *sources(folders), "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert all(f"perplexity of {f}" in result.out for f in folders[1:])


def test_a_parallel_block_is_refused_and_then_measured(branches, moe_upcycle, tmp_path):
    same = sources(branches("llama")[:1] * 2)
    result = moe_upcycle("bam", *same, "--block", "parallel", "--out", tmp_path / "out")
    assert result.code == 2 and "--convert-block" in result.err
    result = moe_upcycle("bam", *same, "--convert-block", "--out", tmp_path / "out")
    assert result.code == 2 and "nothing is converted" in result.err
    options = ("--block", "parallel", "--convert-block")
    result = moe_upcycle("bam", *same, *options, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "perplexity: parent" in result.out and "does not preserve" in result.out
    assert Receipt.read(tmp_path / "out").verification["relative_difference"] > 0.1
    # a parallel seed stays parallel, exactly
    again = sources([tmp_path / "out"] * 2)
    assert "already has bam attention" in moe_upcycle("bam", *again, "--out", tmp_path / "b").err


@torch.no_grad()
def test_parallel_seeds_are_mixed_as_they_are(moe_upcycle, tmp_path):
    seed = tiny.routed_model(tiny.dense_model(), block="parallel")
    seed.save_pretrained(tmp_path / "seed")
    tiny.tokenizer().save_pretrained(tmp_path / "seed")
    same = sources([tmp_path / "seed"] * 2)
    result = moe_upcycle("bam", *same, "--out", tmp_path / "out")
    assert result.code == 0 and "preserved" in result.out, result.err
    result = moe_upcycle("bam", *same, "--block", "sequential", "--out", tmp_path / "b")
    assert result.code == 2 and "stay so" in result.err


def test_the_norm_that_is_lost_goes_into_the_columns(branches, moe_upcycle, weights, tmp_path):
    folder = branches("llama")[0]
    options = ("--block", "parallel", "--convert-block", "--no-verify")
    out = tmp_path / "out"
    assert moe_upcycle("bam", *sources([folder] * 2), *options, "--out", out).code == 0
    parent, own = weights(folder), weights(out)
    at = "model.layers.0"
    ratio = parent[f"{at}.post_attention_layernorm.weight"] / parent[f"{at}.input_layernorm.weight"]
    expected = parent[f"{at}.mlp.gate_proj.weight"] * ratio
    torch.testing.assert_close(own[f"{at}.mlp.experts.gate_up_proj"][0, :64], expected)


def altered(folder: Path, copy: Path, **fields) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **fields}))
    return copy


def test_models_that_do_not_go_together_are_told_apart(branches, moe_upcycle, tmp_path):
    first, second, _ = branches("llama")
    out = ("--out", tmp_path / "out")
    assert "several models" in moe_upcycle("bam", *sources([first]), *out).err
    assert "several models" in moe_upcycle("btx", *sources([first]), *out).err
    rope = {"rope_type": "default", "rope_theta": 777.0}
    odd = altered(second, tmp_path / "odd", rope_parameters=rope, rms_norm_eps=0.5)
    result = moe_upcycle("bam", *sources([first, odd]), *out, "--top-k", "3")
    assert result.code == 2
    for part in ("rms_norm_eps is 1e-06", "0.5", "rope_parameters", "777.0", "--top-k 3"):
        assert part in result.err
    other = moe_upcycle("btx", *sources([first, branches("qwen2")[0]]), *out)
    assert other.code == 2 and "attention_bias" in other.err
    strange = altered(second, tmp_path / "strange")
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = moe_upcycle("btx", *sources([first, strange]), *out)
    assert result.code == 2 and "the tokenizers differ" in result.err
    first_id, second_id = vocabulary["b"], vocabulary["a"]
    assert f"'a' is {first_id} in the one and {second_id} in the other" in result.err
    half = altered(second, tmp_path / "half")
    tensors = {n: t.half() for n, t in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    result = moe_upcycle("btx", *sources([first, half]), *out)
    assert result.code == 2 and "float16" in result.err and "--dtype" in result.err
    assert not list(tmp_path.glob("out*"))
    for order in ([first, half], [half, first]):
        for recipe in ("btx", "bam"):
            target = tmp_path / f"{recipe}-{order[0].name}"
            result = moe_upcycle(recipe, *sources(order), "--out", target, "--dtype", "float32",
                                 "--no-verify")  # fmt: skip
            assert result.code == 0, result.err
            name = "model.layers.0.mlp.experts.down_proj"
            made = load_file(target / "model.safetensors")[name]
            for expert, folder in enumerate(order):
                down = load_file(folder / "model.safetensors")[
                    "model.layers.0.mlp.down_proj.weight"
                ]
                assert torch.equal(made[expert], down.float())


@pytest.mark.parametrize(("field", "value"), [
    ("vocab_size", 98), ("tie_word_embeddings", False), ("max_position_embeddings", 1024),
    ("intermediate_size", 60), ("hidden_act", "gelu"),
])  # fmt: skip
def test_sources_agree_in_every_field_that_a_mixture_has_once(
    field, value, branches, moe_upcycle, tmp_path
):
    """Named with both values; what has no say in a model may differ (negative control)."""
    first, second, _ = branches("llama")
    ours = json.loads((first / "config.json").read_text())[field]
    assert ours != value
    odd = altered(second, tmp_path / "odd", **{field: value})
    fine = altered(second, tmp_path / "fine", eos_token_id=3, use_cache=False)
    out = ("--out", tmp_path / "out", "--dry-run")
    for recipe in ("btx", "bam"):
        result = moe_upcycle(recipe, *sources([first, odd]), *out)
        assert result.code == 2 and not (tmp_path / "out").exists()
        assert f"{field} is {ours!r} in {first} and {value!r} in {odd}" in result.err
        assert moe_upcycle(recipe, *sources([first, fine]), *out).code == 0


def test_some_layers_only(branches, moe_upcycle, weights, tmp_path):
    folders = branches("llama")
    out = tmp_path / "out"
    result = moe_upcycle("bam", *sources(folders), "--layers", "1", "--out", out, "--no-verify")
    assert result.code == 0, result.err
    own, parents = weights(out), [weights(f) for f in folders]
    name = "model.layers.0.mlp.up_proj.weight"
    mean = torch.stack([p[name] for p in parents]).double().mean(0)
    torch.testing.assert_close(own[name].double(), mean, rtol=1e-6, atol=1e-6)
    assert "model.layers.1.mlp.experts.down_proj" in own
    assert own["model.layers.1.self_attn.q_proj.weight"].shape[0] == 3 * 72
