"""What is written, tensor by tensor, and how it comes to be on disk."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe.model  # noqa: F401
from moe.errors import UserError
from moe.upcycle import writer
from moe.upcycle.receipt import Receipt, check
from moe.upcycle.recipes import Copy, MoH
from moe.upcycle.source import Source, hash_file

Tensors = dict[str, torch.Tensor]
MLP = ("gate_proj", "up_proj", "down_proj")


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def bytes_of(folder: Path) -> dict[str, str]:
    """Hash of every weight file."""
    return {p.name: hash_file(p) for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_moh_links_the_weights_and_changes_none(family, dense, upcycle, weights, tmp_path):
    source = dense(family)
    out = upcycle(MoH(), source, tmp_path / "out")
    assert_same(weights(out), weights(source))
    inodes = {p.stat().st_ino for p in (out / "model.safetensors", source / "model.safetensors")}
    assert len(inodes) == 1
    assert check(out) == []


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copy_stacks_each_mlp_and_leaves_the_rest(family, dense, upcycle, weights, tmp_path):
    out = upcycle(Copy(num_experts=4, top_k=2), dense(family), tmp_path / "out")
    expected, actual = weights(dense(family)), weights(out)
    for layer in range(3):
        at = f"model.layers.{layer}.mlp"
        gate, up, down = (expected.pop(f"{at}.{name}.weight") for name in MLP)
        expected[f"{at}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(4, -1, -1)
        expected[f"{at}.experts.down_proj"] = down.expand(4, -1, -1)
        router = actual.pop(f"{at}.router.weight")
        assert router.shape == (4, 72) and router.dtype == gate.dtype
        assert 0.015 < router.std() < 0.025
    assert_same(actual, expected)
    assert check(out) == []


def test_a_two_stage_router_is_all_that_is_added(dense, upcycle, weights, tmp_path):
    source = dense("llama")
    recipe = MoH(router="two_stage", shared_heads=4, top_k=3)
    out = upcycle(recipe, source, tmp_path / "out")
    expected, actual = weights(source), weights(out)
    added = {n: actual.pop(n) for n in sorted(actual.keys() - expected.keys())}
    assert_same(actual, expected)
    for layer in range(3):
        at = f"model.layers.{layer}.self_attn.router"
        rows = {p: added.pop(f"{at}.{p}.weight") for p in ("shared", "routed", "mix")}
        assert [tuple(r.shape) for r in rows.values()] == [(4, 72), (5, 72), (2, 72)]
        assert all(0.5 < r.std() * 72**0.5 / 1e-2 < 1.5 for r in rows.values())
    assert not added
    # the source's file is untouched, so it is linked; only the routers are written
    inode = (source / "model.safetensors").stat().st_ino
    assert [p.stat().st_ino == inode for p in sorted(out.glob("*.safetensors"))] == [True, False]


def test_only_the_chosen_layers_change(dense, upcycle, weights, tmp_path):
    out = upcycle(Copy(num_experts=2, top_k=1), dense("qwen2"), tmp_path / "out", layers="0,2")
    names = weights(out)
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert "model.layers.2.mlp.experts.down_proj" in names
    config = AutoConfig.from_pretrained(out)
    assert [config.mlp_spec(i).kind for i in range(3)] == ["moe", "dense", "moe"]


def test_recipes_chain_and_the_receipt_grows(dense, upcycle, weights, tmp_path):
    heads = upcycle(MoH(), dense("llama"), tmp_path / "heads")
    both = upcycle(Copy(num_experts=4, top_k=2), heads, tmp_path / "both")
    direct = upcycle(Copy(num_experts=4, top_k=2), dense("llama"), tmp_path / "direct")
    assert_same(weights(both), weights(direct))
    config = AutoConfig.from_pretrained(both)
    assert config.attention_spec(1).kind == "moh" and config.mlp_spec(1).kind == "moe"
    receipt = Receipt.read(both)
    assert [s["recipe"] for s in receipt.steps] == ["moh", "copy"]
    hashed = receipt.steps[1]["sources"][0]["files"]["model.safetensors"]["xxh3"]
    assert hashed == hash_file(heads / "model.safetensors")


def test_shards_are_read_and_written(sharded, upcycle, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    out = upcycle(Copy(num_experts=3, top_k=2), sharded, tmp_path / "out")
    whole = upcycle(Copy(num_experts=3, top_k=2), _single(sharded, tmp_path), tmp_path / "whole")
    assert_same(weights(out), weights(whole))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(p.name for p in out.glob("*.safetensors")) and len(files) > 3
    assert index["weight_map"].keys() == weights(out).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(out).values())
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def _single(folder: Path, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def test_untouched_shards_are_linked_and_only_those(sharded, upcycle, tmp_path):
    out = upcycle(Copy(num_experts=3, top_k=2), sharded, tmp_path / "out", layers="2")
    inodes = {p.stat().st_ino for p in sharded.glob("*.safetensors")}
    linked = [p for p in out.glob("*.safetensors") if p.stat().st_ino in inodes]
    assert 0 < len(linked) < len(inodes)
    assert check(out) == []


def test_another_file_system_gets_a_copy(dense, upcycle, weights, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = upcycle(MoH(), dense("llama"), tmp_path / "out")
    assert_same(weights(out), weights(dense("llama")))
    assert (out / "model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_dtype_converts_every_weight(stored, wanted, dense, upcycle, weights, tmp_path):
    source = tmp_path / "source"
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), dtype=getattr(torch, stored))
    model.save_pretrained(source)
    out = upcycle(Copy(num_experts=2, top_k=1), source, tmp_path / "out", dtype=wanted)
    actual, before = weights(out), weights(source)
    assert {t.dtype for t in actual.values()} == {getattr(torch, wanted)}
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(actual[query], before[query].to(getattr(torch, wanted)))
    assert AutoConfig.from_pretrained(out).dtype == getattr(torch, wanted)


def test_the_same_seed_gives_the_same_bytes_and_another_another_router(
    dense, upcycle, weights, tmp_path
):
    recipe = Copy(num_experts=4, top_k=2, diversify="noise:0.01")
    first, again, other = (
        upcycle(recipe, dense("llama"), tmp_path / name, seed=seed)
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert bytes_of(first) == bytes_of(again)
    name = "model.layers.0.mlp.router.weight"
    assert not torch.equal(weights(first)[name], weights(other)[name])


def test_bytes_do_not_depend_on_blocks(dense, upcycle, tmp_path, monkeypatch):
    recipe = Copy(num_experts=3, top_k=2, diversify="drop:0.4")
    whole = upcycle(recipe, dense("qwen3"), tmp_path / "whole")
    monkeypatch.setattr("moe.upcycle.source.BLOCK_BYTES", 5000)
    pieces = upcycle(recipe, dense("qwen3"), tmp_path / "pieces")
    assert bytes_of(whole) == bytes_of(pieces)


def test_every_side_file_comes_along(source, upcycle, tmp_path):
    extra = {"added_tokens.json": "{}", "LICENSE": "free", "tokenizer.model": "\x01"}
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    for name, text in extra.items():
        (source / name).write_text(text)
    for name in ("modeling_evil.py", "training_args.bin", "pytorch_model.bin.index.json"):
        (source / name).write_text("{}")
    out = upcycle(MoH(), source, tmp_path / "out")
    for name in (*extra, "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert (out / templates.name / "tools.jinja").read_text() == "{{ tools }}"
    assert not list(out.glob("*.py")) and not list(out.glob("*.bin*"))
    assert "additional_chat_templates/tools.jinja" in Receipt.read(out).files
    assert check(out) == []


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_field_of_the_config_is_lost(family, dense, upcycle, tmp_path):
    before = AutoConfig.from_pretrained(dense(family)).to_dict()
    out = upcycle(MoH(), dense(family), tmp_path / "out")
    after = AutoConfig.from_pretrained(out).to_dict()
    own = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    lost = {k: (v, after.get(k)) for k, v in before.items() if k not in own and after.get(k) != v}
    assert not {k: v for k, v in lost.items() if v[0] is not None}


def test_rope_is_written_in_both_spellings(dense, upcycle, tmp_path):
    """Readers of transformers 4 fall back on theta 10000 without a word."""
    out = upcycle(MoH(), dense("llama"), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"]["rope_type"] == "llama3"
    assert AutoConfig.from_pretrained(out).rope_parameters == written["rope_parameters"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`full_disk(n)`: writing weights fails after n bytes, as on a full disk."""

    def install(limit: int) -> None:
        left = [limit]
        real = writer.bytes_of

        def limited(block: torch.Tensor) -> memoryview:
            data = real(block)
            left[0] -= data.nbytes
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return data

        monkeypatch.setattr(writer, "bytes_of", limited)

    return install


@pytest.mark.parametrize("limit", [0, 1000, 200_000, 700_000])
def test_a_full_disk_is_one_line_and_nothing_published(
    limit, full_disk, dense, upcycle, tmp_path, monkeypatch
):
    source, recipe = dense("llama"), Copy(num_experts=4, top_k=2)
    monkeypatch.setattr(writer, "SHARD_BYTES", 150_000)
    before = _state(source)
    undisturbed = upcycle(recipe, source, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        real = writer.bytes_of
        full_disk(limit)
        with pytest.raises(UserError, match="no space left") as caught:
            upcycle(recipe, source, tmp_path / "out")
        patch.setattr(writer, "bytes_of", real)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert _state(source) == before
        out = upcycle(recipe, source, tmp_path / "out")
    assert bytes_of(out) == bytes_of(undisturbed)
    assert not (tmp_path / "out.partial").exists()


def _state(folder: Path) -> dict[str, tuple[int, str]]:
    return {p.name: (p.stat().st_mtime_ns, hash_file(p)) for p in sorted(folder.iterdir())}


def test_too_little_room_is_said_before_anything_is_written(dense, upcycle, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB free"):
        upcycle(Copy(num_experts=4, top_k=2), dense("llama"), tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))
    upcycle(MoH(), dense("llama"), tmp_path / "linked")  # needs no room


def test_an_existing_output_is_left_alone(dense, upcycle, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        upcycle(MoH(), dense("llama"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_is_not_ours_is_never_removed(dense, upcycle, tmp_path):
    """`--source m.partial --out m` would otherwise delete its own source."""
    source = Path(shutil.copytree(dense("llama"), tmp_path / "m.partial"))
    before = _state(source)
    with pytest.raises(UserError, match=r"m\.partial"):
        upcycle(MoH(), source, tmp_path / "m")
    assert _state(source) == before


def test_a_parent_that_cannot_be_written_is_one_line(dense, upcycle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        upcycle(MoH(), dense("llama"), tmp_path / "file" / "out")


def test_planned_sizes_are_the_sizes_written(dense, upcycle, tmp_path):
    from moe.upcycle.recipes import convert

    source = Source.open(dense("llama"))
    plan = convert([source], Copy(num_experts=4, top_k=2)).plan
    planned = sum(s.size for s in writer.shards(plan, [source]))
    out = upcycle(Copy(num_experts=4, top_k=2), dense("llama"), tmp_path / "out")
    stored = sum(t.size for t in Source.open(out).tensors.values())
    assert planned == stored
