"""`moe upcycle` as users call it: verification, claims, reports and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from moe.errors import Corrupt, UserError
from moe.upcycle import run
from moe.upcycle.receipt import Receipt
from moe.upcycle.recipes import Copy, MoH, convert
from moe.upcycle.source import Source

ROOT = Path(__file__).resolve().parents[2]
COPY = ("--num-experts", "4", "--top-k", "2")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copy_is_proved_exact_for_every_family(family, dense, moe_upcycle, tmp_path):
    out = tmp_path / "out"
    result = moe_upcycle("copy", "--source", dense(family), "--out", out, *COPY)
    assert result.code == 0, result.err
    assert "preserved" in result.out
    record = Receipt.read(out).verification
    assert record["status"] == "pass" and record["relative_difference"] < 1e-5
    assert record["argmax_agreement"] == 1
    assert record["decoding"]["relative_difference"] < 1e-5
    assert len(record["loads"]) == 3 and all(g["own"] > 0 for g in record["gradients"])


@pytest.mark.parametrize(
    "options",
    [
        ("--shared-heads", 4, "--top-k", 5),
        ("--router", "two_stage", "--shared-heads", 4, "--top-k", 5),
        ("--router", "two_stage", "--shared-heads", 0, "--top-k", 9),
        ("--granularity", "kv_group", "--shared-heads", 1, "--top-k", 2),
    ],
)
def test_moh_with_every_head_on_is_exact(options, dense, moe_upcycle, tmp_path):
    result = moe_upcycle("moh", "--source", dense("llama"), "--out", tmp_path / "out", *options)
    assert result.code == 0, result.err
    record = Receipt.read(tmp_path / "out").verification
    assert record["status"] == "pass"
    if "two_stage" not in options:
        assert record["maximum_difference"] == 0


@pytest.mark.parametrize("router", ["qnorm", "two_stage"])
def test_moh_with_heads_off_states_the_difference_and_claims_nothing(
    router, dense, moe_upcycle, tmp_path
):
    out = tmp_path / "out"
    result = moe_upcycle("moh", "--source", dense("llama"), "--out", out, "--router", router)
    assert result.code == 0, result.err
    record = Receipt.read(out).verification
    assert record["status"] == "measured" and "bound" not in record
    assert record["relative_difference"] > 1e-3
    assert "nothing claimed" in result.out and "7 of 9 heads" in result.out
    assert all(g["language"] > 0 for g in record["gradients"])


@pytest.mark.parametrize("diversify", ["noise:0.05", "drop:0.5"])
def test_diversified_copies_are_measured(diversify, dense, moe_upcycle, tmp_path):
    out = tmp_path / "out"
    arguments = ("--source", dense("llama"), "--out", out, *COPY, "--diversify", diversify)
    result = moe_upcycle("copy", *arguments)
    assert result.code == 0, result.err
    record = Receipt.read(out).verification
    assert record["status"] == "measured" and record["relative_difference"] > 1e-3
    assert any(g["language"] > 1e-6 for g in record["gradients"])


def test_a_narrower_dtype_is_measured_not_claimed(dense, moe_upcycle, tmp_path):
    """Rounding to bfloat16 is no failure of the method, and no exact copy either."""
    out = tmp_path / "out"
    arguments = ("--source", dense("llama"), "--out", out, *COPY, "--dtype", "bfloat16")
    result = moe_upcycle("copy", *arguments)
    assert result.code == 0, result.err
    receipt = Receipt.read(out)
    assert receipt.verification["status"] == "measured"
    assert "bfloat16" in receipt.steps[0]["statement"]


def test_the_whole_chain_is_proved_and_recorded(dense, moe_upcycle, tmp_path):
    heads, both = tmp_path / "heads", tmp_path / "both"
    assert moe_upcycle("moh", "--source", dense("llama"), "--out", heads).code == 0
    assert moe_upcycle("copy", "--source", heads, "--out", both, *COPY).code == 0
    receipt = Receipt.read(both)
    assert [s["recipe"] for s in receipt.steps] == ["moh", "copy"]
    assert receipt.verification["status"] == "pass"  # against the MoH model
    for step in receipt.steps:
        assert step["versions"].keys() >= {"moe", "torch", "transformers", "python"}
        assert step["seed"] == 0 and step["options"] and step["created"]
        assert step["sources"][0]["config"] and step["sources"][0]["files"]


def test_a_conversion_that_breaks_the_function_is_not_published(
    dense, upcycle, tmp_path, monkeypatch
):
    """Negative control: scale one matrix behind the plan's back."""
    from moe.upcycle import expression

    honest = expression.Read.rows

    def wrong(self: Any, start: int, stop: int) -> torch.Tensor:
        rows = honest(self, start, stop)
        return rows * 1.01 if self.tensor.name.endswith("1.mlp.down_proj.weight") else rows

    monkeypatch.setattr(expression.Read, "rows", wrong)
    with pytest.raises(Corrupt, match="Not published"):
        upcycle(Copy(num_experts=4, top_k=2), dense("llama"), tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_held_out_text_is_used_and_named(dense, moe_upcycle, tmp_path):
    text = tmp_path / "held_out.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    arguments = ("--source", dense("llama"), "--out", tmp_path / "out", *COPY, "--text", text)
    assert moe_upcycle("copy", *arguments).code == 0
    assert Receipt.read(tmp_path / "out").verification["text"] == "held_out.txt"


def test_dry_run_prints_the_plan_and_writes_nothing(dense, moe_upcycle, tmp_path):
    out = tmp_path / "out"
    arguments = ("copy", "--source", dense("llama"), "--out", out, *COPY, "--dry-run")
    text = moe_upcycle(*arguments).out
    assert "model.layers.*.mlp.experts.gate_up_proj" in text and "4 × concat" in text
    plan = json.loads(moe_upcycle(*arguments, "--json").out)
    moh = json.loads(
        moe_upcycle("moh", "--source", dense("llama"), "--out", out, "--dry-run", "--json").out
    )
    assert plan["linked_bytes"] == 0 and moh["written_bytes"] == 0
    assert plan["total_parameters"] > plan["active_parameters"] > 0
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_with_the_receipt(dense, moe_upcycle, tmp_path):
    arguments = ("--source", dense("llama"), "--out", tmp_path / "out", *COPY, "--json")
    result = moe_upcycle("copy", *arguments)
    assert json.loads(result.out)["verification"]["status"] == "pass"


def test_the_zero_router_warns(dense, moe_upcycle, tmp_path):
    arguments = ("--source", dense("llama"), "--out", tmp_path / "out", *COPY)
    result = moe_upcycle("copy", *arguments, "--router-init", "zero")
    assert result.code == 0 and "warning" in result.err and "idle" in result.err
    name = "model.layers.0.mlp.router.weight"
    assert not load_file(tmp_path / "out" / "model.safetensors")[name].any()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("copy", "--num-experts", "4", "--top-k", "5"), ["--top-k 5", "between 1 and 4"]),
        (("copy", "--num-experts", "0", "--top-k", "1"), ["--num-experts 0"]),
        (("copy", "--num-experts", "10000000000", "--top-k", "1"), ["between 1 and 4096"]),
        (("moh", "--seed", "-1"), ["--seed"]),
        (("moh", "--layers", "7", "--top-k", "7"), ["--layers 7", "--top-k 7"]),
        (
            ("copy", "--num-experts", "0", "--top-k", "1", "--diversify", "drop:2",
             "--router-init", "uniform"),
            ["--num-experts 0", "drop:2", "uniform"],
        ),
        (("copy", *COPY, "--layers", "0-7"), ["0-7", "0 to 2"]),
        (("copy", *COPY, "--layers", "2-1"), ["2-1"]),
        (("copy", *COPY, "--layers", "0-99999999999999"), ["0 to 2"]),
        (("copy", *COPY, "--layers", "x"), ["'x'"]),
        (("copy", *COPY, "--text", "no-such-file.txt"), ["no-such-file.txt"]),
        (("moh", "--top-k", "7"), ["--top-k 7", "between 1 and 5"]),
        (("moh", "--shared-heads", "-1"), ["-1"]),
        (("moh", "--shared-heads", "9"), ["9 heads"]),
        (("moh", "--router", "two_stage", "--granularity", "kv_group"), ["granularity=head"]),
        (("moh", "--router", "magic"), ["magic"]),
        (("moh", "--no-such-option"), ["--no-such-option"]),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(arguments, messages, dense, refused):
    message = refused(2, *arguments, "--source", dense("llama"))
    for part in messages:
        assert part in message


def test_a_part_that_is_routed_already_is_refused(dense, upcycle, refused, tmp_path):
    heads = upcycle(MoH(), dense("llama"), tmp_path / "heads")
    assert "already has moh attention" in refused(2, "moh", "--source", heads)


def test_a_second_source_is_refused_not_forgotten(dense, refused):
    sources = ("--source", dense("llama"), "--source", dense("qwen2"))
    assert "one --source" in refused(2, "moh", *sources)


def test_sources_that_are_no_model_are_refused(source, refused, tmp_path):
    assert "not a folder" in refused(2, "moh", "--source", tmp_path / "none")
    (source / "config.json").unlink()
    assert "no config.json" in refused(2, "moh", "--source", source)
    (source / "config.json").write_text("{oops")
    assert "config.json" in refused(2, "moh", "--source", source)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama, mistral, qwen2, qwen3"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"intermediate_size": 65}, ["config says"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, ["config.json"]),
    ],
)
def test_configs_that_cannot_be_converted_name_the_field(fields, messages, source, refused):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))
    code = 3 if "intermediate_size" in fields else 2
    message = refused(code, "copy", *COPY, "--source", source)
    for part in messages:
        assert part in message


def test_pickled_weights_are_refused(source, refused):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(2, "moh", "--source", source)
    assert "pytorch_model.bin" in message and "safetensors and GGUF" in message


def test_missing_shards_are_named(sharded, refused, tmp_path):
    source = Path(shutil.copytree(sharded, tmp_path / "source"))
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refused(2, "moh", "--source", source)


@pytest.mark.parametrize("recipe", ["moh", "copy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_tensor(recipe, value, source, moe_upcycle, tmp_path):
    """Found while streaming; nothing is published, and nothing of it stays."""
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = COPY if recipe == "copy" else ()
    result = moe_upcycle(recipe, *options, "--source", source, "--out", tmp_path / "out")
    assert result.code == 3
    assert name in result.err and "model.safetensors" in result.err
    assert not list(tmp_path.glob("out*"))


def test_what_is_drawn_must_be_finite_too(source, refused):
    message = refused(2, "copy", *COPY, "--source", source, "--diversify", "noise:1e300")
    assert "experts" in message and "smaller --diversify" in message


def test_weights_that_readers_disagree_on_are_refused(source, refused, moe_upcycle, tmp_path):
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(source / "model.safetensors", source / "model-00001-of-00001.safetensors")
    assert "readers disagree" in refused(2, "moh", "--source", source)
    (source / "model.safetensors").unlink()  # negative control
    arguments = ("--source", source, "--out", tmp_path / "out", "--no-verify")
    assert moe_upcycle("moh", *arguments).code == 0


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"hidden_act": "foo"}, ["source: hidden_act='foo' is unknown"]),
        (
            {"vocab_size": -1, "num_attention_heads": 0, "hidden_size": "big"},
            ["vocab_size=-1", "num_attention_heads=0", "hidden_size='big'", "positive whole"],
        ),
        ({"num_attention_heads": 7}, ["hidden size", "7"]),
        (
            {"rope_parameters": {"rope_type": "wat", "rope_theta": 1e4}},
            ["rope_type='wat'", "default", "llama3", "yarn"],
        ),
    ],
)
def test_a_config_of_no_model_is_told_in_one_line(fields, messages, source, refused):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    message = refused(2, "moh", "--source", source)
    assert message.count("\n") == 1
    for part in messages:
        assert part in message


def test_weights_that_are_no_floats_are_refused(source, refused):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight is stored as int32" in refused(2, "moh", "--source", source)


def test_a_dtype_that_is_not_read_is_no_damage(source, refused):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 72, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    message = refused(2, "moh", "--source", source)
    assert "up_proj.weight is stored as I8" in message


def test_a_folder_is_no_model_before_it_is_verified(source, moe_upcycle, tmp_path, monkeypatch):
    seen = []

    def spy(parent, target, *args, **kwargs):
        assert (target / "config.json").exists()
        seen.append((tmp_path / "out.partial" / "config.json").exists())
        raise Corrupt("found wanting")

    monkeypatch.setattr(run, "verify", spy)
    result = moe_upcycle("moh", "--source", source, "--out", tmp_path / "out")
    assert result.code == 3 and seen == [False]
    assert not list(tmp_path.glob("out*"))


def test_a_missing_tensor_is_named(source, refused):
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(3, "moh", "--source", source)


def test_a_tensor_without_a_place_is_named(source, refused):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.extra"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.extra" in refused(2, "moh", "--source", source)


def test_a_folder_without_tokenizer_needs_no_verify(dense, moe_upcycle, refused, tmp_path):
    source = tmp_path / "source"
    tiny.dense_model("llama").save_pretrained(source)
    message = refused(2, "moh", "--source", source)
    assert "tokenizer" in message and "--no-verify" in message
    result = moe_upcycle("moh", "--source", source, "--out", tmp_path / "out", "--no-verify")
    assert result.code == 0 and Receipt.read(tmp_path / "out").verification is None


def test_untied_embeddings_stay_apart(moe_upcycle, weights, tmp_path):
    config = tiny.dense_config("llama", tie_word_embeddings=False)
    assert isinstance(config, LlamaConfig)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    arguments = ("--source", tmp_path / "source", "--out", tmp_path / "out", "--no-verify")
    assert moe_upcycle("copy", *arguments, *COPY).code == 0
    assert "lm_head.weight" in weights(tmp_path / "out")


@pytest.mark.slow
def test_the_installed_command_runs_in_a_process_of_its_own(dense, tmp_path):
    command = [sys.executable, "-m", "moe.cli", "upcycle", "moh", "--source", dense("llama")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for code, text in ((0, "not preserve"), (2, "exists")):
        done = subprocess.run(
            [*command, "--out", tmp_path / "out"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert text in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_problems_of_a_recipe_and_of_its_layers_come_as_one_list(dense):
    recipe = Copy(num_experts=2, top_k=3, diversify="noise:-1", router_init="normal:x")
    with pytest.raises(UserError) as caught:
        convert([Source.open(dense("llama"))], recipe, layers="7")
    assert len(str(caught.value).split("\n")) == 4
