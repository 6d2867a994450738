"""Whatever a manifest says: it is read or refused in a line, and nothing outside is touched."""

import copy
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoke import moe
from stored import blank, edited, load, save, seal, state

from moe.checkpoint import manifest, store
from moe.errors import Corrupt, UserError

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
    @given(st.binary(max_size=60), st.integers(0, len(original)), st.integers(0, 60))
    def raw(content: bytes, start: int, removed: int) -> None:
        broken = original[:start] + content + original[start + removed :]
        (folder / manifest.NAME).write_bytes(broken)
        counts[judge(folder, opened)] += broken != original

    sealed()
    raw()
    (folder / manifest.NAME).write_bytes(original)
    assert sorted(folder.parents[1].rglob("*")) == before
    outside = [path for path in opened if not path.startswith(os.path.realpath(folder))]
    assert not outside, outside
    return counts


def test_a_manifest_is_read_or_refused(sound, tmp_path) -> None:
    counts = fuzz(sound, 250)
    assert counts["refused"] > 350 and counts["loaded"] > 0, counts


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
