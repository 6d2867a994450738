"""`moe export --to dense`: a routed model that leaves nothing out is a plain one again."""

import json

import pytest
from invoke import moe
from native_folders import difference, export, load, refused, same_tensors, write
from tiny import BUDGET, CALIBRATED, MOE, MOH, THRESHOLD, TWO_STAGE, dense_model

from moe.hf import dense

EVERY = {"kind": "moh", "shared_heads": [0, 1, 4], "top_k": 6}
GROUPS = {"kind": "moh", "shared_heads": [1], "top_k": 2, "granularity": "kv_group"}
CASES = [
    ("llama", EVERY, {}),
    ("llama", GROUPS, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("mistral", [EVERY, {"kind": "dense"}, GROUPS], {}),
    ("mistral", None, {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", GROUPS, {}),
    ("qwen2", EVERY, {"head_dim": 12, "use_sliding_window": False}),
    ("qwen3", EVERY, {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "attention", "fields"), CASES)
def test_it_is_the_plain_model_bit_for_bit(family, attention, fields, tmp_path):
    original = dense_model(family, **fields)
    original.save_pretrained(tmp_path / "dense")
    write(tmp_path / "routed", family, attention, None, **fields)
    receipt = export(tmp_path / "routed", "dense", tmp_path / "out")
    assert same_tensors(tmp_path / "out", tmp_path / "dense")
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(original) and difference(loaded, original) == 0
    assert receipt["verification"]["relative_difference"] == 0
    before, after = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("dense", "out")
    )
    assert before.items() <= {**before, **after}.items()
    assert not {"attention", "mlp", "qk_norm", "source_model_type"} & after.keys()


def test_upcycling_and_back_changes_nothing(tmp_path):
    dense_model("mistral").save_pretrained(tmp_path / "dense")
    arguments = ("--source", tmp_path / "dense", "--out", tmp_path / "moh", "--no-verify")
    result = moe("upcycle", "moh", *arguments, "--shared-heads", 4, "--top-k", 5)
    assert result.code == 0, result.err
    receipt = export(tmp_path / "moh", "dense", tmp_path / "out")
    assert [step["recipe"] for step in receipt["steps"]] == ["moh", "export"]
    assert same_tensors(tmp_path / "dense", tmp_path / "out")


def test_a_model_of_no_family_takes_the_first_that_can_hold_it(tmp_path):
    for family, expected in (("mistral", "mistral"), ("qwen3", "qwen3"), ("llama", "llama")):
        folder = tmp_path / family
        write(folder, family, EVERY, None, routed={"source_model_type": None})
        export(folder, "dense", tmp_path / f"{family}-out")
        config = json.loads((tmp_path / f"{family}-out/config.json").read_text())
        assert config["model_type"] == expected


@pytest.mark.parametrize(
    ("attention", "mlp", "routed", "said"),
    [
        (MOH, None, {}, ["top_k=3 leaves out 3 of 9"]),
        ({**EVERY, "routed_scale": 2.0}, None, {}, ["routed_scale=2"]),
        ({**TWO_STAGE, "top_k": 6}, None, {}, ["router=two_stage"]),
        (THRESHOLD, BUDGET, {}, ["attention.budget=threshold", "mlp.mode=budget"]),
        (CALIBRATED, None, {}, ["top_k=3 leaves out 3 of 9"]),
        (EVERY, MOE, {}, ["FFN experts (moe)", "--calibrate FILE"]),
        (MOH, MOE, {}, ["leaves out", "--calibrate FILE"]),
        (None, None, {"qk_norm": True}, ["qk_norm=True has no place in a llama model"]),
        (None, None, {"block": "parallel"}, ["block='parallel' has no place"]),
    ],
)
def test_what_is_not_dense_is_named(attention, mlp, routed, said, tmp_path):
    write(tmp_path / "routed", "llama", attention, mlp, routed=routed)
    message = refused(2, tmp_path / "routed", "dense")
    assert all(part in message for part in (*said, "--to remote-code")), message


def test_heads_left_out_would_be_noticed(tmp_path, monkeypatch):
    """Negative control: were the rule forgotten, the comparison would still refuse."""
    monkeypatch.setattr(dense, "look_at_attention", lambda config, layer: ([], ""))
    write(tmp_path / "routed", "llama", MOH, None)
    assert "Not published" in refused(3, tmp_path / "routed", "dense")
