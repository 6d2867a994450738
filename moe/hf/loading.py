"""Models that are there to be used, not converted: a folder or a checkpoint, and its tokenizer.

model = load_model(Path("runs/a/checkpoints/step-500"))
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe.model  # noqa: F401  (registers RoutedLlama)
from moe.checkpoint import manifest, store
from moe.errors import Corrupt, UserError
from moe.upcycle import receipt
from moe.upcycle.source import (
    hash_file,
    read_config,
    read_header,
    require_finite,
    weight_files,
)
from moe.upcycle.tokenizer import refusal


def load_model(folder: Path) -> PreTrainedModel:
    """A model folder or a `step-N` checkpoint, in the dtype its config names, for evaluation.

    Raises UserError where it is neither, Corrupt where it is damaged.
    """
    config = read_config(folder)
    if not store.is_checkpoint(folder):
        return _load_folder(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_shapes(manifest.Manifest.read(folder), folder, model.state_dict())
    weights: dict[str, Any] = dict(store.weights(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    state = model.state_dict()
    missing = [n for n in missing if state[n].is_meta]
    _check_keys(folder, missing, unexpected)
    # what is computed, not stored, is still on the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    require_finite(folder, model.named_parameters())
    return model.eval()


def _load_folder(folder: Path) -> PreTrainedModel:
    for path in weight_files(folder):  # says what is missing, or that it is a pickle
        read_header(path)
    model: PreTrainedModel
    info: dict[str, Any]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False,
            use_safetensors=True,
        )  # fmt: skip
    except SafetensorError as error:
        raise Corrupt(f"{folder}: {error}") from error
    except Exception as error:  # transformers raises what it likes over a bad folder
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{folder}: {reason}") from error
    _check_keys(folder, info["missing_keys"], info["unexpected_keys"])
    require_finite(folder, model.named_parameters())
    return model.eval()


def check_shapes(found: manifest.Manifest, folder: Path, wanted: dict[str, Any]) -> None:
    """Raise Corrupt where a checkpoint's tensors are not of the shapes of its config's model."""
    for key, record in found.tensors.items():
        name = key.split("/", 1)[1]
        if record.kind not in ("parameter", "buffer") or name not in wanted:
            continue
        if (due := tuple(wanted[name].shape)) != record.shape:
            raise Corrupt(f"{folder}: {key} is {record.shape}, its config makes it {due}.")


def _check_keys(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Weights that are not there would be drawn, and their results worth nothing."""
    if missing or unexpected:
        raise UserError(
            f"{folder}: weights do not fit its config: missing {sorted(missing)[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}."
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights. Raises UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes over a bad file
        missing = (
            f"{folder} has no tokenizer that can be read: copy tokenizer.json and "
            "tokenizer_config.json into it."
        )
        raise UserError(refusal(folder, error, missing)) from error


def identity(folder: Path) -> dict[str, str]:
    """Which model that is: its name, and the hashes of its config and of its weights.

    File hashes that a receipt or manifest holds are taken from there; others are read and hashed.
    """
    return {
        "name": folder.name,
        "config": hash_file(folder / "config.json"),
        "weights": _hash_weights(folder),
    }


def _hash_weights(folder: Path) -> str:
    if store.is_checkpoint(folder):
        return hash_file(folder / manifest.NAME)
    known = receipt.Receipt.read(folder)
    written = (folder / receipt.NAME).stat().st_mtime_ns if known else 0
    digest = xxhash.xxh3_128()
    for path in sorted(weight_files(folder)):
        entry = known.files.get(path.name) if known else None
        # what was written after the receipt is not what the receipt tells of
        about = path.stat()
        recorded = about.st_mtime_ns <= written and entry and entry["bytes"] == about.st_size
        found = entry["xxh3"] if entry is not None and recorded else hash_file(path)
        digest.update(f"{path.name} {found}\n".encode())
    return digest.hexdigest()
