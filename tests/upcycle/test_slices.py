"""Recipes that cut an MLP or an attention: granular, split, uoe; and copies in another order."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe.upcycle.receipt import Receipt
from moe.upcycle.verify import verify

GRANULAR = ("granular", "--num-experts", 4, "--granularity", 4, "--top-k", 8)
EXACT = {
    "granular": GRANULAR,
    "granular-1": ("granular", "--num-experts", 3, "--granularity", 1, "--top-k", 2),
    "split": ("split", "--num-experts", 4, "--top-k", 4),
    "split-shared": ("split", "--num-experts", 3, "--top-k", 3, "--shared-neurons", 16),
    "split-random": ("split", "--num-experts", 4, "--top-k", 4, "--partition", "random"),
    "split-kmeans": ("split", "--num-experts", 4, "--top-k", 4, "--partition", "kmeans"),
    "perm": ("copy", "--num-experts", 4, "--top-k", 2, "--diversify", "perm"),
    "uoe-mlp": ("uoe", "--mlp-experts", 4, "--mlp-top-k", 4),
    "uoe-mlp-kmeans-shared": ("uoe", "--mlp-experts", 3, "--mlp-top-k", 3, "--partition", "kmeans",
                              "--shared-neurons", 16),
    "uoe-attention": ("uoe", "--attention-experts", 3, "--attention-top-k", 3),
    "uoe": ("uoe", "--mlp-experts", 8, "--mlp-top-k", 8, "--attention-experts", 3,
            "--attention-top-k", 3, "--mode", "expert_choice"),
    "uoe-sequence": ("uoe", "--mlp-experts", 2, "--mlp-top-k", 2, "--mode", "sequence"),
}  # fmt: skip
INEXACT = {
    "split": ("split", "--num-experts", 4, "--top-k", 2),
    "split-drawn": ("split", "--num-experts", 4, "--top-k", 4, "--router-init", "normal:0.5"),
    "uoe": ("uoe", "--mlp-experts", 4, "--attention-experts", 3),
    "uoe-soft": ("uoe", "--mlp-experts", 4, "--mlp-top-k", 4, "--weights", "soft"),
    "uoe-threshold": ("uoe", "--mlp-experts", 4, "--mlp-top-k", 4, "--mode", "threshold"),
    "uoe-scaled": ("uoe", "--mlp-experts", 4, "--mlp-top-k", 4, "--output-scale", "1.1"),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_keeps_the_function_is_proved_to(case, dense, moe_upcycle, tmp_path):
    family = list(tiny.FAMILIES)[len(case) % len(tiny.FAMILIES)]
    arguments = ("--source", dense(family), "--out", tmp_path / "out")
    result = moe_upcycle(*EXACT[case], *arguments)
    assert result.code == 0, result.err
    record = Receipt.read(tmp_path / "out").verification
    assert record["status"] == "pass" and record["relative_difference"] < 1e-5
    looks_ahead = "--mode" in EXACT[case]
    assert ("looks ahead" in result.out) == looks_ahead
    assert (record["perplexity"]["converted"] is None) == looks_ahead


@pytest.mark.parametrize("case", INEXACT)
def test_what_does_not_is_measured(case, dense, moe_upcycle, tmp_path):
    arguments = ("--source", dense("llama"), "--out", tmp_path / "out")
    result = moe_upcycle(*INEXACT[case], *arguments)
    assert result.code == 0, result.err
    record = Receipt.read(tmp_path / "out").verification
    assert record["status"] == "measured" and record["relative_difference"] > 1e-5
    assert record["decoding"]["relative_difference"] < 1e-5
    assert all(g["language"] > 0 or g["own"] > 0 for g in record["gradients"])


@pytest.mark.parametrize("partition", ["contiguous", "kmeans"])
def test_some_of_the_slices_are_noise_until_they_are_trained(
    partition, dense, moe_upcycle, tmp_path
):
    """The logits are about as far from the parent's as the parent's from zero, and no claim made.

    With all of the slices on, the same cut is the function (negative control).
    """
    cut = ("split", "--num-experts", 4, "--partition", partition, "--source", dense("llama"))
    part = moe_upcycle(*cut, "--top-k", 1, "--out", tmp_path / "part")
    assert part.code == 0 and "split does not preserve the function" in part.out, part.err
    assert "1 of 4 slices of each MLP are on per token" in part.out
    assert "measured, nothing claimed" in part.out
    receipt = Receipt.read(tmp_path / "part")
    assert not receipt.steps[-1]["exact"] and receipt.verification["status"] == "measured"
    assert 0.5 < receipt.verification["relative_difference"] < 5
    whole = moe_upcycle(*cut, "--top-k", 4, "--out", tmp_path / "whole")
    assert "split preserves the function: all slices" in whole.out
    assert Receipt.read(tmp_path / "whole").verification["relative_difference"] < 1e-5


def scaled(folder: Path, factors: dict[str, float]) -> float:
    """Relative difference to the dense parent after multiplying tensors, gate and up apart."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        half = tensor.shape[1] // 2 if "gate_up" in name else 0
        if "experts.gate_up_proj" in name:
            tensor[:, :half] *= factors.get("gate", 1)
            tensor[:, half:] *= factors.get("up", 1)
        elif "experts.down_proj" in name:
            tensor *= factors.get("down", 1)
    save_file(tensors, path, {"format": "pt"})
    parent = json.loads((folder / "receipt.json").read_text())["steps"][0]["sources"][0]["path"]
    return verify(Path(parent), folder, quiet=True)["relative_difference"]


@pytest.mark.slow
def test_a_granular_scale_must_be_linear(dense, moe_upcycle, tmp_path):
    """Only the gate's argument is not linear: a cube root on each of the three is not the scale."""
    third = 4 ** (1 / 3)
    cases = {
        "as written": ({}, 0, 1e-5),
        "down and up, square roots": ({"down": 0.5, "up": 2.0}, 0, 1e-5),
        "all three, cube roots": ({"down": third / 4, "up": third, "gate": third}, 0.05, 10),
        "none": ({"down": 0.25}, 0.05, 10),
    }
    for name, (factors, low, high) in cases.items():
        out = tmp_path / name.replace(" ", "-")
        assert moe_upcycle(*GRANULAR, "--source", dense("llama"), "--out", out).code == 0
        assert low <= scaled(out, factors) <= high, name


@pytest.mark.slow
def test_part_of_a_copy_or_groups_apart_are_not_the_function(dense, moe_upcycle, tmp_path):
    out = tmp_path / "out"
    assert moe_upcycle(*GRANULAR, "--source", dense("llama"), "--out", out).code == 0
    config = json.loads((out / "config.json").read_text())
    assert config["mlp"] == {
        "kind": "moe", "num_experts": 16, "top_k": 8, "intermediate_size": 16,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps({**config, "mlp": {**config["mlp"], "top_k": 6}}))
    assert scaled(out, {}) > 0.05
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("router.weight"):
            assert torch.equal(
                tensor.view(4, 4, -1), tensor.view(4, 4, -1)[:, :1].expand(-1, 4, -1)
            )
            tensor.normal_(std=0.02)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert scaled(out, {}) > 0.05


@pytest.mark.parametrize("partition", ["contiguous", "random", "kmeans", "activation"])
def test_a_partition_is_every_neuron_once(partition, dense, moe_upcycle, weights, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def route(x):\n    return top_k(softmax(x @ w), k)\n" * 200)
    calibrate = ("--calibrate", text) if partition == "activation" else ()
    source = dense("llama")
    arguments = ("--source", source, "--out", tmp_path / "out", "--partition", partition)
    result = moe_upcycle(
        "uoe", "--mlp-experts", 4, "--shared-neurons", 8, *arguments, *calibrate, "--no-verify"
    )  # 56 neurons by 4
    assert result.code == 0, result.err
    parent, own = weights(source), weights(tmp_path / "out")
    at = "model.layers.1.mlp"
    gate = own[f"{at}.experts.gate_up_proj"][:, :14].flatten(0, 1)
    gate = torch.cat([own[f"{at}.shared_expert.gate_proj.weight"], gate])
    up = own[f"{at}.experts.gate_up_proj"][:, 14:].flatten(0, 1)
    up = torch.cat([own[f"{at}.shared_expert.up_proj.weight"], up])
    down = own[f"{at}.experts.down_proj"].transpose(0, 1).flatten(1)
    down = torch.cat([own[f"{at}.shared_expert.down_proj.weight"], down], 1)
    rows = {tuple(row.tolist()): i for i, row in enumerate(parent[f"{at}.gate_proj.weight"])}
    order = [rows[tuple(row.tolist())] for row in gate]
    assert sorted(order) == list(range(64))
    assert (order == list(range(64))) == (partition == "contiguous")
    assert torch.equal(up, parent[f"{at}.up_proj.weight"][order])
    assert torch.equal(down, parent[f"{at}.down_proj.weight"][:, order])


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("granular", "--num-experts", 2, "--granularity", 5, "--top-k", 5),
         ["--granularity 5 does not divide the MLP's 64", "1, 2, 4, 8, 16, 32, 64"]),
        (("granular", "--num-experts", 2, "--granularity", 4, "--top-k", 6),
         ["multiple of", "4, 8."]),
        (("split", "--num-experts", 5, "--top-k", 2), ["64 neurons", "1, 2, 4, 8"]),
        (("split", "--num-experts", 4, "--top-k", 2, "--shared-neurons", 64), ["0 to 63"]),
        (("uoe",), ["--mlp-experts, --attention-experts, or both"]),
        (("uoe", "--attention-experts", 2),
         ["--attention-experts 2 does not divide the 3 KV groups", "1, 3"]),
        (("uoe", "--mlp-experts", 7, "--mlp-top-k", 9, "--attention-top-k", 1),
         ["--mlp-top-k 9", "7 does not divide", "--attention-top-k 1 needs"]),
        (("uoe", "--mlp-experts", 4, "--output-scale", "0"), ["--output-scale"]),
        (("uoe", "--mlp-experts", 4, "--output-scale", "-1"), ["--output-scale '-1'"]),
        (("uoe", "--mlp-experts", 4, "--sink-tokens", 4), ["--sink-tokens 4 needs --atten"]),
        (("uoe", "--attention-experts", 3, "--mode", "threshold", "--partition", "kmeans"),
         ["--mode threshold needs --mlp-experts", "--partition kmeans needs --mlp-experts"]),
        (("uoe", "--mlp-experts", 4, "--partition", "activation"), ["--calibrate"]),
        (("uoe", "--mlp-experts", 4, "--router", "random", "--calibrate", __file__),
         ["--partition activation"]),
        (("uoe", "--mlp-experts", 4, "--partition", "activation", "--calibrate", __file__,
          "--text", __file__), ["cannot be verified on it"]),
    ],
)  # fmt: skip
def test_cuts_that_do_not_fit_list_those_that_do(arguments, messages, dense, refused):
    message = refused(2, *arguments, "--source", dense("llama"))
    for part in messages:
        assert part in message


def test_calibration_text_is_looked_at_before_anything_is_written(dense, refused, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    options = ("uoe", "--mlp-experts", 4, "--partition", "activation", "--source", dense("llama"))
    assert "at least" in refused(2, *options, "--calibrate", short, "--no-verify")
    assert "nowhere.txt" in refused(2, *options, "--calibrate", "nowhere.txt")


@pytest.mark.slow
def test_any_mlp_goes_with_any_attention(dense, moe_upcycle, tmp_path):
    chains = [
        (("moh",), EXACT["split-kmeans"]),
        (("uoe", "--attention-experts", 3), GRANULAR),
        (INEXACT["split"], ("moh", "--router", "two_stage")),
        (("copy", "--num-experts", 4, "--top-k", 2), ("uoe", "--attention-experts", 3)),
        (("moh",), ("uoe", "--mlp-experts", 4)),
    ]
    for number, (first, second) in enumerate(chains):
        half, whole = tmp_path / f"half-{number}", tmp_path / f"whole-{number}"
        result = moe_upcycle(*first, "--source", dense("llama"), "--out", half, "--no-verify")
        assert result.code == 0, result.err
        result = moe_upcycle(*second, "--source", half, "--out", whole)
        assert result.code == 0, result.err
        config = AutoModelForCausalLM.from_pretrained(whole).config
        assert config.attention["kind"] != "dense" and config.mlp["kind"] != "dense"
        assert len(Receipt.read(whole).steps) == 2
