"""What comes along besides the weights, and where a result may lie."""

import json
import shutil

from invoke import moe
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from moe.upcycle import run
from moe.upcycle.receipt import Receipt
from moe.upcycle.recipes import Copy, MoH


def test_the_receipt_spells_out_every_default(dense, upcycle, tmp_path):
    heads = upcycle(MoH(), dense("llama"), tmp_path / "heads")
    both = upcycle(Copy(num_experts=4, top_k=2), heads, tmp_path / "both")
    first, second = (step["options"] for step in Receipt.read(both).steps)
    assert (first["shared_heads"], first["top_k"]) == (4, 3)
    assert second["router_init"] == "normal:0.02"


def test_an_output_that_would_touch_the_source_is_refused(source, moe_upcycle, tmp_path):
    before = sorted(source.iterdir())
    result = moe_upcycle("moh", "--source", source, "--out", source / "moh")
    assert result.code == 2 and "in a source's folder" in result.err
    assert sorted(source.iterdir()) == before
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    result = moe_upcycle("moh", "--source", source, "--out", tmp_path / "out")
    assert result.code == 2 and "exists" in result.err


def test_code_of_a_source_is_left_behind_aloud(source, moe_upcycle, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Own"}
    (source / "config.json").write_text(json.dumps(config))
    result = moe_upcycle("moh", "--source", source, "--out", tmp_path / "out", "--no-verify")
    assert result.code == 0, result.err
    assert "auto_map" in result.err
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_the_result_splits_text_as_its_parent_does(dense, moe_upcycle, monkeypatch, tmp_path):
    """transformers takes the tokenizer of a Qwen2 for its own class, whatever its config names."""
    source = dense("qwen2")
    result = moe_upcycle("moh", "--source", source, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    texts = ["def route(x):", "  two  spaces\n"]
    parent, own = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "out"))
    assert type(own) is type(parent)
    assert parent(texts)["input_ids"] == own(texts)["input_ids"]
    # negative control: where nothing is done about it, verification notices
    monkeypatch.setattr(run, "keep_class", lambda *_: None)
    result = moe_upcycle("moh", "--source", source, "--out", tmp_path / "other")
    assert result.code == 3 and "tokenizer" in result.err
    assert not list(tmp_path.glob("other*"))


def test_a_folder_without_a_receipt_is_held_against_its_config(source):
    assert moe("verify", source).code == 0
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    result = moe("verify", source)
    assert result.code == 3 and "embed_tokens" in result.err and "200" in result.err
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = moe("verify", source)
    assert result.code == 3 and "layers.1.mlp.up_proj.weight" in result.err


def test_a_source_without_side_files_is_enough(dense, moe_upcycle, tmp_path):
    """config.json and weights alone; and with a tokenizer, no generation config."""
    for family in ("qwen2", "qwen3"):
        bare = tmp_path / f"bare-{family}"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(dense(family) / name, bare)
        out = tmp_path / f"out-{family}"
        result = moe_upcycle("moh", "--source", bare, "--out", out, "--no-verify")
        assert result.code == 0, result.err
        result = moe_upcycle("moh", "--source", bare, "--out", tmp_path / "not")
        assert result.code == 2 and "has no tokenizer to verify with" in result.err
        for file in dense(family).glob("tokenizer*"):
            shutil.copy(file, bare)
        result = moe_upcycle("moh", "--source", bare, "--out", tmp_path / f"verified-{family}")
        assert result.code == 0, result.err
