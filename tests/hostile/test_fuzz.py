"""Thousands of wrong inputs to everything that reads files of others: a clean error or a result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bad_readers
import pytest
import targets

HERE = Path(__file__).parent
FEW, MANY = 32, 640  # of each target: 512 of them all, 10 240


def fuzz(names: list[str], count: int, seed: int, folder: Path, module: str = "targets") -> dict:
    """What was found, by target; all of it in one process."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    command = [HERE / "fuzz.py", ",".join(names), str(count), str(seed), folder / "box", module]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        cwd=folder, capture_output=True, text=True, timeout=590, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in folder.iterdir()] == ["box"]
    return json.loads(done.stdout)


def check(found: dict) -> None:
    for name, of_one in found.items():
        kinds = {e["said"].strip().splitlines()[-1]: e for e in of_one["harm"]}
        said = [f"{name}: {e['said']}\n{e['data']}" for e in list(kinds.values())[:5]]
        assert not said, "\n\n".join(said)
        assert of_one["outside"] == []


@pytest.mark.slow
def test_wrong_inputs_are_refused_cleanly(tmp_path):
    assert len(targets.TARGETS) * FEW >= 500
    check(fuzz(list(targets.TARGETS), FEW, 0, tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("name", targets.TARGETS)
def test_many_wrong_inputs_are_refused_cleanly(name, tmp_path):
    check(fuzz([name], MANY, 1, tmp_path))


@pytest.mark.slow
def test_a_reader_that_does_harm_is_found(tmp_path):
    """Negative controls."""
    found = fuzz(list(bad_readers.TARGETS), 1, 0, tmp_path, "bad_readers")
    for name, what in (
        ("raises", "KeyError"),
        ("writes", "open"),
        ("starts", "subprocess.Popen"),
        ("allocates", "MemoryError"),
        ("hangs", "longer than"),
        ("unpickles", "pickle.find_class"),
        ("silent", "without a word"),
    ):
        (entry,) = found[name]["harm"]
        assert what in entry["said"], name
    assert found["writes"]["outside"] == ["escape"] and found["raises"]["outside"] == []
