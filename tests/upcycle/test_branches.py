"""What a mixture of models that went apart keeps of each of them, and how far it is from the seed.

Routers are forced by their own weights: everything from the hidden state to the output is the
model's, so an expert in another's place, or a router that is not asked, is seen.
"""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe.upcycle.receipt import Receipt

IDS = tiny.tokens(2, 20)  # fewer tokens than hidden dimensions: one row can be certain of them all


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


@pytest.fixture
def mixed(branches, moe_upcycle, tmp_path):
    """`mixed("llama", "bam")`: the mixture of that family's branches, and the branches."""

    def make(family: str, *recipe: object):
        folders = branches(family)
        sources = [word for folder in folders for word in ("--source", folder)]
        result = moe_upcycle(*recipe, *sources, "--out", tmp_path / "out", "--no-verify")
        assert result.code == 0, result.err
        return load(tmp_path / "out"), [load(folder) for folder in folders]

    return make


def through(model, expert: int) -> torch.Tensor:
    """Logits of IDS with every router given weights by which all tokens go to `expert`."""

    def choose(router, inputs):
        router.weight.zero_()
        states = inputs[0].flatten(0, -2)
        certain = torch.full((len(states), 1), 60.0, dtype=states.dtype)
        router.weight[expert] = torch.linalg.lstsq(states, certain).solution[:, 0]

    routers = [m for name, m in model.named_modules() if name.endswith(".router")]
    hooks = [router.register_forward_pre_hook(choose) for router in routers]
    logits = model(IDS).logits
    for hook in hooks:
        hook.remove()
    return logits


def give_back(model, branch) -> None:
    """Put a branch's norms, embeddings and head in the place of the means."""
    layers = ("self_attn", "mlp")
    kept = {n: t for n, t in branch.state_dict().items() if not any(part in n for part in layers)}
    assert kept.keys() <= model.state_dict().keys()
    model.load_state_dict(kept, strict=False)


@pytest.mark.parametrize(("family", "kv"), [
    ("llama", "expert"), ("qwen2", "expert"), ("qwen3", "expert"), ("llama", "shared"),
])  # fmt: skip
@torch.no_grad()
def test_bam_gives_a_branch_back_to_tokens_that_go_to_it_alone(family, kv, mixed):
    """Exactly, with its norms and embeddings; with keys and values averaged not even then."""
    model, sources = mixed(family, "bam", "--kv", kv)
    averaged = [through(model, expert) for expert in range(len(sources))]
    for expert, branch in enumerate(sources):
        expected = branch(IDS).logits
        assert relative(averaged[expert], expected) > 0.05  # norms and embeddings of no branch
        give_back(model, branch)
        difference = relative(through(model, expert), expected)
        assert difference < 1e-12 if kv == "expert" else difference > 0.05
        assert relative(through(model, expert - 1), expected) > 0.1  # negative control


@torch.no_grad()
def test_btx_gives_a_branch_back_only_with_the_attention_it_averaged(mixed):
    """Neither routers nor norms and embeddings do it; its attention besides them does."""
    model, sources = mixed("llama", "btx", "--top-k", 1)
    for expert, branch in enumerate(sources):
        expected = branch(IDS).logits
        give_back(model, branch)
        assert relative(through(model, expert), expected) > 0.05
        for layer, source in zip(model.model.layers, branch.model.layers, strict=True):
            layer.self_attn.load_state_dict(source.self_attn.state_dict())
        assert relative(through(model, expert), expected) < 1e-12
        assert relative(through(model, expert - 1), expected) > 0.1  # negative control


def jittered(seed: Path, folder: Path, amount: float, number: int) -> Path:
    """A copy of a model folder with weights apart by a share of themselves."""
    folder.mkdir()
    for file in seed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(number)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor *= 1 + amount * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [("bam",), ("bam", "--kv", "shared"), ("btx",)], ids=str)
def test_branches_that_went_apart_leave_the_seed_and_nothing_is_claimed(
    recipe, dense, moe_upcycle, tmp_path
):
    """By a tenth of every weight; branches that never left are the seed (negative control)."""
    seed, found = dense("llama"), []
    for amount in (0.0, 0.1):
        apart = [jittered(seed, tmp_path / f"{amount}-{i}", amount, i) for i in range(2)]
        sources = [word for folder in (seed, *apart) for word in ("--source", folder)]
        out = tmp_path / f"out-{amount}"
        result = moe_upcycle(*recipe, *sources, "--out", out, "--json")
        assert result.code == 0, result.err
        record = json.loads(result.out)
        assert record["steps"][-1]["exact"] is False
        assert record["verification"]["status"] == "measured"
        assert Receipt.read(out).steps[-1]["exact"] is False
        found.append(record["verification"]["relative_difference"])
    assert found[0] < 1e-5 and 0.05 < found[1] < 2, found
