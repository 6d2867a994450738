"""Where tests find the real text and evaluation data that lies beside the repository."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(relative: str) -> Path:
    """Path of a shared data file; skips the test, naming the file, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs the shared data file {relative}")
    return path
