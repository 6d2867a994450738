"""A minute of `make soak`."""

from pathlib import Path

import pytest
import soak

from moe.checkpoint import store


@pytest.mark.full
def test_a_minute_of_blows_changes_nothing(tmp_path: Path) -> None:
    found = soak.soak(1.0, seed=1, log_path=tmp_path / "log.jsonl")
    assert not found.wrong, "\n".join(found.wrong)
    assert found.starts > 5 and sum(found.blows.values()) == found.starts


@pytest.mark.full
def test_what_goes_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    found = soak.Soak(tmp_path, 0, lambda line: None)
    tensors, lines = found.expected
    name = next(n for n in tensors if n.startswith("exp_avg/"))
    found.compare("as it should be", (tensors, lines))
    assert not found.wrong
    found.compare("a moment", ({**tensors, name: tensors[name] + 1e-9}, lines))
    found.compare("a line", (tensors, lines[:-1]))
    assert len(found.wrong) == 2
    out = tmp_path / "undisturbed"
    with next(store.latest(out).glob("*.safetensors")).open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    found.cycle(out, "SIGKILL")
    assert len(found.wrong) > 2, "a damaged checkpoint"
