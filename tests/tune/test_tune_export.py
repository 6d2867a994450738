"""`moe tune export`: every family's folder does what its tuning does; what it cannot is refused."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import mixtures
import pytest
import tiny
import torch
import typer
from invoke import moe
from safetensors.torch import load_file, save_file
from test_semantics import everywhere, relative
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moe.errors import MoeError
from moe.hf.loading import identity
from moe.tune import export as exporting
from moe.tune import permanent
from moe.tune.export_command import export
from moe.tune.families import sites
from moe.tune.intervene import tuned
from moe.tune.tuning import Edit, Tuning, shape_of

BIASED = ["deepseek_v3", "deepseek_v3 raw", "glm4_moe", "moe biased", "moe biased groups",
          "moe biased softmax", "uoe threshold"]  # fmt: skip
REMOVABLE = ["mixtral", "qwen2_moe raw", "qwen2_moe", "qwen3_moe", "olmoe", "olmoe raw",
             "granitemoe", "granitemoeshared", "deepseek_v2", "gpt_oss", "moe", "moe raw",
             "moe sigmoid", "moe sigmoid raw"]  # fmt: skip


class Result(NamedTuple):
    code: int
    out: str


def run(folder: Path, tuning: Tuning, out: Path, *options: object) -> Result:
    """The command as `moe tune` will have it: its exit code, and what it said."""
    file = folder.parent / f"{folder.name}.json"
    tuning.write(file)
    app = typer.Typer()
    app.command()(export)
    arguments = [folder, "--tuning", file, "--out", out, *options]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, MoeError):
        assert not out.exists() and not out.with_name(out.name + ".partial").exists()
        return Result(result.exception.exit_code, str(result.exception))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    """`folder("mixtral")`: a model folder with a tokenizer, made once."""
    root = tmp_path_factory.mktemp("mixtures")

    def get(name: str) -> Path:
        path = root / name.replace(" ", "-")
        if not path.exists():
            mixtures.build(name).save_pretrained(path)
            tiny.tokenizer().save_pretrained(path)
        return path

    return get


def loaded(path: Path) -> Any:
    """By transformers' Auto class, every key of file and model being the other's."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model: Any, tuning: Tuning | None = None) -> torch.Tensor:
    with tuned(model, tuning):
        return model(tiny.tokens(2, 40, seed=5)).logits


def exported(folder: Path, tuning: Tuning, out: Path, *options: object) -> tuple[Any, Any]:
    """The model, and what a run has made of it: which must be what the tuning does."""
    result = run(folder, tuning, out, *options)
    assert result.code == 0, result.out
    before, after = loaded(folder), loaded(out)
    wanted, found = logits(before, tuning), logits(after)
    assert relative(wanted, logits(before)) > 1e-3, "the tuning does nothing here"
    assert relative(found, wanted) < 1e-5
    return before, after


@pytest.mark.parametrize("scale", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*mixtures.NATIVE, *mixtures.OURS])
def test_post_zero_is_in_what_experts_give(name, scale, folder, tmp_path):
    model = mixtures.build(name)
    experts = (2, 0, 1)[: min(site.experts for site in sites(model))]
    tuning = everywhere(model, "post_zero", ("off", "gain:0.3", "gain:2"), experts)
    tuning.scale = scale
    exported(folder(name), tuning, tmp_path / "out")
    tensors, now = (stored(path) for path in (folder(name), tmp_path / "out"))
    assert tensors.keys() == now.keys()
    touched = {n for n in tensors if not torch.equal(tensors[n], now[n])}
    assert touched and all("down" in n or "w2" in n or "o" in n.split(".")[-2] for n in touched)


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", BIASED)
def test_pre_select_is_in_the_selection_bias(name, scale, folder, tmp_path):
    model = mixtures.build(name)
    tuning = everywhere(model, "pre_select", ("off", "force", "bias:-0.3"), (1, 4, 7))
    tuning.scale = scale
    _, after = exported(folder(name), tuning, tmp_path / "out")
    bias = next(b for n, b in after.named_buffers() if n.endswith("bias"))
    if scale == 1.0:
        assert bias[1] < -9e3 and bias[4] > 9e3
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["steps"][-1]["recipe"] == "tune export"
    assert receipt["verification"]["relative_difference"] < 1e-5
    assert receipt["verification"]["without_tuning"] > 1e-3


@pytest.mark.parametrize("semantics", ["pre_select", "pre_topk"])
@pytest.mark.parametrize("name", ["calibrated", "calibrated threshold", "uoe budget", "uoe biased"])
def test_where_scores_do_nothing_but_choose_it_is_in_their_bias(name, semantics, folder, tmp_path):
    actions, units = ("off", "force", "bias:-0.3"), (2, 5, 7)
    if name == "uoe biased":
        actions, units = ("force",), (2,)  # of three, one is on
    tuning = everywhere(mixtures.build(name), semantics, actions, units)
    exported(folder(name), tuning, tmp_path / "out")
    changed = [
        (now - before)
        for (key, before), now in zip(
            stored(folder(name)).items(), stored(tmp_path / "out").values(), strict=True
        )
        if not torch.equal(before, now) and key.endswith("router.bias")
    ]
    assert len(changed) == 3 and all((c.abs() > 9e3).any() for c in changed)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["verification"]["relative_difference"] < 1e-5
    assert receipt["verification"]["without_tuning"] > 1e-3


@pytest.mark.parametrize("name", REMOVABLE)
def test_an_expert_off_before_the_choice_can_be_taken_away(name, folder, tmp_path):
    model = mixtures.build(name)
    tuning = everywhere(model, "pre_select", ("off", "off"), (1, 4))
    before, after = exported(folder(name), tuning, tmp_path / "out", "--remove")
    assert [s.experts + 2 for s in sites(after)] == [s.experts for s in sites(before)]
    # transformers takes experts of any numbers, other readers do not
    names = [n for n in stored(tmp_path / "out") if re.search(r"layers\.1\..*experts\.\d+\.", n)]
    numbers = {int(re.findall(r"experts\.(\d+)\.", n)[0]) for n in names}
    assert numbers in (set(), set(range(sites(after)[-1].experts)))


def test_ours_can_lose_another_number_in_each_layer(folder, tmp_path):
    edits = [Edit(layer=0, expert=3), Edit(layer=2, expert=0), Edit(layer=2, expert=7)]
    tuning = Tuning(semantics="pre_topk", experts=edits)
    _, after = exported(folder("moe"), tuning, tmp_path / "out", "--remove")
    assert [site.experts for site in sites(after)] == [7, 8, 6]


def test_pre_topk_is_pre_select_where_no_group_is_limited(folder, tmp_path):
    model = mixtures.build("moe biased")
    tuning = everywhere(model, "pre_topk", ("off", "force"), (1, 4))
    exported(folder("moe biased"), tuning, tmp_path / "out")
    assert "pre_topk is pre_select here" in (tmp_path / "out" / "receipt.json").read_text()


REFUSED = [
    (
        "mixtral",
        "post_renorm",
        ("off",),
        (),
        "no weight says it. The nearest is --semantics post_z",
    ),
    ("moe biased", "post_renorm", ("gain:2",), (), "The nearest is --semantics post_zero"),
    ("deepseek_v3", "pre_topk", ("off",), (), "The nearest is --semantics pre_select"),
    ("olmoe", "pre_select", ("off",), (), "Use --remove for exactly that"),
    ("olmoe", "pre_topk", ("off",), (), "Use --remove for exactly that"),
    ("olmoe raw", "pre_topk", ("off",), (), "no bias to hold it. The nearest is --semantics post"),
    ("mixtral", "pre_select", ("force",), (), "pre_select of force: .* works at run time"),
    ("gpt_oss", "pre_topk", ("bias:1",), (), "pre_topk of bias: this router has no bias"),
    ("moh", "pre_topk", ("off",), (), "post_zero"),
    ("uoe biased", "post_renorm", ("off",), (), "no weight says it"),
    ("calibrated", "pre_select", ("off",), ("--remove",), "not of kind calibrated"),
    ("moe groups", "pre_select", ("off",), (), "The nearest is --semantics post_zero"),
    ("moe groups", "pre_select", ("off",), ("--remove",), "equally large"),
    ("olmoe raw", "pre_topk", ("off",), ("--remove",), "Use --semantics pre_select"),
    ("mixtral", "post_zero", ("off",), ("--remove",), "Use --semantics pre_select"),
    ("mixtral", "pre_select", ("off",), ("--remove", "--scale", 0.5), "Use off and --scale 1"),
    ("glm4_moe", "pre_select", ("off",), ("--remove",), "Leave --remove out"),
    ("uoe", "pre_select", ("off",), ("--remove",), "not of kind uoe"),
    ("mixtral", "post_zero", ("off",), ("--scale", 0), "nothing to export"),
    ("mixtral", "post_zero", ("off",), ("--scale", 2), "between 0 and 1"),
    ("mixtral", "pre_select", ("off",) * 6, ("--remove",), "leave 2 to choose from"),
]


@pytest.mark.parametrize(("name", "semantics", "actions", "options", "reason"), REFUSED)
def test_what_weights_cannot_say_is_refused(
    name, semantics, actions, options, reason, folder, tmp_path
):
    tuning = everywhere(mixtures.build(name), semantics, actions, (2, 3, 5, 6, 7, 1))
    result = run(folder(name), tuning, tmp_path / "out", *options)
    assert result.code == 2
    assert re.search(reason, result.out), result.out
    assert max(map(len, result.out.splitlines())) < 400


def test_one_config_for_all_layers_wants_as_many_from_each(folder, tmp_path):
    tuning = Tuning(semantics="pre_select", experts=[Edit(layer=0, expert=1)])
    result = run(folder("mixtral"), tuning, tmp_path / "out", "--remove")
    assert result.code == 2 and "num_local_experts is one for all: layer 0: 1, layer 1: 0" in (
        result.out
    )


def test_semantics_can_be_another_than_the_tunings(folder, tmp_path):
    tuning = everywhere(mixtures.build("mixtral"), "post_renorm", ("off",))
    exit_code, said = run(folder("mixtral"), tuning, tmp_path / "out", "--semantics", "post_zero")
    assert exit_code == 0 and "from the tuning at work" in said
    wanted = everywhere(mixtures.build("mixtral"), "post_zero", ("off",))
    found = logits(loaded(tmp_path / "out"))
    assert relative(found, logits(loaded(folder("mixtral")), wanted)) < 1e-5


def test_narrow_weights_take_factors_that_are_exact(tmp_path):
    folder = tmp_path / "narrow"
    mixtures.build("mixtral").to(torch.bfloat16).save_pretrained(folder)
    model = mixtures.build("mixtral")
    for action, code in (("gain:0.25", 0), ("off", 0), ("gain:0.3", 2)):
        out = tmp_path / action.replace(":", "")
        result = run(folder, everywhere(model, "post_zero", (action,)), out)
        assert result.code == code, result.out
    assert "would be rounded to bfloat16" in result.out and "--dtype float32" in result.out


def test_the_wrong_expert_is_noticed(folder, tmp_path, monkeypatch):
    """Negative control: nothing is published that does not do what the tuning does."""
    right = permanent._gain
    monkeypatch.setattr(
        permanent, "_gain", lambda change, site, gains: right(change, site, gains[::-1])
    )
    tuning = everywhere(mixtures.build("mixtral"), "post_zero", ("off", "off"), (0, 1))
    result = run(folder("mixtral"), tuning, tmp_path / "out")
    assert result.code == 3 and "Not published" in result.out
    assert run(folder("mixtral"), tuning, tmp_path / "out", "--no-verify").code == 0


def test_its_sidecar_names_the_source_and_is_not_applied_again(folder, tmp_path):
    source, out = folder("olmoe"), tmp_path / "out"
    tuning = everywhere(mixtures.build("olmoe"), "post_zero", ("off",))
    result = run(source, tuning, out, "--json")
    assert json.loads(result.out.strip().splitlines()[-1])["verification"]["status"] == "pass"
    kept = Tuning.read(out / exporting.NAME)
    assert kept.model == identity(source) and kept.method["applied"] is True
    assert kept.shape == shape_of(sites(mixtures.build("olmoe")))
    again = run(out, kept, tmp_path / "again")
    assert again.code == 2 and "weights of out have another hash" in again.out
    # as good as new otherwise: the hashes hold, and another export may follow
    assert moe("verify", out).code == 0
    assert run(out, kept, tmp_path / "again", "--other-model").code == 0


def test_a_default_that_a_config_leaves_out_is_filled_in(tmp_path):
    """Configs written by hand name what differs."""
    source, out = tmp_path / "source", tmp_path / "out"
    mixtures.build("mixtral").save_pretrained(source)
    fields = json.loads((source / "config.json").read_text())
    assert fields.pop("num_local_experts") == 8  # Mixtral's own
    (source / "config.json").write_text(json.dumps(fields))
    exported(source, everywhere(mixtures.build("mixtral"), "pre_select", ("off",)), out, "--remove")
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 7


def test_what_is_no_model_folder_is_refused(folder, tmp_path):
    tuning = everywhere(mixtures.build("mixtral"), "post_zero", ("off",))
    inside = run(folder("mixtral"), tuning, folder("mixtral") / "out")
    assert inside.code == 2 and "lies in the model's folder" in inside.out
    dense = tmp_path / "dense"
    tiny.dense_model("llama").save_pretrained(dense)
    missing = run(dense, tuning, tmp_path / "out")
    assert missing.code == 2 and "this llama has no router: is it dense?" in missing.out
    quantised = tmp_path / "quantised"
    mixtures.build("mixtral").save_pretrained(quantised)
    fields = json.loads((quantised / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(fields))
    refused = run(quantised, tuning, tmp_path / "out")
    assert refused.code == 2 and "the weights are quantised" in refused.out


def test_a_training_checkpoint_is_told_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.store, "is_checkpoint", lambda path: True)
    tuning = Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=0)])
    result = run(tmp_path / "step-5", tuning, tmp_path / "out")
    assert result.code == 2 and "--to hf --out DIR first" in result.out


def test_shards_that_it_leaves_alone_are_linked(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    mixtures.build("mixtral").save_pretrained(source, max_shard_size="20KB")
    shards = {path.name: path.stat().st_ino for path in source.glob("*.safetensors")}
    assert len(shards) > 3
    tuning = Tuning(semantics="post_zero", experts=[Edit(layer=1, expert=2)])
    exported(source, tuning, out)
    linked = {path.stat().st_ino for path in out.glob("*.safetensors")} & set(shards.values())
    assert len(linked) == len(shards) - 1
    # names move from file to file where experts are gone
    fewer = everywhere(mixtures.build("mixtral"), "pre_select", ("off",))
    exported(source, fewer, tmp_path / "fewer", "--remove")


def test_a_fused_layout_of_a_native_mixture_is_written_too(folder, tmp_path):
    """As transformers 5 holds it in memory, which some save: mlp.experts.down_proj [E, H, I]."""
    source = tmp_path / "fused"
    mixtures.build("olmoe").save_pretrained(source)
    model = mixtures.build("olmoe")
    save_file(dict(model.state_dict()), source / "model.safetensors", {"format": "pt"})
    tuning = everywhere(model, "post_zero", ("off", "gain:0.5"))
    exported(source, tuning, tmp_path / "out")
    assert "model.layers.0.mlp.experts.down_proj" in stored(tmp_path / "out")
