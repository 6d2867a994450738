"""`moe export`: the weights of a training checkpoint, on however many ranks, as a model folder."""

import json

import pytest
import torch
from harness import run_ranks
from invoke import moe
from tiny import MOE, MOH, dense_model, routed_model, tokens
from transformers import AutoModelForCausalLM

from moe.checkpoint import store
from moe.engines.base import Entry

PROGRESS = store.Progress(
    step=7, consumed_samples=56, updates=7, config={"seed": 3, "data": {}}, reference=None,
    origin=[{"recipe": "moh"}],
)  # fmt: skip
MOE_BIASED = {**MOE, "score": "sigmoid", "selection_bias": True}


def model():
    return routed_model(dense_model(), MOH, MOE_BIASED)


def publish(out, entries, rank=0, gather=lambda value: [value]):
    def side_files(folder):
        model().config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")

    return store.save(out, 7, entries, PROGRESS, rank, gather, side_files)


def entries(weights, shard=lambda name, tensor: tensor):
    buffers = {"selection_bias"}
    for name, tensor in weights.items():
        kind = "buffer" if name.split(".")[-1] in buffers else "parameter"
        yield Entry(name, kind, shard(name, tensor))
    yield Entry("model.norm.weight", "exp_avg", torch.full_like(weights["model.norm.weight"], 9.0))


def sharded(out):
    """Every rank holds its rows of every parameter and writes them, uneven or not."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))

    def shard(name, tensor):
        return tensor if "selection" in name else distribute_tensor(tensor, mesh, [Shard(0)])

    def gather(value):
        values = [None] * size
        distributed.all_gather_object(values, value)
        return values

    publish(out, entries(model().state_dict(), shard), distributed.get_rank(), gather)


def same(folder, weights, dtype=torch.float32):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    got = loaded.state_dict()
    return got.keys() == weights.keys() and all(
        torch.equal(got[n], w if "bias" in n else w.to(dtype)) for n, w in weights.items()
    )


def test_a_checkpoint_becomes_the_same_model(tmp_path):
    original = model()
    weights = original.state_dict()
    checkpoint = publish(tmp_path, entries(weights))
    result = moe("export", checkpoint, "--to", "hf", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert same(tmp_path / "out", weights)
    ids = tokens(2, 12)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original.eval()(ids).logits)
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert not (tmp_path / "out/manifest.json").exists()
    assert moe("verify", tmp_path / "out").code == 0
    weights["model.norm.weight"] += 1e-6
    assert not same(tmp_path / "out", weights)


@pytest.mark.slow
def test_pieces_of_three_ranks_are_put_together(tmp_path):
    run_ranks(sharded, 3, tmp_path)
    weights = model().state_dict()
    result = moe("export", store.latest(tmp_path), "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert same(tmp_path / "out", weights)


def test_the_dtype_is_rounded_and_said(tmp_path):
    weights = model().state_dict()
    checkpoint = publish(tmp_path, entries(weights))
    moe("export", checkpoint, "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert same(tmp_path / "out", weights, torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_the_receipt_tells_the_whole_history(tmp_path):
    checkpoint = publish(tmp_path, entries(model().state_dict()))
    moe("export", checkpoint, "--out", tmp_path / "out")
    steps = json.loads((tmp_path / "out/receipt.json").read_text())["steps"]
    assert [s["recipe"] for s in steps] == ["moh", "train", "export"]
    assert steps[1]["options"] == {"steps": 7, "consumed_samples": 56}
    inspected = json.loads(moe("inspect", checkpoint, "--json").out)
    assert inspected["receipt"]["steps"] == steps[:2]
    assert "step 2: train (steps=7" in moe("inspect", checkpoint).out
    again = moe("export", tmp_path / "out", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    steps = json.loads((tmp_path / "again/receipt.json").read_text())["steps"]
    assert [s["recipe"] for s in steps] == ["moh", "train", "export", "export"]


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    checkpoint = publish(tmp_path, entries(model().state_dict()))
    file = checkpoint / "rank-00000.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    result = moe("export", checkpoint, "--out", tmp_path / "out")
    assert result.code == 3 and file.name in result.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert moe("export", tmp_path / "empty", "--out", tmp_path / "out").code == 2
    checkpoint = publish(tmp_path, entries(model().state_dict()))
    (tmp_path / "there").mkdir()
    result = moe("export", checkpoint, "--out", tmp_path / "there")
    assert result.code == 2 and "exists" in result.err
