"""Folders for the tests of native forms: written, exported, loaded and compared."""

import json
from pathlib import Path
from typing import Any

import torch
from invoke import moe
from safetensors.torch import load_file
from tiny import dense_model, routed_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

SHARED = {"shared_intermediate_size": 24}


def write(
    folder: Path, family: str, attention: Any, mlp: Any, dtype: torch.dtype = torch.float32,
    routed: dict[str, Any] | None = None, **overrides: Any,
) -> PreTrainedModel:  # fmt: skip
    """Save a routed model of a family to `folder`; `routed` overrides its own config."""
    dense = dense_model(family, **overrides).to(dtype)
    model = routed_model(dense, attention, mlp, **(routed or {}))
    model.save_pretrained(folder)
    return model


def export(source: Path, to: str, out: Path, *options: object) -> dict[str, Any]:
    """`moe export`, which must succeed; the receipt."""
    result = moe("export", source, "--to", to, "--out", out, *options)
    assert result.code == 0, result.err
    return json.loads((out / "receipt.json").read_text())


def refused(code: int, source: Path, to: str, *options: object) -> str:
    """`moe export`, which must end in this code and leave nothing; what it said."""
    before = sorted(source.parent.iterdir())
    result = moe("export", source, "--to", to, "--out", source.parent / "refused", *options)
    assert result.code == code, result
    assert sorted(source.parent.iterdir()) == before
    return result.err


def load(folder: Path) -> PreTrainedModel:
    """A folder in float32 as anyone loads it, with no key missing, unexpected or misshapen."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not {k: v for k, v in info.items() if v}, info
    return model.eval()


@torch.no_grad()
def difference(model: PreTrainedModel, original: PreTrainedModel) -> float:
    """Relative difference of logits on tokens past the toy rope scaling's original context."""
    ids = tokens(2, 200)
    expected, actual = (m.float()(ids).logits for m in (original, model))
    return ((actual - expected).norm() / expected.norm()).item()


def same_tensors(first: Path, second: Path, but: str = "no name") -> bool:
    """Whether two folders hold the same tensors bit for bit, those with `but` in the name aside."""
    one, other = (load_file(f / "model.safetensors") for f in (first, second))
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items() if but not in name
    )
