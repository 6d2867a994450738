"""`moe upcycle … --calibrate`: what the command makes of a text, and what it refuses."""

import json
import shutil

import calibrating
import pytest
import tiny
import torch
from calibrating import ALWAYS, DEAD, SOMETIMES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe.model import RoutedLlamaForCausalLM
from moe.upcycle.calibrate.compare import Masks, masking
from moe.upcycle.calibrate.fitting import calibrate
from moe.upcycle.calibrate.parts import Fits, Part
from moe.upcycle.calibrate.ranks import Alone
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import Source
from moe.upcycle.verify import load

TOKENS = ("--calibration-tokens", calibrating.TOKENS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text to fit to and one to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    return calibrating.text(folder / "fit.txt"), calibrating.text(folder / "held.txt", seed=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return calibrating.planted(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return calibrating.source(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def convert(moe_upcycle, texts, tmp_path):
    """`convert("moh", …, source=…)`: the folder that the command makes, and what it printed."""
    count = iter(range(100))

    def call(recipe, *options, source, verify=False, calibrate=True):
        out = tmp_path / f"out{next(count)}"
        held = ("--text", texts[1]) if verify else ("--no-verify",)
        fitted = ("--calibrate", texts[0], *TOKENS) if calibrate else ()
        given = "--source", source, "--out", out
        result = moe_upcycle(recipe, *options, *given, *fitted, *held)
        assert result.code == 0, result.err
        return out, result

    return call


def gates(folder, source, layer=0, seed=1):
    """Which heads of a layer are on for tokens of a fresh text [T, 9], and that text."""
    model = RoutedLlamaForCausalLM.from_pretrained(folder)
    text = calibrating.letters(seed, 300)
    found = []
    router = model.model.layers[layer].self_attn.router
    router.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    with torch.no_grad():
        model(torch.tensor([tiny.tokenizer()(text)["input_ids"]]))
    return found[0], text


@pytest.mark.parametrize("measure", ["norm", "loss"])
def test_a_threshold_finds_what_was_planted(measure, convert, planted):
    """A head for some tokens is on for those, one that always matters always, a dead one never."""
    out, result = convert(
        "moh", "--layers", 0, "--target", measure, "--mean-heads", 5, source=planted
    )
    on, text = gates(out, planted)
    ours = torch.tensor([letter in calibrating.CLASS for letter in text])
    assert 0.1 < ours.float().mean() < 0.5
    assert on[:, ALWAYS].all() and not on[:, DEAD].any()
    assert on[ours, SOMETIMES].mean() > 0.95 and on[~ours, SOMETIMES].mean() < 0.1
    assert on.sum(1).mean().item() == pytest.approx(5, abs=0.2)
    assert f"layer 0: heads {DEAD} add nothing" in result.err
    step = Receipt.read(out).steps[-1]["calibration"]
    layer = step["parts"]["attention"]["layers"]["0"]
    assert layer["dead"] == [DEAD] and layer["mean_on"] == pytest.approx(5, abs=0.05)
    spec = json.loads((out / "config.json").read_text())["attention"][0]
    assert spec["mean_heads"] == layer["mean_on"] and spec["budget"] == "threshold"


def test_shared_heads_are_those_that_add_most_and_a_dead_one_is_last(convert, planted, weights):
    options = ("--budget", "topk", "--shared-heads", 2, "--top-k", 3, "--target", "norm")
    out, _ = convert("moh", *options, "--layers", 0, source=planted)
    spec = json.loads((out / "config.json").read_text())["attention"][0]
    assert ALWAYS in spec["shared_heads"] and DEAD not in spec["shared_heads"]
    assert spec["shared_heads"] != [0, 1] and spec["top_k"] == 3
    row = [h for h in range(9) if h not in spec["shared_heads"]].index(DEAD)
    assert not weights(out)["model.layers.0.self_attn.router.weight"][row].any()
    on, _ = gates(out, planted)
    assert (on.sum(1) == 5).all() and not on[:, DEAD].any()
    first, _ = convert("moh", *options, "--shared", "first", "--layers", 0, source=planted)
    assert json.loads((first / "config.json").read_text())["attention"][0]["shared_heads"] == [0, 1]


def difference(folder, source):
    """Relative difference of logits from the source's on text that nothing was fitted to."""
    ids = torch.tensor([tiny.tokenizer()(calibrating.letters(1, 400))["input_ids"]])
    with torch.no_grad():
        found, wanted = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (folder, source)
        )
    return ((found - wanted).norm() / wanted.norm()).item()


def test_a_router_of_other_numbers_is_worse(convert, planted):
    """Negative control, on held-out text: rows of another head, and the paper's recipe."""
    out, _ = convert("moh", "--budget", "topk", source=planted)
    ours = difference(out, planted)
    other = shutil.copytree(out, out.with_name("other"))
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        rows = {n: t.flip(0).contiguous() for n, t in tensors.items() if ".router." in n}
        save_file({**tensors, **rows}, file, {"format": "pt"})
    assert difference(other, planted) > 1.2 * ours
    paper, _ = convert("moh", "--router", "qnorm", "--shared", "calibrated", source=planted)
    assert difference(paper, planted) > 1.05 * ours


RECIPES = {
    "threshold": ("moh",),
    "topk": ("moh", "--budget", "topk", "--refit"),
    "layer": ("moh", "--budget", "layer", "--target", "norm"),
    "groups": ("moh", "--granularity", "kv_group", "--refit"),
    "paper's router": ("moh", "--router", "qnorm", "--shared", "calibrated"),
    "slices": ("uoe", "--mlp-experts", 6),
    "budget": ("uoe", "--mlp-experts", 6, "--mode", "budget", "--refit"),
    "by gates": ("uoe", "--mlp-experts", 4, "--partition", "kmeans", "--router", "calibrated"),
    "both": ("uoe", "--attention-experts", 3, "--mlp-experts", 4, "--target", "norm", "--refit"),
    "split": ("split", "--num-experts", 6, "--top-k", 4, "--refit"),
    "drawn": ("uoe", "--mlp-experts", 4, "--partition", "shared-coactivation",
              "--router", "random"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", RECIPES)
def test_every_recipe_is_verified_and_the_same_bytes_every_time(case, convert, plain, weights):
    recipe, *options = RECIPES[case]
    out, result = convert(recipe, *options, source=plain, verify=True)
    assert "verified on held.txt" in result.out and not (out / "calibration").exists()
    assert (out / "calibration.png").read_bytes()[1:4] == b"PNG"
    again, _ = convert(recipe, *options, source=plain)
    for file in (out / "config.json", *out.glob("*.safetensors")):
        assert file.read_bytes() == (again / file.name).read_bytes()
    receipt = Receipt.read(out)
    assert receipt.verification["decoding"]["relative_difference"] < 1e-5
    step = receipt.steps[-1]
    assert step["calibration"]["tokens"] == calibrating.TOKENS and not step["exact"]
    refitted = "--refit" in options
    assert ("no longer equals the dense one" in step["statement"]) == refitted
    own, parent = weights(out), weights(plain)
    outputs = [n for n in own if n.endswith("o_proj.weight")]
    changed = any(not torch.equal(own[n], parent[n]) for n in outputs)
    assert changed == (refitted and (recipe == "moh" or case == "both"))
    if case in ("split", "slices", "drawn"):  # all of them, once each
        rows = [own["model.layers.0.mlp.experts.gate_up_proj"].chunk(2, 1)[0].flatten(0, 1)]
        rows.append(own["model.layers.0.mlp.shared_expert.gate_proj.weight"])
        found = sorted(map(tuple, torch.cat(rows).tolist()))
        assert found == sorted(map(tuple, parent["model.layers.0.mlp.gate_proj.weight"].tolist()))


@pytest.mark.slow
def test_all_slices_on_without_a_refit_are_the_dense_model(convert, plain):
    """A calibrated partition loses no neuron: exact where all are chosen."""
    all_on = ("--mlp-experts", 6, "--mlp-top-k", 6)
    out, result = convert("uoe", *all_on, source=plain, verify=True)
    assert (
        "preserves the function" in result.out
        and Receipt.read(out).verification["status"] == "pass"
    )
    out, result = convert("uoe", *all_on, "--refit", source=plain, verify=True)
    assert "does not preserve" in result.out
    weights = ("--num-experts", 6, "--top-k", 6)
    out, _ = convert("split", *weights, source=plain)
    assert difference(out, plain) < 0.01


@pytest.mark.slow
def test_the_second_of_a_chain_is_fitted_to_the_first(convert, plain, weights):
    first, _ = convert("moh", source=plain)
    second, _ = convert("uoe", "--mlp-experts", 6, source=first, verify=True)
    config = json.loads((second / "config.json").read_text())
    assert config["attention"][0]["router"] == "calibrated" and config["mlp"]["kind"] == "uoe"
    assert [s["recipe"] for s in Receipt.read(second).steps] == ["moh", "uoe"]
    alone, _ = convert("uoe", "--mlp-experts", 6, source=plain)
    name = "model.layers.1.mlp.router.weight"  # the first layer's router has seen other inputs
    ours, theirs = (weights(f)[name] for f in (second, alone))
    assert not torch.allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=pytest.mark.slow if f == "qwen3" else pytest.mark.full)
        for f in tiny.FAMILIES
    ],
)
def test_every_family_in_bfloat16_is_computed_in_float32(family, convert, weights, tmp_path):
    half, whole = tmp_path / "half", tmp_path / "whole"
    calibrating.write(half, tiny.dense_model(family).bfloat16())
    shutil.copytree(half, whole)
    wide = {name: tensor.float() for name, tensor in weights(half).items()}
    save_file(wide, whole / "model.safetensors", {"format": "pt"})
    found = [weights(convert("moh", "--dtype", "float32", source=f)[0]) for f in (half, whole)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    rounded = weights(convert("moh", source=half)[0])["model.layers.0.self_attn.router.weight"]
    assert rounded.dtype == torch.bfloat16


def test_a_plan_says_what_would_be_fitted_and_fits_nothing(moe_upcycle, plain, texts, tmp_path):
    given = ("--source", plain, "--out", tmp_path / "out", "--calibrate", texts[0], "--dry-run")
    result = moe_upcycle("moh", *given, "--refit")
    assert result.code == 0 and "calibrate:" not in result.err
    assert "ridge router, fitted to text" in result.out
    assert "to be fitted to text: what 9 heads of each attention are worth" in result.out
    assert not (tmp_path / "out.partial").exists()
    described = json.loads(moe_upcycle("uoe", "--mlp-experts", 6, *given, "--json").out)
    assert "which neurons belong together, 16 of them always on" in described["fitted"][0]


REFUSALS = {
    "no text": (("moh", "--router", "calibrated"), "need --calibrate FILE"),
    "text for nothing": (("moh", "--router", "qnorm", "TEXT"), "nothing else is fitted"),
    "tokens for nothing": (
        ("split", "--num-experts", 4, "--top-k", 2, "--partition", "activation", "TEXT", *TOKENS),
        "--calibration-tokens 1500 is for what is fitted",
    ),
    "refit": (("moh", "--refit"), "--refit is for --router calibrated, and the router is qnorm"),
    "target": (("moh", "--target", "norm"), "--target norm is for --router calibrated"),
    "budget": (
        ("moh", "--budget", "layer", "--router", "two_stage"),
        "--budget layer is for --router calibrated, and the router is two_stage",
    ),
    "refit of slices": (("uoe", "--mlp-experts", 4, "--refit"), "--refit is for --router calib"),
    "mean of none": (("moh", "--mean-heads", 0, "TEXT"), "--mean-heads 0 must be more than 0"),
    "mean of many": (("moh", "--mean-heads", 10, "TEXT"), "--mean-heads 10 must be .* at most 9"),
    "mean below the shared": (
        ("moh", "--budget", "layer", "--mean-heads", 2, "TEXT"),
        "--mean-heads 2 must be at least 3 and at most 9",
    ),
    "mean of top-k": (
        ("moh", "--budget", "topk", "--mean-heads", 5, "TEXT"), "--mean-heads 5 is for --budget"
    ),
    "k of a threshold": (("moh", "--top-k", 5, "TEXT"), "--top-k 5 is for --budget topk"),
    "shared of a threshold": (
        ("moh", "--shared", "calibrated", "TEXT"), "not for --budget threshold"
    ),
    "k of too few": (
        ("moh", "--budget", "topk", "--shared-heads", 6, "--top-k", 4, "TEXT"),
        "--top-k 4 must be between 1 and 3",
    ),
    "budget by chance": (("uoe", "--mlp-experts", 4, "--mode", "budget"), "needs --router calib"),
    "mean without budget": (
        ("uoe", "--mlp-experts", 4, "--mean-experts", 2), "--mean-experts 2 needs --mode budget"
    ),
    "mean of many slices": (
        ("uoe", "--mlp-experts", 4, "--mode", "budget", "--mean-experts", 5, "TEXT"),
        "--mean-experts 5 must be more than 0 and at most 4",
    ),
    "another rule": (
        ("uoe", "--mlp-experts", 4, "--mode", "sequence", "TEXT"),
        "--mode sequence has no calibrated router",
    ),
    "drawn and fitted": (
        ("split", "--num-experts", 4, "--top-k", 2, "--router-init", "zero", "TEXT"),
        "a calibrated router is not drawn",
    ),
    "few tokens": (
        ("moh", "TEXT", "--calibration-tokens", 100),
        "--calibration-tokens 100: a router of 72 .* a row needs at least 2 for each, 146",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_makes_no_sense_is_refused_in_a_line(case, refused, plain, texts):
    arguments, message = REFUSALS[case]
    given = [x for a in arguments for x in (("--calibrate", texts[0]) if a == "TEXT" else (a,))]
    found = refused(2, *given, "--source", plain, "--no-verify")
    assert len(found.strip().splitlines()) == 1, found
    import re

    assert re.search(message, found), found


def test_texts_that_do_not_suit_the_model_are_refused(refused, plain, tmp_path):
    def refusal(content, source=plain, name="text.txt", code=2):
        (tmp_path / name).write_text(content)
        calibrate = ("--calibrate", tmp_path / name)
        return refused(code, "moh", *calibrate, "--source", source, "--no-verify")

    assert "gives 50 tokens" in refusal("x" * 50) and "at least 2 for each, 146" in refusal(
        "x" * 50
    )
    assert "50% of its tokens are unknown" in refusal("a " * 500)
    assert 'line 2 is no object with a "text"' in refusal('{"text": "abc"}\n{}', name="t.jsonl")
    assert "line 1 is no Unicode text" in refusal('{"text": "abc\\ud800"}', name="t.jsonl")
    assert "cannot be read" in refused(
        2, "moh", "--calibrate", tmp_path / "none", "--source", plain, "--no-verify"
    )
    loud = tiny.dense_model()  # sure of itself, and wrong
    loud.model.norm.weight.data *= 100
    loud.save_pretrained(tmp_path / "loud")
    tiny.tokenizer().save_pretrained(tmp_path / "loud")
    for target in ("norm", "loss"):
        (tmp_path / "text.txt").write_text(calibrating.letters(0))
        message = refused(
            2, "moh", "--target", target, "--calibrate", tmp_path / "text.txt",
            "--source", tmp_path / "loud", "--no-verify",
        )  # fmt: skip
        assert "has perplexity" in message and "97 tokens has 97 and 194" in message


def test_values_that_are_not_finite_name_their_layer(refused, texts, tmp_path):
    model = tiny.dense_model()
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e30
    folder = calibrating.write(tmp_path / "model", model)
    message = refused(3, "moh", "--calibrate", texts[0], "--source", folder, "--no-verify")
    assert "layer 1 gives values that are not finite" in message


def test_documents_begin_windows_and_nothing_is_padded(plain, tmp_path):
    lines = [calibrating.letters(seed, count) for seed, count in ((0, 700), (1, 30), (2, 300))]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n\n")
    windows = calibrating.windows(plain, file, 1000)
    assert [len(w) for w in windows] == [512, 188, 30, 270]
    decode = tiny.tokenizer().decode
    assert decode(windows[2]) == lines[1] and decode(windows[3]) == lines[2][:270]


@pytest.mark.parametrize("case", ["threshold", "topk", "slices", "budget"])
def test_choices_are_those_of_the_conversions(case, convert, plain):
    """Masks on the source's outputs are what a converted model computes, ours and the paper's."""
    recipe, *options = RECIPES[case]
    out, result = convert(recipe, *options, source=plain, verify=True)
    proof = Receipt.read(out).verification
    held_out, documentation = proof["choices"]
    assert held_out["dense"] == pytest.approx(proof["perplexity"]["parent"], rel=2e-5)
    ours = "refit" if "--refit" in options else "calibrated"
    assert held_out[ours] == pytest.approx(proof["perplexity"]["converted"], rel=2e-5)
    assert ("refit" in held_out) == (ours == "refit")
    if ours == "refit":
        without = [option for option in options if option != "--refit"]
        as_chosen, _ = convert(recipe, *without, source=plain, verify=True)
        found = Receipt.read(as_chosen).verification["perplexity"]["converted"]
        assert held_out["calibrated"] == pytest.approx(found, rel=2e-5)
    assert held_out["oracle"] != held_out["calibrated"] != held_out["dense"]
    assert documentation["text"] == "Python documentation" and "perplexity of choices" in result.out
    if recipe == "moh":
        paper, _ = convert("moh", "--router", "qnorm", source=plain, verify=True, calibrate=False)
        found = Receipt.read(paper).verification["perplexity"]["converted"]
        assert held_out["paper"] == pytest.approx(found, rel=2e-5)
        assert held_out["calibrated"] != pytest.approx(found, rel=2e-5)  # negative control


def test_the_best_choice_goes_by_what_units_add(planted, tmp_path):
    """By hand: a dead head is off, one that always counts on."""
    fits = Fits(parts=[Part(name="attention", units=9, keep=5, measure="norm")])
    text = calibrating.windows(planted, calibrating.text(tmp_path / "text.txt"))
    given = Source.open(planted), [0], fits, text, planted, "key", tmp_path / "journal", Alone()
    calibrate(*given, quiet=True)
    masks = Masks(fits.parts, fits.known, fits.bars, "oracle")
    model = load(planted)
    seen = []

    def mask(part, index, entered, inputs):
        seen.append(masks.of(part, index, entered, inputs))
        weight = model.model.layers[0].self_attn.o_proj.weight
        heads = inputs.view(-1, 9, 1, 8) * weight.T.view(9, 8, -1).transpose(1, 2)
        worth = heads.sum(-1).norm(dim=-1) / entered.norm_T1
        wanted = (worth >= fits.bars["attention"]).repeat_interleave(8, dim=1)
        near = ((worth - fits.bars["attention"]).abs() < 1e-5).repeat_interleave(8, dim=1)
        assert ((seen[-1] > 0) == wanted)[~near].all()

    with masking(model, fits.parts, [0], mask), torch.no_grad():
        model(torch.cat([window[None] for window in text[:1]]))
    on = seen[0].view(-1, 9, 8)[:, :, 0]
    assert on[:, ALWAYS].all() and not on[:, DEAD].any()
    assert masks.kept[0] == pytest.approx(5, abs=0.5)
