"""Whatever a manifest says: it is read or refused in a line, and nothing outside is touched."""

import copy
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoke import moe
from stored import blank, edited, load, save, seal, state

from moe.checkpoint import manifest, store
from moe.config import parse
from moe.errors import Corrupt, UserError
from moe.hf.inspect import checkpoint_steps, describe
from moe.model import RoutedLlamaConfig
from moe.parallel.world import Ranks
from moe.train.configurations import differences
from moe.train.guard import Guard
from moe.train.loads import tensors
from moe.train.starting import data_step, restore_generators
from moe.upcycle.receipt import Receipt

ODD = st.sampled_from(
    [-1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.0, True, None, "", "..", "../x", "/etc/passwd",
     "manifest.json", "rank-00000.safetensors", "float32", "rng", "\ud800", "\0", "a" * 300,
     [], {}, [[]], [1] * 40, [2**59, 2**59], {"file": "x"}]
)  # fmt: skip
JSON = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "run"
    folder = save(out, 1)
    (folder / "link").symlink_to("/etc/hostname")
    return folder


@st.composite
def changes(draw: st.DrawFn, values: Any) -> Any:
    """A manifest with one to three places removed, doubled, or given other values or names."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        place = values
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 5)):
                place = inner
                continue
            change = draw(st.integers(0, 3))
            if change == 0:
                del place[key]
            elif change == 1 and isinstance(place, dict):
                place[str(draw(ODD | st.text(max_size=8)))] = place.pop(key)
            elif change == 1:
                place.append(copy.deepcopy(inner))
            elif change == 2 and type(inner) is int:
                place[key] = inner + draw(st.integers(-9, 9))
            else:
                place[key] = copy.deepcopy(draw(JSON))  # what is drawn is shared
            break
    return values


CONFIG = parse(
    {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]},
     "train": {"global_batch_size": 8}},
    "fuzz",
)  # fmt: skip
MODEL = RoutedLlamaConfig(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    attention=[{"kind": "moh", "top_k": 1}, {"kind": "dense"}],
    mlp=[{"kind": "dense"}, {"kind": "moe", "num_experts": 3, "top_k": 1}],
)  # fmt: skip


def go_on(folder: Path) -> None:
    """All that is made of a checkpoint's progress when a run resumes, or a model is asked for."""
    found = manifest.Manifest.read(folder)
    progress = found.progress
    data_step(CONFIG, folder, progress)
    if progress.reference is not None:
        tensors(progress.reference, MODEL, torch.device("cpu"))
    guard = Guard(CONFIG.guard)
    guard.restore(progress.guard)
    guard.judge(3.0, 0.1)
    guard.skip(progress.step, range(8))
    guard.state()
    differences(progress.config, CONFIG.model_dump(mode="json"))
    receipt = Receipt(steps=checkpoint_steps(found))
    describe(folder, {"model_type": "m", "total_parameters": 1, "active_parameters": 1,
                      "flops_per_token": 1, "layers": [], "receipt": asdict(receipt)})  # fmt: skip
    with store.Reader(folder) as reader:
        restore_generators(reader, Ranks(0, 1, torch.device("cpu")))


def judge(folder: Path, opened: set[str]) -> str:
    """How a manifest was taken; anything but a clean answer raises."""
    right = os.open

    def watch(path: Any, *arguments: Any, **options: Any) -> int:
        opened.add(os.path.realpath(path))
        return right(path, *arguments, **options)

    with mock.patch.object(os, "open", watch):
        try:
            problems = list(map(str, store.check(folder)))
        except UserError as error:
            problems = [str(error)]
        try:
            load(folder, blank(state()))
            go_on(folder)
            loaded = True
        except (Corrupt, UserError) as error:
            problems.append(str(error))
            loaded = False
    for line in problems:
        line.encode()
        assert "\n" not in line or line.count("\n") <= 2, line
    return "loaded" if loaded else "refused"


def fuzz(folder: Path, examples: int) -> Counter[str]:
    original = (folder / manifest.NAME).read_bytes()
    values = json.loads(original)
    values.pop("xxh3")
    counts: Counter[str] = Counter()
    opened: set[str] = set()
    before = sorted(folder.parents[1].rglob("*"))
    quiet = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @quiet
    @given(changes(values) | JSON.filter(lambda v: isinstance(v, dict)))
    def sealed(changed: Any) -> None:
        seal(folder, json.dumps(changed).encode())
        counts[judge(folder, opened)] += 1

    @quiet
    @given(changes(values["progress"]) | JSON)
    def of_progress(changed: Any) -> None:
        seal(folder, json.dumps(values | {"progress": changed}).encode())
        counts[f"progress {judge(folder, opened)}"] += 1

    @quiet
    @given(st.binary(max_size=60), st.integers(0, len(original)), st.integers(0, 60))
    def raw(content: bytes, start: int, removed: int) -> None:
        broken = original[:start] + content + original[start + removed :]
        (folder / manifest.NAME).write_bytes(broken)
        counts[judge(folder, opened)] += broken != original

    sealed()
    of_progress()
    raw()
    (folder / manifest.NAME).write_bytes(original)
    assert sorted(folder.parents[1].rglob("*")) == before
    outside = [path for path in opened if not path.startswith(os.path.realpath(folder))]
    assert not outside, outside
    return counts


def test_a_manifest_is_read_or_refused(sound, tmp_path) -> None:
    counts = fuzz(sound, 250)
    assert counts["refused"] > 350 and counts["loaded"] > 0, counts
    assert counts["progress refused"] > 100 and counts["progress loaded"] > 5, counts


WRONG = {
    "nothing": {},
    **{f"step {v!r}": {"step": v} for v in (math.nan, math.inf, "x", -3, 10**30, True, 0.5)},
    "samples": {"consumed_samples": None},
    "first sample": {"data_step": "q"},
    "updates": {"updates": "abc"},
    "more updates than steps": {"updates": 9},
    "loads": {"reference": {"a": 1}},
    "loads of nothing": {"reference": [1, 2]},
    "loads that are not finite": {"reference": [[[math.nan], None]]},
    "guard": {"guard": [1]},
    "empty guard": {"guard": {}},
    "clean steps": {"guard": {"skipped": 0, "clean": [[1]], "row": []}},
    "rows": {"guard": {"skipped": "x", "clean": [], "row": []}},
    "a row without samples": {"guard": {"skipped": 1, "clean": [], "row": [[1, 8, 8]]}},
    "config": {"config": []},
    "data": {"config": {"data": []}},
    "history": {"origin": [{"recipe": "x", "options": 1}]},
    "validation": {"unvalidated": "yes"},
    "ranks": {"ranks": 0},
    **{f"no {key}": key for key in ("config", "step", "updates", "reference", "consumed_samples")},
}


@pytest.mark.parametrize("name", WRONG)
def test_progress_that_no_run_writes_is_refused(sound, tmp_path, name) -> None:
    folder = shutil.copytree(sound, tmp_path / "run/checkpoints/step-1", symlinks=True)
    wrong = WRONG[name]

    def change(values: dict) -> None:
        if isinstance(wrong, str):
            del values["progress"][wrong]
        else:
            values["progress"] = values["progress"] | wrong if wrong else {}

    edited(folder, lambda values: None)
    go_on(folder)  # negative control
    edited(folder, change)
    with pytest.raises(Corrupt, match=r"step-1/manifest\.json: not a manifest") as error:
        manifest.Manifest.read(folder)
    assert "\n" not in str(error.value)


def relabelled(key: str, dtype: str) -> Any:
    return lambda values: values["tensors"][key].update(dtype=dtype)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("parameter/experts", "int32"), ("exp_avg/embed", "int32"), ("rng/cpu-00000", "bool")],
)
def test_a_tensor_of_another_kind_of_number_is_refused(sound, tmp_path, key, dtype) -> None:
    folder = shutil.copytree(sound, tmp_path / "run/checkpoints/step-1", symlinks=True)
    edited(folder, relabelled(key, dtype))
    with pytest.raises(Corrupt, match=f"{key}: (dtype )?{dtype}"):
        load(folder, blank(state()))


def test_a_tensor_is_not_converted_on_its_way(sound, tmp_path) -> None:
    folder = shutil.copytree(sound, tmp_path / "run/checkpoints/step-1", symlinks=True)
    edited(folder, relabelled("parameter/narrow", "float16"))
    with pytest.raises(UserError, match=r"narrow is \(7,\) of torch.float16, .* of torch.bfloat16"):
        load(folder, blank(state()))


def test_a_tensor_that_is_not_there_is_not_allocated(sound, tmp_path) -> None:
    folder = shutil.copytree(sound, tmp_path / "run/checkpoints/step-1", symlinks=True)

    def grow(values: dict) -> None:
        piece = {"file": "big.safetensors", "offset": [0], "shape": [2**46], "start": 0,
                 "xxh3": "0" * 32}  # fmt: skip
        values["tensors"]["parameter/big"] = {
            "kind": "parameter", "dtype": "float32", "shape": [2**46], "pieces": [piece],
        }  # fmt: skip
        values["files"]["big.safetensors"] = {"bytes": 2**48, "header": 0, "xxh3": "0" * 32}

    edited(folder, grow)
    with pytest.raises(Corrupt, match=r"big\.safetensors: missing: parameter/big"):
        dict(store.weights(folder))


@pytest.mark.full
def test_ten_thousand_manifests_are_read_or_refused(sound) -> None:
    counts = fuzz(sound, 5000)
    assert counts["refused"] > 7000 and counts["loaded"] > 0, counts


def test_a_reader_that_trusts_would_be_noticed(sound, tmp_path, monkeypatch) -> None:
    """Negative control: names are taken as they come."""
    folder = shutil.copytree(sound, tmp_path / "run/checkpoints/step-1", symlinks=True)

    def outwards(values: dict) -> None:
        values["files"]["/etc/hostname"] = values["files"].pop("config.json")

    edited(folder, outwards)
    opened: set[str] = set()
    assert judge(folder, opened) == "refused" and "/etc/hostname" not in opened
    monkeypatch.setattr(manifest, "_file_name", lambda name: name)
    monkeypatch.setattr("moe.checkpoint.damage.inside", lambda folder, name: folder / name)
    assert judge(folder, opened) == "loaded" and "/etc/hostname" in opened


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 9, b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 5000, b"\xff{}", b"{}"]
)
def test_what_is_no_json_is_refused(tmp_path, content) -> None:
    folder = save(tmp_path, 1)
    (folder / manifest.NAME).write_bytes(content)
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        load(folder, blank(state()))
    seal(folder, b"{" + content)
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        load(folder, blank(state()))
    code, _, err = moe("verify", folder)
    assert code == 3 and "Traceback" not in err
