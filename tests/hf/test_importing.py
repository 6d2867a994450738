"""`moe import`: GGUF files and folders become folders of safetensors, or nothing at all."""

import json
import math
import pickle
import shutil
from pathlib import Path

import gguf
import numpy
import pytest
import tiny
import torch
import toy_gguf
from invoke import moe
from safetensors.torch import load_file, save_file
from toy_gguf import toy_tokenizer, unpermute, write_toy_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe.hf.gguf_file import ROPE_FACTORS
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import hash_file

HEADS = {"attn_q": 9, "attn_k": 3}
PYTHON = Path(json.__file__).read_text()
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The GGUF file, its weights before rounding, and the folder that it was imported to."""
    folder = tmp_path_factory.mktemp("toy")
    weights = write_toy_gguf(folder / "toy.gguf")
    result = moe("import", folder / "toy.gguf", "--out", folder / "out")
    assert result.code == 0, result.err
    return folder / "toy.gguf", weights, folder / "out"


@pytest.fixture
def dense(tmp_path) -> Path:
    """A Llama folder with what lies beside weights, to be damaged."""
    folder = tmp_path / "dense"
    tiny.dense_model("llama").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def refused(tmp_path):
    """Import, demand the exit code, one line and that nothing is left; returns the line."""

    def call(code: int, source: Path) -> str:
        before = sorted(tmp_path.iterdir())
        result = moe("import", source, "--out", tmp_path / "out")
        assert result.code == code, result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        assert sorted(tmp_path.iterdir()) == before
        return result.err

    return call


def dequantised(path: Path) -> dict[str, numpy.ndarray]:
    """The file's tensors by gguf's own hand, query and key rows in transformers' order."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        found[tensor.name] = unpermute(values, HEADS[kind]) if kind in HEADS else values
    return found


def stored_names(weights: dict[str, numpy.ndarray]) -> dict[str, str]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    return {name: names.get_name(name, (".weight",)) for name in weights}


def test_gguf_values_are_the_dequantised_ones(toy):
    path, weights, out = toy
    expected, actual = dequantised(path), load_file(out / "model.safetensors")
    assert actual.keys() == weights.keys()
    for name, stored in stored_names(weights).items():
        assert actual[name].dtype == torch.float32
        assert numpy.array_equal(actual[name].numpy(), expected[stored]), name
        error = numpy.linalg.norm(actual[name].numpy() - weights[name])
        assert error < 0.1 * numpy.linalg.norm(weights[name]), name


def test_rows_left_as_llama_cpp_has_them_would_be_noticed(toy):
    """Negative control: without the permutation query rows are far from the original ones."""
    _, weights, out = toy
    name = "model.layers.0.self_attn.q_proj.weight"
    actual = load_file(out / "model.safetensors")[name].numpy()
    error = numpy.linalg.norm(toy_gguf.permute(actual, 9) - weights[name])
    assert error > numpy.linalg.norm(weights[name])


def test_gguf_becomes_a_plain_model_of_the_same_config(toy):
    _, weights, out = toy
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == toy_gguf.EPS
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == toy_gguf.ROPE_THETA
    assert config["max_position_embeddings"] == toy_gguf.CONTEXT
    assert config["tie_word_embeddings"] is True and config["model_type"] == "llama"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original = AutoModelForCausalLM.from_config(model.config).eval()
    original.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, actual = original(ids).logits, model(ids).logits
    assert (actual - expected).norm() < 0.3 * expected.norm()


def test_gguf_tokenizer_and_chat_template_come_along(toy):
    tokenizer = AutoTokenizer.from_pretrained(toy[2])
    ids = tokenizer(PYTHON)["input_ids"]
    assert ids == toy_tokenizer(768).encode(PYTHON).ids and len(ids) < 0.6 * len(PYTHON)
    assert tokenizer.decode(ids) == PYTHON
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_end|>")["input_ids"] == [2] and tokenizer.eos_token == "<|im_end|>"


def test_the_receipt_names_the_file_and_verify_checks_it(toy, tmp_path):
    path, weights, out = toy
    receipt = Receipt.read(out)
    (step,) = receipt.steps
    assert step["recipe"] == "import"
    assert step["sources"][0]["files"]["toy.gguf"]["xxh3"] == hash_file(path)
    assert receipt.tensors.keys() == weights.keys()
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < receipt.files.keys()
    sound = moe("verify", out)
    assert sound.code == 0 and "not in the receipt" not in sound.out
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "notes.txt").write_text("mine")
    added = moe("verify", copy)
    assert added.code == 0 and "not in the receipt, so not checked: notes.txt" in added.out
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    result = moe("verify", copy)
    assert result.code == 3 and "model.norm.weight" in result.err


@pytest.mark.parametrize("options", [{"quantization": "Q8_0", "tied": False}, {"layers": 1}])
def test_other_layouts_are_read(options, tmp_path):
    weights = write_toy_gguf(tmp_path / "toy.gguf", **options)
    arguments = (tmp_path / "toy.gguf", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert moe("import", *arguments).code == 0
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == weights.keys()
    assert {t.dtype for t in actual.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_truncated_gguf_is_refused_wherever_it_ends(toy, refused, tmp_path):
    data = toy[0].read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in (0, 3, 20, 1000, 20_000, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        assert "bad.gguf" in refused(2 if size < 4 else 3, bad)
    bad.write_bytes(b"GGML" + data[4:])
    assert "not a GGUF file" in refused(2, bad)


def rewritten(path: Path, target: Path, fields=(), drop=(), extra=()) -> Path:
    """The GGUF file with string fields set, tensors left out and vectors added."""
    reader = gguf.GGUFReader(path)
    fields = dict(fields)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for name, value in fields.items():
        writer.add_string(name, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in extra:
        writer.add_tensor(name, numpy.asarray(values, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"fields": {"general.architecture": "gemma2"}}, 2, "general.architecture='gemma2'"),
        ({"fields": {"general.architecture": "gpt2"}}, 2, "llama, mistral, qwen2, qwen3"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, 2, "rope.scaling.type='yarn'"),
        ({"extra": [("rope_freqs.weight", [8.0] * 16)]}, 2, "rope_freqs.weight"),
        ({"extra": [("blk.0.attn_q.bias", [1.0] * 288)]}, 2, "blk.0.attn_q.bias"),
        ({"drop": ["blk.1.ffn_up.weight"]}, 3, "blk.1.ffn_up.weight"),
        ({"drop": ["output_norm.weight"],
          "extra": [("output_norm.weight", [float("nan")] * 288)]}, 3, "model.norm.weight"),
    ],
)  # fmt: skip
def test_what_the_result_could_not_hold_is_refused(change, code, message, toy, refused, tmp_path):
    """transformers drops these without a word, or draws what is missing."""
    assert message in refused(code, rewritten(toy[0], tmp_path / "bad.gguf", **change))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_recovered(factor, toy, tmp_path):
    """llama.cpp's converter keeps it as factors, by the formula of its own, written out here."""
    theta, size, factors = toy_gguf.ROPE_THETA, 32, []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    assert 1 < sorted(set(factors))[1] < factor  # one in between
    scaled = rewritten(toy[0], tmp_path / "scaled.gguf", extra=[(ROPE_FACTORS, factors)])
    assert moe("import", scaled, "--out", tmp_path / "out").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = [theta ** (-i / size) for i in range(0, size, 2)] / numpy.asarray(factors)
    numpy.testing.assert_allclose(model.model.rotary_emb.inv_freq, expected, rtol=1e-5)
    assert model.config.rope_parameters["factor"] == factor
    assert model.config.rope_parameters["rope_theta"] == theta


def test_rewriting_alone_breaks_nothing(toy, tmp_path):
    """Negative control of the test above."""
    same = rewritten(toy[0], tmp_path / "same.gguf")
    assert moe("import", same, "--out", tmp_path / "out").code == 0
    weights = tmp_path / "out" / "model.safetensors"
    assert hash_file(weights) == hash_file(toy[2] / "model.safetensors")


def test_a_folder_is_taken_over_bit_by_bit(dense, tmp_path):
    out = tmp_path / "out"
    assert moe("import", dense, "--out", out).code == 0
    assert hash_file(out / "model.safetensors") == hash_file(dense / "model.safetensors")
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    before, after = (json.loads((f / "config.json").read_text()) for f in (dense, out))
    assert before.items() <= after.items()
    assert after["rope_theta"] == 5e5 and after["rope_scaling"]["rope_type"] == "llama3"
    assert moe("verify", out).code == 0


@pytest.mark.parametrize("older", [False, True])
def test_a_folder_in_another_dtype(older, dense, tmp_path):
    if older:
        config = json.loads((dense / "config.json").read_text())
        config["torch_dtype"] = config.pop("dtype")
        (dense / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert moe("import", dense, "--out", out, "--dtype", "bfloat16").code == 0
    before, after = (load_file(f / "model.safetensors") for f in (dense, out))
    assert all(torch.equal(after[n], t.bfloat16()) for n, t in before.items())
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert moe("verify", out).code == 0


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_unopened(name, refused, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").mkdir, ())

    (tmp_path / name).write_bytes(pickle.dumps({"weight": Trap()}))
    message = refused(2, tmp_path / name)
    assert name in message and "run code" in message


def test_a_folder_of_pickles_is_refused(dense, refused):
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    message = refused(2, dense)
    assert "pytorch_model.bin" in message and "safetensors and GGUF" in message


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "gemma2", "olmoe", "phi", "phi3", "granite"])
def test_other_families_are_refused_by_name(kind, dense, refused):
    (dense / "config.json").write_text(json.dumps(AutoConfig.for_model(kind).to_dict()))
    message = refused(2, dense)
    assert f"model_type='{kind}'" in message and "llama, mistral, qwen2, qwen3" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "no_such"}, "no_such"),
    ],
)
def test_configs_name_the_field_in_the_way(fields, message, dense, refused):
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, **fields}))
    assert message in refused(2, dense)


def test_damaged_folders_are_refused(dense, refused, tmp_path):
    file = dense / "model.safetensors"
    sound, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(sound[:-100])
    assert "truncated inside model.norm.weight" in refused(3, dense)
    save_file({n: t for n, t in tensors.items() if n != UP}, file, {"format": "pt"})
    assert UP in refused(3, dense)
    save_file({**tensors, UP: tensors[UP][:-1].clone()}, file, {"format": "pt"})
    assert "its config says (64, 72)" in refused(3, dense)
    tensors[UP][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    result = moe("import", dense, "--out", tmp_path / "out")
    assert result.code == 3 and f"{file}: {UP} holds 1 values" in result.err
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_and_what_is_there_already(toy, dense, refused, tmp_path):
    assert "no such file or folder" in refused(2, tmp_path / "nothing")
    assert "no config.json" in refused(2, tmp_path)
    assert "Give the folder" in refused(2, dense / "model.safetensors")
    (tmp_path / "out").mkdir()
    for source in (toy[0], dense):
        assert "exists" in refused(2, source)
    assert not list((tmp_path / "out").iterdir())


def test_the_history_of_a_folder_is_kept(dense, tmp_path):
    options = ("--no-verify", "--out", tmp_path / "moh")
    assert moe("upcycle", "moh", "--source", dense, *options).code == 0
    assert moe("import", tmp_path / "moh", "--out", tmp_path / "out").code == 0
    steps = json.loads((tmp_path / "out" / "receipt.json").read_text())["steps"]
    assert [step["recipe"] for step in steps] == ["moh", "import"]
