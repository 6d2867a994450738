"""A GGUF file, a model folder or a hub id as a folder of safetensors with a receipt.

import_model("SmolLM2-135M-Instruct.Q4_1.gguf", Path("smollm2"), dtype=None)
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe.errors import MoeError, UserError
from moe.hf.families import routed_config
from moe.hf.gguf_file import read_gguf
from moe.hf.layouts import has_shared_expert, routed_plan
from moe.hf.native import HOMES, from_native
from moe.jsonfile import read_json
from moe.model import RoutedLlamaConfig
from moe.upcycle import writer
from moe.upcycle.receipt import Receipt, seal, versions
from moe.upcycle.recipes import unchanged
from moe.upcycle.source import PICKLES, Source, hash_file
from moe.upcycle.tokenizer import keep_class


def import_model(source: str, out: Path, dtype: torch.dtype | None = None) -> Receipt:
    """Bring `source` to `out`. A GGUF file is dequantised, into float32 unless told otherwise.

    Raises UserError where it is no LLaMA-like model or cannot be read, Corrupt where damaged.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            advice = "Give the folder that holds it and its config.json."
            if path.suffix in PICKLES:
                advice = (
                    "Pickled weights can run code when loaded: convert them where you trust them, "
                    "with save_pretrained."
                )
            raise UserError(
                f"{path}: only GGUF files and folders of safetensors are read. {advice}"
            )
        return _import_gguf(path, out, dtype or torch.float32)
    return _import_folder(path if path.is_dir() else _download(source), source, out, dtype)


def _import_gguf(path: Path, out: Path, dtype: torch.dtype) -> Receipt:
    step = _step(str(path), {path.name: path}, dtype)
    staging = writer.Staging(out, writer.fingerprint({**step, "created": None}))
    staging.open()
    try:
        model, tokenizer = read_gguf(path, dtype)
        routed_config(model.config)  # says what stands in the way, if anything
        with writer.building(staging):
            model.save_pretrained(staging.folder, max_shard_size=writer.SHARD_BYTES)
            tokenizer.save_pretrained(staging.folder)
            return _publish(staging, step)
    except MoeError:  # nothing in the folder could be of use to another run
        staging.discard()
        raise


def _import_folder(folder: Path, name: str, out: Path, dtype: torch.dtype | None) -> Receipt:
    source = Source.open(folder)
    native = source.config.model_type in HOMES
    config, plan = _routed(source) if native else (None, unchanged(source))
    plan = writer.cast(plan, dtype)
    step = _step(name, {n: folder / n for n in ("config.json", *source.files)}, dtype)
    staging = writer.Staging(out, writer.fingerprint({**step, "created": None}))
    staging.open()
    written = writer.write_weights(plan, [source], staging)
    with writer.building(staging):
        writer.copy_side_files(folder, staging.folder)
        if config is None:
            _copy_config(folder, staging.folder, dtype)
        else:
            config.dtype = next(e.dtype for e in plan.values() if e.dtype.is_floating_point)
            config.save_pretrained(staging.folder)
            keep_class(folder, staging.folder, staging.folder)
        known = Receipt.read(folder)
        return _publish(staging, step, written, known.steps if known else ())


def _copy_config(folder: Path, target: Path, dtype: torch.dtype | None) -> None:
    fields = read_json(folder / "config.json")
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
        fields.pop("torch_dtype", None)  # the same field's older name
    fields.pop("auto_map", None)  # names code, which is not copied
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _routed(source: Source) -> tuple[RoutedLlamaConfig, writer.Plan]:
    """A folder of one of transformers' mixtures as a RoutedLlama."""
    family = source.config.model_type
    try:
        shared = family != "qwen2_moe" or has_shared_expert(source.tensors)
        config = from_native(source.config, shared)
        config.architectures = ["RoutedLlamaForCausalLM"]
        return config, routed_plan(source.tensors, config, family)
    except MoeError as error:
        raise type(error)(f"{source.folder}: {error}") from None


def _publish(
    staging: writer.Staging,
    step: dict[str, Any],
    written: writer.Written | None = None,
    earlier: Sequence[dict[str, Any]] = (),
) -> Receipt:
    write_both_ropes(staging.folder / "config.json")
    receipt = Receipt(steps=[*earlier, step])
    if written is not None:
        receipt.files, receipt.tensors = written.files, written.tensors
    seal(staging.folder, receipt)
    staging.publish()
    return receipt


def _step(name: str, files: dict[str, Path], dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        "recipe": "import",
        "options": {"dtype": str(dtype).removeprefix("torch.") if dtype else None},
        "versions": versions(),
        "sources": [
            {
                "path": name,
                "files": {
                    n: {"xxh3": hash_file(p), "bytes": p.stat().st_size} for n, p in files.items()
                },
            }
        ],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_both_ropes(path: Path) -> None:
    """Spell the rope settings in the way of transformers 4 too.

    Readers of the old spelling fall back on theta 10000 without a word when it is not there.
    """
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        config["rope_scaling"] = None if rope.get("rope_type") == "default" else scaling
        path.write_text(json.dumps(config, indent=2) + "\n")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{name}: no such file or folder, and not a hub id.") from error
    except Exception as error:  # no network, no such repository, no access
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such file or folder, and the hub did not give it: {reason}"
        ) from error
