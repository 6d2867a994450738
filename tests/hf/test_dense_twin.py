"""`moe export --to dense --calibrate`: experts side by side, their gates frozen to their mean.

Also a union of experts with everything on, which needs no text and changes nothing.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from invoke import Result, moe
from native_folders import difference, export, load, refused, same_tensors, write
from safetensors.torch import load_file
from tiny import MOE, MOH, dense_model, tokenizer, tokens
from transformers import AutoModelForCausalLM

from moe.hf import gates, twin
from moe.upcycle.expression import Read
from moe.upcycle.source import Source

KV = pytest.mark.parametrize("kv", ["expert", "shared"])
BAM = {"kind": "bam", "num_experts": 3}
UNION = {"kind": "uoe", "num_experts": 3, "top_k": 3}
STDLIB = Path(json.__file__).parents[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`sources("llama", 3)`: folders of one family, their weights apart, with a tokenizer."""
    root = tmp_path_factory.mktemp("sources")

    def folders(family: str, count: int) -> list[Path]:
        for seed in range(count):
            if not (path := root / f"{family}-{seed}").exists():
                dense_model(family, seed=seed).save_pretrained(path)
                tokenizer().save_pretrained(path)
        return [root / f"{family}-{seed}" for seed in range(count)]

    return folders


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> SimpleNamespace:
    """Two texts: to calibrate on, and held out."""
    root = tmp_path_factory.mktemp("texts")
    for name, file in (("calibrate", "enum.py"), ("held_out", "heapq.py")):
        shutil.copy(STDLIB / file, root / f"{name}.txt")
    return SimpleNamespace(calibrate=root / "calibrate.txt", held_out=root / "held_out.txt")


def mix(folders: list[Path], out: Path, *options: object) -> Path:
    """`moe upcycle bam` of these folders."""
    given = [word for folder in folders for word in ("--source", folder)]
    result = moe("upcycle", "bam", *given, "--out", out, "--no-verify", *options)
    assert result.code == 0, result.err
    return out


def twin_of(model: Path, texts: SimpleNamespace, out: Path, *options: object) -> dict:
    return export(
        model, "dense", out, "--calibrate", texts.calibrate, "--text", texts.held_out, *options
    )


def with_tokenizer(folder: Path) -> Path:
    tokenizer().save_pretrained(folder)
    return folder


def sharpened(folder: Path) -> Path:
    """The mixture with routers that tell tokens apart: drawn ones give even gates to all."""
    model = load(folder)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def frozen_reference(folder: Path, receipt: dict):
    """The routed model, its routers giving the receipt's numbers, its experts called one by one."""
    model = load(folder)
    for entry in receipt["steps"][-1]["gates"]:
        layer, mean = model.model.layers[entry["layer"]], torch.tensor(entry["mean"])
        if entry["part"] == "attention":
            router = layer.self_attn.router
            router.forward = _constant_heads(router, mean)
        else:
            layer.mlp.forward = _constant_experts(layer.mlp, mean)
    return model


def _constant_heads(router, mean):
    original, one_hot = router.forward, torch.eye(len(mean))

    def forward(x, *rest):
        _, load = original(x, *rest)
        weight, gate = router.weight.data, 0.0
        for expert, factor in enumerate(mean):
            # sure of this expert alone, the router gives 1 to its heads: whose is whose is its say
            router.weight.data = one_hot[expert][:, None] * 1e4 * x[:1].sign()
            gate = gate + factor * original(x[:1], *rest)[0]
        router.weight.data = weight
        return gate.expand(len(x), -1), load

    return forward


def _constant_experts(mlp, mean):
    def forward(x, valid_T, reference_E, memory=None):
        *_, load = mlp.router(x.flatten(0, 1), valid_T, reference_E)
        total = 0.0 if mlp.shared_expert is None else mlp.shared_expert(x)
        for factor, gate_up, down in zip(
            mean, mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True
        ):
            gate, up = (x @ gate_up.T).chunk(2, -1)
            total = total + factor * (torch.nn.functional.silu(gate) * up) @ down.T
        return total, load

    return forward


@KV
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_mixed_with_itself_has_an_exact_twin(family, kv, sources, texts, tmp_path):
    """Gates sum to 1, so any mean is as good as the gates: the twin is the source again."""
    source = sources(family, 1)[0]
    mix([source, source], tmp_path / "bam", "--kv", kv)
    receipt = twin_of(tmp_path / "bam", texts, tmp_path / "out")
    record = receipt["verification"]
    assert record["status"] == "measured" and record["relative_difference"] < 1e-5
    own = load(tmp_path / "out")
    assert own.config.model_type == family
    assert difference(own, load(source)) < 1e-5
    assert own.config.num_attention_heads == 18 and own.config.intermediate_size == 128
    assert own.config.num_key_value_heads == (6 if kv == "expert" else 3)
    stored = json.loads((tmp_path / "out/config.json").read_text())
    assert stored["head_dim"] == 8 and "attention" not in stored and "mlp" not in stored


@KV
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_twin_is_the_model_with_constant_gates(family, kv, sources, texts, tmp_path):
    folder = sharpened(mix(sources(family, 2), tmp_path / "bam", "--kv", kv))
    receipt = twin_of(folder, texts, tmp_path / "out")
    record = receipt["verification"]
    assert record["frozen"]["relative_difference"] < 1e-5
    assert record["relative_difference"] > 0.01  # freezing is lossy here, so a router was at work
    own = load(tmp_path / "out")
    assert difference(own, frozen_reference(folder, receipt)) < 1e-5
    assert difference(own, load(folder)) > 0.01
    ids = tokens(2, 12)
    assert torch.equal(
        own.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True),
        own.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False),
    )


def test_what_was_measured_is_said(sources, texts, tmp_path):
    folder = sharpened(mix(sources("llama", 2), tmp_path / "bam"))
    arguments = ("--calibrate", texts.calibrate, "--text", texts.held_out)
    result = moe("export", folder, "--to", "dense", "--out", tmp_path / "out", *arguments)
    assert result.code == 0, result.err
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    step, record = receipt["steps"][-1], receipt["verification"]
    assert step["exact"] is False and "not the same function" in step["statement"]
    assert step["statement"] in result.out and "nothing claimed" in result.out
    assert record["text"] == "held_out.txt" and step["calibration"]["path"].endswith("brate.txt")
    for name in ("parent", "converted"):
        value = record["perplexity"][name]
        assert value > 1 and f"{name} {value:.3f}" in result.out
    assert [(e["layer"], e["part"]) for e in step["gates"]] == [
        (layer, part) for layer in range(3) for part in ("attention", "mlp")
    ]
    assert all(abs(sum(e["mean"]) - 1) < 1e-5 for e in step["gates"])
    assert moe("verify", tmp_path / "out").code == 0


@torch.no_grad()
def test_the_gates_are_the_mean_over_the_tokens(sources, texts, tmp_path):
    """Against a softmax of each router's own input; unchosen FFN experts count nothing."""
    folder = sharpened(mix(sources("llama", 3), tmp_path / "bam", "--top-k", 2))
    model, seen = load(folder), {}
    for index, layer in enumerate(model.model.layers):
        for part, router in (("attention", layer.self_attn.router), ("mlp", layer.mlp.router)):
            router.register_forward_pre_hook(
                lambda module, inputs, key=(index, part): seen.setdefault(key, []).append(inputs[0])
            )
    ids = gates.calibration_tokens(folder, texts.calibrate, 97)
    measured = gates.mean_gates(model, ids)
    for (index, part), mean in measured.items():
        block = model.model.layers[index]
        router = block.self_attn.router if part == "attention" else block.mlp.router
        expected = torch.softmax(torch.cat(seen[index, part]) @ router.weight.T, -1)
        if part == "mlp":
            kept = expected >= expected.topk(2).values[:, -1:]
            expected = expected * kept / (expected * kept).sum(-1, keepdim=True)
        torch.testing.assert_close(torch.tensor(mean), expected.mean(0), rtol=1e-4, atol=1e-6)


def export_twin(folder: Path, texts: SimpleNamespace, *options: object) -> Result:
    arguments = ("--calibrate", texts.calibrate, "--out", folder.parent / "out", *options)
    return moe("export", folder, "--to", "dense", *arguments)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_gates_of_the_wrong_experts_would_be_noticed(part, sources, texts, tmp_path, monkeypatch):
    """Negative control: means that trade places in the weights."""
    folder = sharpened(mix(sources("llama", 2), tmp_path / "bam", "--kv", "shared"))
    fold = twin.fold

    def permuted(config, plan, means):
        return fold(config, plan, {k: v[::-1] if k[1] == part else v for k, v in means.items()})

    monkeypatch.setattr(twin, "fold", permuted)
    result = export_twin(folder, texts)
    assert result.code == 3 and "gates frozen and does not" in result.err, result
    assert result.err.endswith("Not published.\n") and not (tmp_path / "out").exists()


def test_experts_in_another_order_would_be_noticed(sources, texts, tmp_path, monkeypatch):
    """Negative control: shared keys with the heads of separate ones."""
    folder = sharpened(mix(sources("llama", 2), tmp_path / "bam", "--kv", "shared"))
    init = twin.ColumnsScaled

    def wrong(base, factors, run):
        return init(base, factors[:2], run * 3)

    monkeypatch.setattr(twin, "ColumnsScaled", wrong)
    assert export_twin(folder, texts).code == 3


def test_three_experts_of_a_llama_that_needs_another_family(sources, texts, tmp_path):
    """27 heads do not divide 72: a LlamaConfig refuses what a Mistral computes just the same."""
    source = sources("llama", 1)[0]
    receipt = twin_of(mix([source] * 3, tmp_path / "bam"), texts, tmp_path / "out")
    own = load(tmp_path / "out")
    assert own.config.model_type == "mistral" and own.config.num_attention_heads == 27
    assert "a mistral, which computes the same as a llama" in receipt["steps"][-1]["statement"]
    assert difference(own, load(source)) < 1e-5


def test_experts_of_any_mixture_stand_side_by_side(texts, tmp_path):
    """Dense attention, raw sigmoid weights times a scale, a shared expert, a selection bias."""
    spec = {**MOE, "score": "sigmoid", "renormalise": False, "weight_scale": 1.5}
    spec |= {"shared_intermediate_size": 24, "selection_bias": True, "intermediate_size": 20}
    write(tmp_path / "moe", "llama", None, spec)
    receipt = twin_of(with_tokenizer(tmp_path / "moe"), texts, tmp_path / "out")
    own = load(tmp_path / "out")
    assert own.config.intermediate_size == 4 * 20 + 24
    assert difference(own, frozen_reference(tmp_path / "moe", receipt)) < 1e-5


def test_bfloat16_is_measured_without_a_bound(sources, texts, tmp_path):
    folder = mix(sources("llama", 2), tmp_path / "bam")
    receipt = twin_of(folder, texts, tmp_path / "out", "--dtype", "bfloat16")
    record = receipt["verification"]
    assert record["frozen"]["bound"] is None and record["status"] == "measured"
    assert 1e-5 < record["frozen"]["relative_difference"] < 0.05
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["token_choice", "expert_choice", "sequence"])
def test_a_union_with_everything_on_is_the_plain_model(mode, tmp_path):
    attention = {**UNION, "sink_tokens": 0}
    mlp = {**UNION, "num_experts": 4, "top_k": 4, "mode": mode}
    routed = write(tmp_path / "uoe", "llama", attention, mlp)
    receipt = export(tmp_path / "uoe", "dense", tmp_path / "out")
    step, record = receipt["steps"][-1], receipt["verification"]
    assert step["exact"] is True and "gates" not in step and record["status"] == "pass"
    own = load(tmp_path / "out")
    assert own.config.intermediate_size == 64
    with torch.no_grad():
        ids = tokens(2, 200)
        relative = (own(ids).logits - routed(ids).logits).norm() / own(ids).logits.norm()
    assert relative < 1e-5


def test_a_cut_model_is_put_together_bit_for_bit(sources, tmp_path):
    source = sources("llama", 1)[0]
    options = ("--mlp-experts", 4, "--mlp-top-k", 4, "--attention-experts", 3)
    options += ("--attention-top-k", 3, "--source", source, "--out", tmp_path / "uoe")
    assert moe("upcycle", "uoe", *options).code == 0
    export(tmp_path / "uoe", "dense", tmp_path / "out")
    assert same_tensors(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("attention", "mlp", "routed", "said"),
    [
        (BAM, MOE, {}, ["attention experts (bam) and FFN experts (moe)", "--calibrate FILE"]),
        (
            [BAM, {"kind": "dense"}, MOH],
            [MOE, {"kind": "dense"}, {"kind": "uoe", "num_experts": 4, "top_k": 2}],
            {},
            [
                "27 query heads over 9 in layer 0, 9 query heads over 3 in layers 1, 2",
                "256 neurons in layer 0, 64 neurons in layers 1, 2",
                "attention.top_k=3 leaves out 3 of 9",
                "mlp.top_k=2 leaves out 2 of 4 experts",
                "--calibrate FILE",
            ],
        ),
        (
            [BAM, {**BAM, "kv": "shared"}, BAM],
            None,
            {"block": "parallel"},
            ["27 query heads over 9 in layers 0, 2, 27 query heads over 3 in layer 1", "parallel"],
        ),
        (
            {**UNION, "top_k": 2, "weights": "soft"},
            {**UNION, "mode": "threshold", "output_scale": 2.0},
            {},
            [
                "attention.top_k=2 leaves out 1 of 3",
                "attention.weights=soft",
                "mode=threshold",
                "output_scale=2",
            ],
        ),
    ],
)
def test_everything_in_the_way_is_named_at_once(attention, mlp, routed, said, tmp_path):
    write(tmp_path / "routed", "llama", attention, mlp, routed=routed)
    message = refused(2, with_tokenizer(tmp_path / "routed"), "dense")
    assert all(part in message for part in (*said, "--to remote-code")), message


def test_norms_of_their_own_have_no_place(sources, texts, tmp_path):
    folder = mix(sources("qwen3", 2), tmp_path / "bam")
    message = refused(2, folder, "dense", "--calibrate", texts.calibrate)
    for norm in ("q_norm.weight", "k_norm.weight"):
        assert f"{norm} differs between the heads of layers 0, 1, 2" in message


def test_the_text_to_calibrate_on(sources, texts, tmp_path):
    folder = mix(sources("llama", 2), tmp_path / "bam")
    write(with_tokenizer(tmp_path / "moh"), "llama", {**MOH, "top_k": 6}, None)
    given = ("--calibrate", texts.calibrate)
    link = tmp_path / "link.txt"
    link.symlink_to(texts.calibrate)
    both = refused(2, folder, "dense", *given, "--text", link)
    assert "cannot be verified on it" in both
    assert "has no gates to be frozen" in refused(2, tmp_path / "moh", "dense", *given)
    assert "--to hf freezes no gates" in refused(2, folder, "hf", *given)
    missing = refused(2, folder, "dense", "--calibrate", tmp_path / "none.txt")
    assert "--calibrate" in missing and "cannot be read" in missing
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer to read it with" in refused(2, folder, "dense", *given)


def test_columns_come_in_slices(sources):
    """Every block of rows is what it is in the whole, in the tensor's own dtype."""
    tensor = Source.open(sources("llama", 1)[0]).tensors["model.layers.0.self_attn.o_proj.weight"]
    scaled = twin.ColumnsScaled(Read(tensor), (0.25, 1.5, 0.0), 24)
    whole = scaled.rows(0, 72)
    expected = Read(tensor).rows(0, 72) * torch.tensor([0.25, 1.5, 0.0]).repeat_interleave(24)
    assert torch.equal(whole, expected) and scaled.shape == (72, 72)
    assert torch.equal(torch.cat([scaled.rows(0, 31), scaled.rows(31, 72)]), whole)


def test_a_twin_loads_where_moe_is_not(sources, texts, tmp_path):
    """Its type is transformers' own, so the Auto class needs no code of ours."""
    twin_of(mix(sources("mistral", 2), tmp_path / "bam"), texts, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.models.mistral")


def test_a_twin_is_not_exact_though_nothing_was_verified(sources, texts, tmp_path):
    folder = mix(sources("llama", 2), tmp_path / "bam")
    result = export_twin(folder, texts, "--no-verify")
    assert result.code == 0 and result.out.endswith("not verified\n"), result
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["verification"] is None and receipt["steps"][-1]["exact"] is False
