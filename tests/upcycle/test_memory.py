"""A checkpoint of any size passes through memory in slices, and what is unchanged is linked."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from invoke import moe
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moe.upcycle.source import hash_file

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
HIDDEN = 1024
VOCABULARY = 600_000  # embeddings of 1.2 GB in bfloat16
INNER = 70_000  # matrices of 0.14 GB

# Memory above what the imports took, as the kernel counts it: the peak since it was reset.
METER = """
    import json, sys
    sys.path[:0] = [{tests!r}]
    import moe.upcycle.command, torch
    from invoke import moe
    from safetensors import safe_open

    def memory(field):
        with open("/proc/self/status") as status:
            return next(int(s.split()[1]) * 1024 for s in status if s.startswith(field))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before = memory("VmRSS")
    {body}
    print(json.dumps(memory("VmHWM") - before))
"""


def shapes(vocabulary: int, inner: int) -> dict[str, tuple[int, ...]]:
    layer = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    layer |= {f"mlp.{n}_proj": (inner, HIDDEN) for n in ("gate", "up")}
    layer |= {"mlp.down_proj": (HIDDEN, inner)}
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,))
    rest = {"embed_tokens": (vocabulary, HIDDEN), "norm": (HIDDEN,)}
    names = {f"model.{n}.weight": s for n, s in rest.items()}
    return names | {f"model.layers.0.{n}.weight": s for n, s in layer.items()}


def write_hole(folder: Path, vocabulary: int, inner: int) -> Path:
    """A one-layer Llama of zeros whose weights are a hole in a file, so they cost no disk."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    header, offset = {}, 0
    for name, shape in shapes(vocabulary, inner).items():
        stop = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A Llama with one tensor of 1.2 GB."""
    assert 2 * VOCABULARY * HIDDEN > 1.2 * GB
    return write_hole(tmp_path_factory.mktemp("large") / "model", VOCABULARY, inner=1024)


def peak(body: str) -> int:
    """Bytes that `body` needed at most, in a process of its own."""
    code = textwrap.dedent(METER).format(
        tests=str(ROOT / "tests"), body=textwrap.dedent(body).strip()
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory"
)


@pytest.mark.slow
def test_a_tensor_of_more_than_a_gigabyte_needs_less(large, tmp_path):
    out = tmp_path / "out"
    arguments = ("upcycle", "copy", "--source", str(large), "--out", str(out),
                 "--num-experts", 4, "--top-k", 2, "--no-verify")  # fmt: skip
    used = peak(f"assert moe(*{arguments!r}).code == 0")
    assert 0.05 * GB < used < GB, f"{used / GB:.2f} GB"
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    shutil.rmtree(out)  # pytest would keep it for three runs
    assert written > 1.2 * GB


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_four_models_of_smollm2s_size_are_mixed_in_bounds(kv, tmp_path):
    """Four folders of 0.27 GB with weights of their own; the result would be twice the bound."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        names = {n: list(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    names.pop("lm_head.weight")
    sources = []
    for number in range(4):
        folder = tmp_path / f"source-{number}"
        config.save_pretrained(folder)
        tensors = {n: torch.full(s, 0.01 * number, dtype=torch.bfloat16) for n, s in names.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        del tensors
        sources += ["--source", str(folder)]
    out = tmp_path / "out"
    arguments = ("upcycle", "bam", *sources, "--kv", kv, "--out", str(out), "--no-verify")
    used = peak(f"assert moe(*{arguments!r}).code == 0")
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    shutil.rmtree(out)
    assert written > 0.8 * GB and used < 0.6 * GB, f"{used / GB:.2f} GB"


@pytest.mark.parametrize(
    "diversify",
    [
        pytest.param("drop:0.5", marks=pytest.mark.slow),
        pytest.param("noise:0.1", marks=pytest.mark.full),
    ],
)
def test_drawing_needs_no_more(diversify, tmp_path):
    source, out = write_hole(tmp_path / "source", 1000, INNER), tmp_path / "out"
    arguments = ("upcycle", "copy", "--source", str(source), "--out", str(out), "--num-experts", 1,
                 "--top-k", 1, "--no-verify", "--diversify", diversify)  # fmt: skip
    used = peak(f"assert moe(*{arguments!r}).code == 0")
    shutil.rmtree(out)
    assert used < GB, f"{used / GB:.2f} GB"


@pytest.mark.slow
def test_the_meter_sees_a_tensor_that_is_loaded_whole(large):
    """Negative control: the same meter, a program that holds the tensor."""
    used = peak(f"""with safe_open({str(large / "model.safetensors")!r}, "pt") as file:
        file.get_tensor("model.embed_tokens.weight").clone()""")
    assert used > GB, f"{used / GB:.2f} GB"


@pytest.mark.slow
def test_a_conversion_of_heads_links_what_it_leaves(large, tmp_path):
    """Neither the gigabyte nor a moment of writing it: the same file under another name."""
    before = (large / "model.safetensors").stat()
    out = tmp_path / "out"
    assert moe("upcycle", "moh", "--source", large, "--out", out, "--no-verify").code == 0
    after = (out / "model.safetensors").stat()
    assert after.st_ino == before.st_ino and after.st_nlink == before.st_nlink + 1
    assert after.st_mtime_ns == before.st_mtime_ns


def test_sources_are_untouched_and_linked_files_shared(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny.dense_model("llama").save_pretrained(source, max_shard_size="60KB")

    def state() -> dict[str, tuple[str, int, int, int]]:
        files = sorted(source.iterdir())
        return {p.name: (hash_file(p), s.st_mtime_ns, s.st_mode, s.st_size)
                for p in files for s in [p.stat()]}  # fmt: skip

    before = state()
    for recipe, options in (
        ("moh", ()),
        ("copy", ("--num-experts", 2, "--top-k", 1, "--layers", "1")),
    ):
        target = out / recipe
        result = moe(
            "upcycle", recipe, "--source", source, "--out", target, "--no-verify", *options
        )
        assert result.code == 0, result.err
        assert state() == before
        inodes = {p.stat().st_ino: p for p in source.glob("*.safetensors")}
        linked = [p for p in target.glob("*.safetensors") if p.stat().st_ino in inodes]
        assert all(p.stat().st_nlink > 1 for p in linked)
        assert len(linked) == len(inodes) if recipe == "moh" else 0 < len(linked) < len(inodes)
        other = [p for p in target.iterdir() if p not in linked]
        assert all(p.stat().st_nlink == 1 for p in other), "only weights may be shared"
