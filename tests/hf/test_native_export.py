"""`moe export --to mixtral` and the like, there and back: exact, or refused with all reasons."""

import json
from unittest import mock

import pytest
import tiny
import torch
from invoke import moe
from native_folders import SHARED, difference, export, load, refused, same_tensors, write
from safetensors.torch import load_file
from tiny import MOE, MOH, TWO_STAGE
from transformers import AutoConfig, AutoTokenizer

from moe.checkpoint import store
from moe.engines.base import Entry
from moe.hf import layouts
from moe.hf import native as homes
from moe.hf.export import UNVERIFIED

RAW = {**MOE, "renormalise": False}
BIASED = {"attention_bias": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

CASES = [  # family, target, experts, the dense config's fields
    ("llama", "mixtral", MOE, {}),
    ("llama", "mixtral", {**MOE, "intermediate_size": 20}, {"tie_word_embeddings": False}),
    ("mistral", "mixtral", {**MOE, "top_k": 4}, {"tie_word_embeddings": True}),
    ("mistral", "mixtral", {**MOE, "top_k": 1}, {"sliding_window": None}),
    ("llama", "granitemoe", MOE, {"rope_parameters": YARN}),
    ("llama", "granitemoe", {**MOE, "top_k": 3}, {"tie_word_embeddings": False, **BIASED}),
    ("llama", "granitemoeshared", {**MOE, **SHARED}, BIASED),
    ("mistral", "granitemoeshared", MOE, {"sliding_window": None, "head_dim": 12}),
    ("llama", "qwen2_moe", {**RAW, **SHARED}, {"rope_parameters": LINEAR}),
    ("mistral", "qwen2_moe", {**MOE, **SHARED}, {"tie_word_embeddings": True}),
    ("qwen2", "qwen2_moe", {**MOE, **SHARED, "intermediate_size": 16}, {}),
    ("qwen2", "qwen2_moe", RAW, {"tie_word_embeddings": True, "use_sliding_window": False}),
    ("qwen2", "qwen2_moe", [{"kind": "dense"}, MOE, MOE], {"head_dim": 12}),
]


@pytest.mark.parametrize(("family", "target", "mlp", "fields"), CASES)
def test_a_native_folder_computes_the_same_and_comes_back_bit_for_bit(
    family, target, mlp, fields, tmp_path
):
    original = write(tmp_path / "routed", family, None, mlp, **fields)
    receipt = export(tmp_path / "routed", target, tmp_path / "native")
    loaded = load(tmp_path / "native")
    assert loaded.config.model_type == target
    assert difference(loaded, original) <= 1e-5
    assert receipt["verification"]["status"] == "pass"
    assert receipt["verification"]["relative_difference"] <= 1e-5
    assert moe("verify", tmp_path / "native").code == 0
    result = moe("import", tmp_path / "native", "--out", tmp_path / "back")
    assert result.code == 0, result.err
    assert same_tensors(tmp_path / "routed", tmp_path / "back")
    back = load(tmp_path / "back")
    ids = tiny.tokens(2, 100)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, original(ids).logits)
    assert back.config.mlp_spec(2).balance_coef == 0.01


def test_names_are_those_that_were_first_published(tmp_path):
    write(tmp_path / "routed", "llama", None, {**MOE, **SHARED})
    write(tmp_path / "plain", "llama", None, MOE)
    at = "model.layers.2."
    for source, target, names in (
        ("plain", "mixtral", {"block_sparse_moe.gate.weight": (4, 72),
                              "block_sparse_moe.experts.3.w1.weight": (64, 72),
                              "block_sparse_moe.experts.3.w2.weight": (72, 64)}),
        ("routed", "granitemoeshared", {"block_sparse_moe.input_linear.weight": (4, 128, 72),
                                        "block_sparse_moe.router.layer.weight": (4, 72),
                                        "shared_mlp.input_linear.weight": (48, 72)}),
        ("routed", "qwen2_moe", {"mlp.experts.0.up_proj.weight": (64, 72),
                                 "mlp.shared_expert.down_proj.weight": (72, 24),
                                 "mlp.shared_expert_gate.weight": (1, 72)}),
    ):  # fmt: skip
        export(tmp_path / source, target, tmp_path / target, "--no-verify")
        tensors = load_file(tmp_path / target / "model.safetensors")
        assert {n: tuple(tensors[at + n].shape) for n in names} == names
        assert not [n for n in tensors if ".router.weight" in n or "gate_up" in n]


@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_a_weight_scale_goes_into_the_experts(scale, tmp_path):
    original = write(tmp_path / "routed", "llama", None, {**MOE, "weight_scale": scale})
    receipt = export(tmp_path / "routed", "mixtral", tmp_path / "native")
    assert f"weight_scale {scale:g} multiplied" in receipt["steps"][-1]["statement"]
    assert difference(load(tmp_path / "native"), original) <= 1e-5
    assert moe("import", tmp_path / "native", "--out", tmp_path / "back").code == 0
    assert same_tensors(tmp_path / "routed", tmp_path / "back", but="experts.down_proj")
    assert difference(load(tmp_path / "back"), original) <= 1e-5


def test_raw_weights_fit_where_they_sum_to_1_anyway(tmp_path):
    original = write(tmp_path / "routed", "mistral", None, {**RAW, "top_k": 4})
    export(tmp_path / "routed", "mixtral", tmp_path / "native")
    assert difference(load(tmp_path / "native"), original) <= 1e-5


def test_what_bfloat16_would_round_is_refused(tmp_path):
    write(tmp_path / "routed", "llama", None, {**MOE, "weight_scale": 0.3}, torch.bfloat16)
    assert "--dtype float32" in refused(2, tmp_path / "routed", "mixtral")
    export(tmp_path / "routed", "mixtral", tmp_path / "native", "--dtype", "float32")
    write(tmp_path / "even", "llama", None, {**MOE, "weight_scale": 0.5}, torch.bfloat16)
    export(tmp_path / "even", "mixtral", tmp_path / "rounded")
    assert AutoConfig.from_pretrained(tmp_path / "rounded").dtype == torch.bfloat16


def test_the_balance_loss_pulls_as_hard_as_before(tmp_path):
    """Theirs sums a token's K shares, so the coefficient is ours over K. One layer: they pool."""
    original = write(
        tmp_path / "routed", "llama", None, {**MOE, "top_k": 3, "balance_coef": 0.06},
        num_hidden_layers=1,
    )  # fmt: skip
    export(tmp_path / "routed", "mixtral", tmp_path / "native")
    native = load(tmp_path / "native")
    assert native.config.router_aux_loss_coef == pytest.approx(0.02)
    ids = tiny.tokens(2, 50)
    with torch.no_grad():
        theirs = native(ids, output_router_logits=True).aux_loss
        ours = original(ids).router_loss
    assert native.config.router_aux_loss_coef * theirs.item() == pytest.approx(ours.item())


def test_config_and_files_beside_the_weights_are_kept(tmp_path):
    model = write(tmp_path / "routed", "llama", None, MOE, eos_token_id=[2, 5], pad_token_id=0)
    tiny.tokenizer().save_pretrained(tmp_path / "routed")
    (tmp_path / "routed/chat_template.jinja").write_text("{{ messages }}")
    model.generation_config.update(do_sample=True, temperature=0.3)
    model.generation_config.save_pretrained(tmp_path / "routed")
    (tmp_path / "held-out.txt").write_text("Some text of its own. " * 40)
    receipt = export(tmp_path / "routed", "mixtral", tmp_path / "out", "--text",
                     tmp_path / "held-out.txt")  # fmt: skip
    assert receipt["verification"]["text"] == "held-out.txt"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == [2, 5] and config["pad_token_id"] == 0
    assert config["head_dim"] == 8 and config["sliding_window"] is None
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["architectures"] == ["MixtralForCausalLM"] and "mlp" not in config
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "routed" / name).read_bytes()
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / f) for f in ("routed", "out"))
    assert type(ours) is type(theirs) and ours("a b")["input_ids"] == theirs("a b")["input_ids"]
    steps = [step["recipe"] for step in receipt["steps"]]
    assert steps == ["export"] and receipt["steps"][0]["options"]["to"] == "mixtral"


def test_a_training_checkpoint_is_exported_like_its_model(tmp_path):
    model = tiny.routed_model(tiny.dense_model(), None, MOE)
    entries = [Entry(name, "parameter", tensor) for name, tensor in model.state_dict().items()]
    progress = store.Progress(
        step=7, consumed_samples=56, updates=7, config={"data": {}}, reference=None,
        origin=[{"recipe": "copy"}],
    )  # fmt: skip
    folder = store.save(
        tmp_path, 7, entries, progress, 0, lambda value: [value], model.config.save_pretrained
    )
    receipt = export(folder, "mixtral", tmp_path / "out", "--dtype", "bfloat16")
    assert [step["recipe"] for step in receipt["steps"]] == ["copy", "train", "export"]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert difference(load(tmp_path / "out"), model) <= 1e-5
    assert not (tmp_path / "out/manifest.json").exists()


MISTAKES = {
    "gate and up rows change places": (
        "mixtral", MOE,
        mock.patch.dict(layouts.EXPERTS, {"mixtral": [layouts.EXPERTS["mixtral"][i]
                                                      for i in (1, 0, 2)]}),
    ),
    "the shared expert is not doubled": (
        "qwen2_moe", {**MOE, **SHARED}, mock.patch.object(layouts, "SHARED_GATE", 1.0),
    ),
    "the weight scale is forgotten": (
        "mixtral", {**MOE, "weight_scale": 2.0},
        mock.patch.object(layouts, "scaled", lambda base, factor: base),
    ),
    "raw weights are renormalised": (
        "qwen2_moe", RAW, mock.patch.object(homes, "_raw", lambda spec: False),
    ),
    "attention is scaled otherwise": (
        "granitemoe", MOE, mock.patch.object(homes, "_attention_scale", lambda size: 1.0),
    ),
    "a tensor is left out": (
        "granitemoe", MOE,
        mock.patch.dict(layouts.ROUTERS, {"granitemoe": "block_sparse_moe.nothing"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_computes_something_else_is_not_published(mistake, tmp_path):
    """Negative controls: each mistake is one that a reader would not notice."""
    target, mlp, patch = MISTAKES[mistake]
    write(tmp_path / "routed", "llama", None, mlp)
    with patch:
        assert "Not published" in refused(3, tmp_path / "routed", target)
        assert moe("export", tmp_path / "routed", "--to", target, "--out", tmp_path / "blind",
                   "--no-verify").code == 0  # fmt: skip
    receipt = json.loads((tmp_path / "blind/receipt.json").read_text())
    assert receipt["verification"] is None


def test_a_lost_rope_scaling_is_noticed(tmp_path):
    """Negative control, of the comparison over the whole context as well."""
    build = homes._build

    def forgetful(config, target):
        native = build(config, target)
        native.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
        return native

    write(tmp_path / "routed", "llama", None, MOE)
    with mock.patch.object(homes, "_build", forgetful):
        assert "rope_parameters=" in refused(2, tmp_path / "routed", "mixtral")
        with mock.patch.object(homes, "computes_differently", lambda config, other: []):
            assert "Not published" in refused(3, tmp_path / "routed", "mixtral")


def test_a_half_made_folder_never_loads(tmp_path):
    write(tmp_path / "routed", "llama", None, MOE)
    arguments = ("export", tmp_path / "routed", "--to", "mixtral", "--out", tmp_path / "out")
    with mock.patch("moe.hf.proof.prove", side_effect=KeyboardInterrupt):
        assert moe(*arguments).code == 130
    partial = tmp_path / "out.partial"
    assert (partial / "model.safetensors").is_file() and (partial / UNVERIFIED).is_dir()
    assert not (partial / "config.json").exists() and not (tmp_path / "out").exists()
    assert moe(*arguments).code == 0
    assert not partial.exists() and not (tmp_path / "out" / UNVERIFIED).exists()


REFUSED = [  # family, attention, experts, target, the dense config's fields, what is said
    ("llama", MOH, MOE, "mixtral", {}, ["attention of kind moh"]),
    ("llama", TWO_STAGE, MOE, "qwen2_moe", {}, ["attention of kind moh"]),
    ("llama", None, None, "mixtral", {}, ["no layer has experts: use --to dense"]),
    ("qwen3", None, MOE, "qwen2_moe", {}, ["qk_norm=True"]),
    ("mistral", None, MOE, "granitemoe", {}, ["sliding_window=7", "It fits mixtral and qwen2_moe"]),
    ("qwen2", None, MOE, "mixtral", {}, ["attention_bias=True", "layer_types mixes full and"]),
    ("llama", None, MOE, "qwen2_moe", BIASED,
     ["attention_output_bias=True", "It fits granitemoe and granitemoeshared"]),
    ("llama", None, {**MOE, **SHARED}, "granitemoe", {}, ["shared_intermediate_size > 0"]),
    ("llama", None, RAW, "granitemoe", {}, ["renormalise=False", "It fits qwen2_moe"]),
    ("llama", None, {**MOE, "score": "sigmoid", "selection_bias": True}, "mixtral", {},
     ["score=sigmoid", "selection_bias=True"]),
    ("llama", None, {**MOE, "num_groups": 4, "top_groups": 2}, "qwen2_moe", {},
     ["mlp.top_groups=2 of num_groups=4: in qwen2_moe a token chooses among all experts"]),
    ("llama", None, [MOE, {**MOE, "num_experts": 8}, MOE], "qwen2_moe", {},
     ["num_experts is 4, 8"]),
    ("llama", None, [MOE, {"kind": "dense"}, MOE], "granitemoe", {},
     ["layers 1 have a dense MLP", "It fits qwen2_moe"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "attention", "mlp", "target", "fields", "said"), REFUSED)
def test_what_does_not_fit_is_named(family, attention, mlp, target, fields, said, tmp_path):
    write(tmp_path / "routed", family, attention, mlp, **fields)
    message = refused(2, tmp_path / "routed", target)
    assert all(part in message for part in (*said, "--to remote-code")), message


def test_every_obstacle_is_named_at_once(tmp_path):
    write(tmp_path / "routed", "qwen2", MOH, {**RAW, **SHARED, "score": "sigmoid"})
    message = refused(2, tmp_path / "routed", "mixtral")
    for part in ("moh", "attention_bias", "layer_types", "score", "renormalise", "shared"):
        assert part in message, part
    assert "It fits" not in message


def test_a_field_that_no_rule_knows_is_an_obstacle_too(tmp_path):
    write(tmp_path / "routed", "llama", None, MOE, routed={"block": "parallel"})
    assert "block='parallel'" in refused(2, tmp_path / "routed", "mixtral")


def test_only_a_routed_llama_is_taken(tmp_path):
    tiny.dense_model().save_pretrained(tmp_path / "dense")
    assert "is a llama" in refused(2, tmp_path / "dense", "mixtral")
    write(tmp_path / "routed", "llama", None, MOE)
    text = ("--text", tmp_path / "routed/config.json")
    assert "--text" in refused(2, tmp_path / "routed", "hf", *text)
    assert "no tokenizer" in refused(2, tmp_path / "routed", "mixtral", *text)
    assert export(tmp_path / "routed", "hf", tmp_path / "out")["verification"] is None


def test_json_is_one_object(tmp_path):
    write(tmp_path / "routed", "llama", None, MOE)
    result = moe(
        "export", tmp_path / "routed", "--to", "mixtral", "--out", tmp_path / "o", "--json"
    )
    assert result.code == 0 and not result.err
    assert json.loads(result.out)["verification"]["status"] == "pass"
    for target in ("granitemoe", "remote-code", "dense"):
        assert target in moe("export", "--help").out
