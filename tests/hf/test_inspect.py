"""`moe inspect`: what it says about a folder is what the folder's model is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from invoke import moe
from transformers import AutoModelForCausalLM

HIDDEN, INNER, HEAD, HEADS, KV, VOCABULARY, LAYERS = 72, 64, 8, 9, 3, 97, 3
EXPERT = 3 * HIDDEN * INNER
DENSE = {
    "attention": {"kind": "dense", "experts": 9, "top_k": 9, "shared": 0},
    "mlp": {"kind": "dense", "experts": 1, "top_k": 1},
}
MOH = {"kind": "moh", "experts": 9, "top_k": 3, "shared": 4}
MOE = {"kind": "moe", "experts": 4, "top_k": 2}
MOE_SPEC = {"kind": "moe", "num_experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """`folders("moh")`: dense, and what the command makes of it, each made once."""
    root = tmp_path_factory.mktemp("inspect")
    tiny.dense_model("llama").save_pretrained(root / "dense")
    made = {
        "moh": ("moh", "dense", "--shared-heads", 4, "--top-k", 3),
        "groups": ("moh", "dense", "--granularity", "kv_group", "--shared-heads", 1, "--top-k", 1),
        "two_stage": ("moh", "dense", "--router", "two_stage", "--shared-heads", 4, "--top-k", 3),
        "moe": ("copy", "dense", "--num-experts", 4, "--top-k", 2),
        "chain": ("copy", "moh", "--num-experts", 4, "--top-k", 2),
        "layers": ("copy", "dense", "--num-experts", 4, "--top-k", 2, "--layers", "1"),
        "mixed": ("moh", "layers", "--shared-heads", 4, "--top-k", 3, "--layers", "0-1"),
    }

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            recipe, source, *options = made[name]
            arguments = ("--source", folder(str(source)), "--out", path, "--no-verify")
            result = moe("upcycle", recipe, *arguments, *options)
            assert result.code == 0, result.err
        return path

    return folder


def inspect(folder: Path) -> dict[str, Any]:
    result = moe("inspect", folder, "--json")
    assert result.code == 0 and result.out.count("\n") == 1, result
    return json.loads(result.out)


def parameters(folder: Path) -> int:
    """Counted on the model itself, tied weights once."""
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def active(heads: int, experts: int, router: int) -> int:
    """Parameters that one token uses in one layer, counted by hand."""
    attention = HIDDEN * HEAD * (HEADS + 2 * KV) + heads * HEAD * HIDDEN
    return attention + experts * EXPERT + router + 2 * HIDDEN


OUTSIDE = VOCABULARY * HIDDEN + HIDDEN  # tied embeddings, last norm
EVERY = active(9, 1, 0)
TWO_STAGE_ROUTER = HIDDEN * (4 + 5 + 2)


@pytest.mark.parametrize(
    ("name", "layers", "counted"),
    [
        ("dense", [DENSE] * 3, [EVERY] * 3),
        ("moh", [{**DENSE, "attention": MOH}] * 3, [active(7, 1, 0)] * 3),
        (
            "groups",
            [{**DENSE, "attention": {"kind": "moh", "experts": 3, "top_k": 1, "shared": 1}}] * 3,
            [active(6, 1, 0)] * 3,
        ),
        ("two_stage", [{**DENSE, "attention": MOH}] * 3, [active(7, 1, TWO_STAGE_ROUTER)] * 3),
        ("moe", [{**DENSE, "mlp": MOE}] * 3, [active(9, 2, 4 * HIDDEN)] * 3),
        ("chain", [{"attention": MOH, "mlp": MOE}] * 3, [active(7, 2, 4 * HIDDEN)] * 3),
        (
            "layers",
            [DENSE, {**DENSE, "mlp": MOE}, DENSE],
            [EVERY, active(9, 2, 4 * HIDDEN), EVERY],
        ),
        (
            "mixed",
            [{**DENSE, "attention": MOH}, {"attention": MOH, "mlp": MOE}, DENSE],
            [active(7, 1, 0), active(7, 2, 4 * HIDDEN), EVERY],
        ),
    ],
)
def test_layers_and_counts_are_the_models(name, layers, counted, folders):
    folder = folders(name)
    found = inspect(folder)
    keys = {"model_type", "total_parameters", "active_parameters", "layers", "receipt"}
    assert found.keys() == keys | {"flops_per_token"}
    if name == "dense":  # 6 a weight, embeddings tied; 12 a head element and position
        cores = 12 * 3 * 9 * 8 * 1024
        assert found["flops_per_token"] == 6 * found["active_parameters"] + cores
    assert found["model_type"] == ("llama" if name == "dense" else "routed_llama")
    assert found["layers"] == layers
    assert found["total_parameters"] == parameters(folder)
    assert found["active_parameters"] == OUTSIDE + sum(counted)
    assert (found["receipt"] is None) == (name == "dense")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_biases_norms_and_head_sizes_are_counted(family, overrides, tmp_path):
    model = tiny.dense_model(family, **overrides)
    model.save_pretrained(tmp_path / "dense")
    found = inspect(tmp_path / "dense")
    assert found["model_type"] == family
    assert found["total_parameters"] == found["active_parameters"] == model.num_parameters()


def test_extras_of_experts_are_counted(tmp_path):
    mlp = {**tiny.MOE, "shared_intermediate_size": 24, "intermediate_size": 40,
           "selection_bias": True}  # fmt: skip
    model = tiny.routed_model(tiny.dense_model("llama"), tiny.MOH, mlp)
    model.save_pretrained(tmp_path / "routed")
    found = inspect(tmp_path / "routed")
    assert found["total_parameters"] == model.num_parameters()
    unused = 2 * 3 * HIDDEN * 40 + 3 * HEAD * HIDDEN  # 2 of 4 experts, 3 of 9 heads
    assert found["active_parameters"] == found["total_parameters"] - LAYERS * unused


def test_the_receipt_holds_every_step(folders):
    steps = inspect(folders("mixed"))["receipt"]["steps"]
    assert [s["recipe"] for s in steps] == ["copy", "moh"]
    assert [s["options"]["layers"] for s in steps] == ["1", "0-1"]
    assert steps[0]["sources"][0]["path"] == str(folders("dense"))


def test_people_read_ranges_of_equal_layers(folders):
    text = moe("inspect", folders("mixed")).out
    lines = [line.strip() for line in text.splitlines()]
    assert any(line.startswith("layers       0: moh, 4 shared + 3 routed of 9;") for line in lines)
    assert any("2 of 4 experts" in line for line in lines)
    assert any(line.startswith("step 2: moh (") for line in lines)
    assert (
        "layers     0-2: dense attention, 9 heads; dense MLP"
        in moe("inspect", folders("dense")).out
    )
    assert "no receipt" in moe("inspect", folders("dense")).out


@pytest.mark.parametrize(
    ("name", "text", "code", "message"),
    [
        ("config.json", None, 2, "no config.json"),
        ("config.json", "{oops", 2, "config.json"),
        ("config.json", '{"model_type": "gpt2"}', 2, "model_type='gpt2'"),
        ("config.json", '{"model_type": "no_such"}', 2, "no_such"),
        ("receipt.json", "{oops", 3, "not a receipt"),
        ("receipt.json", '{"surprise": 1}', 3, "not a receipt"),
        ("receipt.json", "[]", 3, "not a receipt"),
        ("receipt.json", '{"steps": "foo"}', 3, "not a list of conversions"),
        ("receipt.json", '{"files": {"model.safetensors": {}}}', 3, "of model.safetensors"),
    ],
)
def test_folders_that_are_no_model_are_refused(name, text, code, message, tmp_path):
    folder = tmp_path / "model"
    tiny.dense_model("llama").save_pretrained(folder)
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    result = moe("inspect", folder)
    assert result.code == code and message in result.err and "Traceback" not in result.err


def test_a_config_that_fits_no_model_lists_its_problems(folders, tmp_path):
    """Negative control: the same folder with other numbers is not described as the old one."""
    config = json.loads((folders("moe") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp": {**MOE_SPEC, "top_k": 5}}))
    result = moe("inspect", tmp_path)
    assert result.code == 2 and "mlp.top_k=5 must be between 1 and num_experts=4" in result.err
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp": {**MOE_SPEC, "topk": 2}}))
    assert "Did you mean `top_k`?" in moe("inspect", tmp_path).err
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp": {**MOE_SPEC, "top_k": 1}}))
    before, after = inspect(folders("moe")), inspect(tmp_path)
    assert after["active_parameters"] == before["active_parameters"] - LAYERS * EXPERT


def test_budgets_are_told_by_their_means(tmp_path):
    """Calibrated heads skip the queries of those that are off as well."""
    tiny.routed_model(tiny.dense_model(), tiny.THRESHOLD, tiny.BUDGET).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    heads = {"kind": "moh", "experts": 9, "top_k": 0, "shared": 1, "mean": 4.5}
    experts = {"kind": "uoe", "experts": 4, "top_k": 0, "mean": 2}
    assert found["layers"] == [{"attention": heads, "mlp": experts}] * LAYERS
    attention = 8 * (HIDDEN + 1) + HEAD * HIDDEN * (2 * KV + 2 * 5.5)
    mlp = 4 * (HIDDEN + 1) + 2 * EXPERT // 4
    assert found["active_parameters"] == OUTSIDE + 3 * (attention + mlp + 2 * HIDDEN)
    assert found["total_parameters"] == parameters(tmp_path)
    said = moe("inspect", tmp_path).out
    assert "1 shared + a mean of 4.5 routed of 9; uoe, a mean of 2 of 4 experts" in said


def test_layers_that_differ_in_their_means_are_one_line(tmp_path):
    means = [3.0, 4.5, 6.0][:LAYERS]
    heads = [{**tiny.THRESHOLD, "mean_heads": mean} for mean in means]
    tiny.routed_model(tiny.dense_model(), heads, tiny.BUDGET).save_pretrained(tmp_path)
    said = moe("inspect", tmp_path).out
    low, high = min(means) - 1, max(means) - 1  # one is shared
    assert f"layers     0-{LAYERS - 1}: moh, 1 shared + a mean of" in said
    assert f"({low:.3g} to {high:.3g}) routed of 9" in said
    other = [*heads[:-1], {**heads[-1], "shared_heads": [0, 1]}]
    tiny.routed_model(tiny.dense_model(), other, tiny.BUDGET).save_pretrained(tmp_path)
    assert f"layers       {LAYERS - 1}: moh, 2 shared" in moe("inspect", tmp_path).out
