"""`moe kernels tune`, in Triton's interpreter: what it writes is what launches take."""

import json

import pytest
import torch
from invoke import moe
from tiny import MOE, MOH, dense_model, routed_model

from moe.hf import kernels_command
from moe.kernels import ops, tiling, tune

FEW = {"block_n": 64, "block_k": 64, "warps": 4, "stages": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder; every kernel has two candidates."""

    def candidates(kernel, rows, dtype):
        cuts = [FEW | {"group": 2}, FEW | {"group": 3}]
        own = kernel.startswith(("attend", "weight"))  # tiles that are not the routing's
        return [c | {"block_m": 32, "block_n": 32} if own else c for c in cuts]

    monkeypatch.setattr(tune, "candidates", candidates)
    routed_model(dense_model(), [MOH, {"kind": "dense"}, MOH], MOE).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.slow
def test_a_table_is_written_and_used(folder, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    table.write_text('{"sm_90": {"bfloat16": {}}}')
    result = moe("kernels", "tune", folder, "--output", table, "--tokens", 48, "--json")
    assert result.code == 0, result.err
    found = json.loads(table.read_text())
    assert found["sm_90"] == {"bfloat16": {}}  # what was there is kept
    kernels = found["interpreter"]["bfloat16"]
    assert set(kernels) == {"up_swiglu", "down", "dx", "down_dgrad", "weight_gradient", "attend",
                            "attend_dq", "attend_dkv"}  # fmt: skip
    assert kernels["down"]["32"]["72x64"]["group"] in (2, 3)
    monkeypatch.setenv("MOE_KERNELS_TABLE", str(table))
    cpu = torch.device("cpu")
    assert tiling.tiling("down", cpu, torch.bfloat16, 32, (72, 64)).warps == 4
    shipped = tiling.tiling("down", cpu, torch.bfloat16, 32, (72, 128))  # another size
    monkeypatch.delenv("MOE_KERNELS_TABLE")
    assert shipped == tiling.tiling("down", cpu, torch.bfloat16, 32, (72, 128))


def test_sizes_of_a_union_and_tables_that_grow(tmp_path):
    union = {"kind": "uoe", "num_experts": 3, "top_k": 2}
    routed_model(dense_model(), union).save_pretrained(tmp_path / "m")
    (sizes,) = kernels_command.sizes_of(tmp_path / "m", 64, "bfloat16")
    assert (sizes.heads, sizes.kv_heads, sizes.head_size) == (3, 1, 8)
    table: dict = {}
    for inner in (64, 96):  # of other experts under the same rows
        cut = FEW | {"group": inner}
        mlp = tune.Sizes(8, 72, inner, 4, 2)
        tune.add(table, mlp, [tune.Timing("down", 16, cut, 1.0)])
    assert set(table["interpreter"]["bfloat16"]["down"]["16"]) == {"72x64", "72x96"}


def test_best_is_the_fastest_that_ran():
    cut, kernel = FEW, "down"
    timings = [tune.Timing(kernel, 128, cut | {"group": g}, s) for g, s in ((1, 3.0), (2, 1.0))]
    timings += [
        tune.Timing(kernel, 128, cut, None, "out of resource"),
        tune.Timing("dx", 128, cut, None),
    ]
    assert tune.best(timings) == [timings[1]]


def test_refusals(folder, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    run = "kernels", "tune", folder, "--output", table
    assert "no kernels" in moe(*run, "--dtype", "int8").err
    dense = tmp_path / "dense"
    dense_model().save_pretrained(dense)
    assert "no kernel to tune" in moe("kernels", "tune", dense, "-o", table).err
    for text in (b"not JSON", b"[1]", b'{"sm_90": 3}', b"\xff\xfe"):
        table.write_bytes(text)
        assert "is no table of tilings" in moe(*run).err
    table.unlink()
    missing = moe("kernels", "tune", folder, "--output", tmp_path / "no" / "table.json")
    assert missing.code == 2 and "is no folder" in missing.err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = moe(*run)
    assert result.code == 2 and "times kernels on a GPU" in result.err


def one(kernel: str, cut: str) -> str:
    return f'{{"interpreter": {{"float32": {{"{kernel}": {{"*": {{"*": {cut}}}}}}}}}}}'


def test_a_table_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "triton")
    x, w1, w2 = torch.ones(4, 16), torch.ones(2, 32, 16), torch.ones(2, 16, 16)
    given = x, w1, w2, torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    for place, (text, message) in enumerate((
        (None, "No such file"),
        ("[", "is no table"),
        (one("up_swiglu", '{"speed": 9}'), "speed"),
        (one("up_swiglu", '{"block_n": 0, "block_k": 64, "warps": 4, "stages": 1}'), "block_n"),
        (one("down", '{"block_n": 64, "block_k": 64, "warps": 4, "stages": 1, "block_m": 32}'),
         "block_m is for attention"),
        ('{"interpreter": {"float32": {"up_swiglu": {"*": 7}}}}', "has no attribute"),
        ("[]", "has no attribute"),
    )):  # fmt: skip
        path = tmp_path / f"{place}.json"
        if text:
            path.write_text(text)
        monkeypatch.setenv("MOE_KERNELS_TABLE", str(path))
        with pytest.raises(ValueError, match=message):
            ops.routed_mlp(*given)
