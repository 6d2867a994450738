"""What is read from files that others have written: how each is read, and what a sound one is."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import tiny
import toy_gguf
import xxhash
import yaml

from moe import config
from moe.checkpoint.manifest import Manifest
from moe.data.manifest import read_manifest
from moe.engines import deepspeed_json
from moe.hf import gguf_file
from moe.hf.kernels_command import read_table
from moe.tune.trace import Trace
from moe.tune.tuning import Tuning
from moe.upcycle.receipt import Receipt, check
from moe.upcycle.source import Source, read_config, read_header, weight_files

XXH3 = "0" * 32
RUN = {
    "model": "m", "out": "o", "seed": 1, "engine": "native",
    "data": {"train": [{"path": "p", "weight": 1.0}], "sequence_length": 32},
    "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "trainable": ["*"]},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "schedule": {"kind": "wsd"},
    "parallel": {"expert": 2}, "checkpoint": {"every": 5, "keep": 2},
}  # fmt: skip
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
RECEIPT = {
    "steps": [{"recipe": "moh", "options": {}}],
    "files": {"model.safetensors": {"xxh3": XXH3, "bytes": 3}},
    "tensors": {"a": {"xxh3": XXH3, "dtype": "float32", "shape": [2, 3]}},
    "verification": None,
}
TUNING = {
    "format": "moe-tuning/1", "layer_index": "absolute", "semantics": "post_zero", "scale": 1.0,
    "experts": [{"layer": 0, "expert": 1, "part": "mlp", "action": "gain:0.5", "found": {}}],
    "model": {"name": "x", "config": XXH3, "weights": XXH3}, "shape": [[0, "mlp", 4, 2]],
    "method": {}, "created_from": XXH3,
}  # fmt: skip
MANIFEST = {
    "format": 2, "files": {"rank-0.safetensors": {"xxh3": XXH3, "bytes": 32, "header": 8}},
    "progress": {
        "step": 2, "consumed_samples": 16, "updates": 1, "config": {"data": {}}, "data_step": 0,
        "reference": [[[0.5, 0.5], None]], "origin": [{"recipe": "moh", "options": {}}],
        "guard": {"skipped": 1, "clean": [[1.0, 2.0]], "row": [[2, 8, 16]]}, "ranks": 1,
    },
    "tensors": {"parameter/a": {"kind": "parameter", "dtype": "float32", "shape": [2, 3],
        "pieces": [{"file": "rank-0.safetensors", "offset": [0, 0], "shape": [2, 3], "start": 8,
                    "xxh3": XXH3}]}},
}  # fmt: skip
INDEX = {
    "metadata": {"total_size": 40},
    "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
}
DATA = {
    "tokenizer": {"name": "t", "xxh3": XXH3}, "bin": {"bytes": 1, "xxh3": XXH3},
    "idx": {"bytes": 1, "xxh3": XXH3}, "sources": ["a"], "documents": 1, "tokens": 1,
}  # fmt: skip
OVERLAY = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": False}
TABLE = {"sm_90": {"bfloat16": {"gemm": {"1024": {"rows": 64}}}}}
SITE = {"layer": 0, "part": "mlp", "name": "l", "kind": "moe", "experts": 2, "top_k": 1,
        "always": [], "mode": None, "groups": 1, "top_groups": 1}  # fmt: skip


def safetensors(header: bytes, length: int | None = None, body: int = 40) -> bytes:
    size = len(header) if length is None else length
    return (size % 2**64).to_bytes(8, "little") + header + bytes(body)


@dataclass(frozen=True)
class Target:
    """`draw` makes an input, `put` stores it where it belongs, `read` is the code under test."""

    draw: Callable[[random.Random], bytes]
    read: Callable[[Path], Any]
    name: str = "input.json"
    prepare: Callable[[Path], Any] = lambda place: None

    def put(self, place: Path, data: bytes) -> Path:
        path = place / self.name
        path.write_bytes(data)
        return path


def json_of(*seeds: Any) -> Callable[[random.Random], bytes]:
    """Trees made wrong, and their text."""

    def draw(chance: random.Random) -> bytes:
        data = mutate.text_of(mutate.change(chance.choice(seeds), chance), chance)
        return mutate.scramble(data, chance) if chance.random() < 0.25 else data

    return draw


def bytes_of(make: Callable[[], bytes]) -> Callable[[random.Random], bytes]:
    made: list[bytes] = []

    def draw(chance: random.Random) -> bytes:
        if not made:
            made.append(make())
        return mutate.scramble(made[0], chance)

    return draw


def draw_run(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.1:  # aliases of aliases
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
        return "\n".join([*lines, "model: *a29"]).encode()
    if kind < 0.15:
        return ("[" * 5000).encode() if kind < 0.13 else b"!!python/object/apply:os.system ['true']"
    data = yaml.safe_dump(mutate.change(RUN, chance)).encode()
    return mutate.scramble(data, chance) if chance.random() < 0.3 else data


def draw_override(chance: random.Random) -> bytes:
    keys = ["model", "train.steps", "data.train.0.path", "data.train.9.x", "optimizer.betas",
            "a" * 99,
            "..", "data.train", "parallel", "train..x", "data.train.-1", "seed.x.y"]  # fmt: skip
    value = json.dumps(mutate.hostile(chance))
    return f"{chance.choice(keys)}={value}".encode()


def read_override(path: Path) -> Any:
    return config.load(
        path.with_name("run.yaml"), path.read_bytes().decode(errors="replace").split("\n")
    )


def draw_header(chance: random.Random) -> bytes:
    text = mutate.text_of(mutate.change(HEADER, chance), chance)
    kind = chance.random()
    if kind < 0.15:
        return safetensors(text, chance.choice((0, 2**63, 2**64 - 1, len(text) + 1, 100 * 2**20)))
    if kind < 0.3:
        return mutate.scramble(safetensors(text), chance)
    return safetensors(text, body=chance.choice((0, 8, 40, 40, 40, 4096)))


def draw_manifest(chance: random.Random) -> bytes:
    """Mostly with a seal that fits."""
    text = json_of(MANIFEST)(chance)
    if chance.random() < 0.1:
        return text
    return f'{{"xxh3": "{xxhash.xxh3_128_hexdigest(text[1:])}", '.encode() + text[1:]


def trace_file(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def draw_trace(chance: random.Random) -> bytes:
    about: Any = {"format": "moe-trace/1", "sites": [SITE], "settings": {}}
    rows: Any = [{"prompt": "p", "label": "a", "response": None}]
    if chance.random() < 0.5:
        about = mutate.change(about, chance)
    elif chance.random() < 0.5:
        rows = mutate.change(rows, chance)
    packed = {k: np.frombuffer(mutate.text_of(v, chance), np.uint8)
              for k, v in (("about", about), ("rows", rows))}  # fmt: skip
    arrays = {"counts": np.ones((1, 2), np.uint32), "mass": np.ones((1, 2), np.float32),
              "tokens": np.ones(1, np.uint32), **packed}  # fmt: skip
    if chance.random() < 0.2:
        arrays[chance.choice(list(arrays))] = np.array([{"a": object}], dtype=object)
    data = trace_file(arrays)
    return mutate.scramble(data, chance) if chance.random() < 0.4 else data


def model_configs() -> list[Any]:
    """Configs of every family that is read, as their JSON."""
    dense = [json.loads(tiny.dense_model(name).config.to_json_string()) for name in tiny.FAMILIES]
    routed = tiny.routed_model(tiny.dense_model("llama"), [tiny.MOH] * 3, [tiny.MOE] * 3)
    return [*dense, json.loads(routed.config.to_json_string())]


def draw_config(chance: random.Random) -> bytes:
    if not _CONFIGS:
        _CONFIGS.extend(model_configs())
    tree = mutate.change(chance.choice(_CONFIGS), chance)
    if chance.random() < 0.3 and isinstance(tree, dict):
        sizes = [k for k, v in tree.items() if isinstance(v, int)]
        if sizes:
            tree[chance.choice(sizes)] = chance.choice((10**9, 2**40, 10**15))
    return mutate.text_of(tree, chance)


_CONFIGS: list[Any] = []


def read_model_config(path: Path) -> Any:
    from moe.hf.inspect import inspect

    read_config(path.parent)
    return inspect(path.parent)


def tokenizer_text() -> bytes:
    return tiny.tokenizer().backend_tokenizer.to_str().encode()


def draw_tokenizer(chance: random.Random) -> bytes:
    if not _TOKENIZER:
        _TOKENIZER.append(json.loads(tokenizer_text()))
    return json_of(_TOKENIZER[0])(chance)


_TOKENIZER: list[Any] = []


def read_tokenizer(path: Path) -> Any:
    """What callers make of it: our own errors, or a reason why there is none."""
    from moe.hf.loading import load_tokenizer as load

    return load(path.parent)


def prepare_shards(place: Path) -> None:
    text = json.dumps(HEADER).encode()
    for name in ("one", "two"):
        (place / f"{name}.safetensors").write_bytes(safetensors(text))


def prepare_model(place: Path) -> None:
    tiny.dense_model("llama").save_pretrained(place)


def read_weights(path: Path) -> Any:
    return [read_header(file) for file in weight_files(path.parent)]


def read_gguf(path: Path) -> Any:
    import torch

    return gguf_file.read_gguf(path, torch.float32)


def gguf_bytes() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.gguf"
        toy_gguf.write_toy_gguf(path, layers=1, hidden=64, heads=2, kv_heads=1, intermediate=64,
                                vocab_size=300)  # fmt: skip
        return path.read_bytes()


def draw_gguf(chance: random.Random) -> bytes:
    """Mostly its header, where counts, kinds and offsets are."""
    if not _GGUF:
        _GGUF.append(gguf_bytes())
    whole, head = _GGUF[0], chance.choice((64, 512, 8192))
    return mutate.scramble(whole[:head], chance) + whole[head:]


_GGUF: list[bytes] = []

TARGETS = {
    "run": Target(draw_run, config.load, "run.yaml"),
    "override": Target(draw_override, read_override, "overrides",
                       lambda place: (place / "run.yaml").write_text(yaml.safe_dump(RUN))),
    "header": Target(draw_header, read_header, "model.safetensors"),
    "receipt": Target(json_of(RECEIPT), lambda p: (Receipt.read(p.parent), check(p.parent)),
                      "receipt.json", prepare_model),
    "tuning": Target(json_of(TUNING), Tuning.read, "tuning.json"),
    "trace": Target(draw_trace, Trace.read, "trace.npz"),
    "manifest": Target(draw_manifest, lambda p: Manifest.read(p.parent), "manifest.json"),
    "index": Target(json_of(INDEX), read_weights, "model.safetensors.index.json", prepare_shards),
    "data": Target(json_of(DATA), lambda p: read_manifest(p.with_suffix("")), "data.json"),
    "overlay": Target(json_of(OVERLAY), deepspeed_json.read),
    "table": Target(json_of(TABLE), read_table),
    "config": Target(draw_config, read_model_config, "config.json"),
    "source": Target(draw_config, lambda p: Source.open(p.parent), "config.json", prepare_model),
    "tokenizer": Target(draw_tokenizer, read_tokenizer, "tokenizer.json"),
    "tokenizer_config": Target(json_of(
        {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["x.T"]},
         "model_max_length": 64, "added_tokens_decoder": {"0": {"content": "<s>"}}}),
        read_tokenizer, "tokenizer_config.json",
        lambda place: (place / "tokenizer.json").write_bytes(tokenizer_text())),
    "gguf": Target(draw_gguf, read_gguf, "model.gguf"),
}  # fmt: skip
