"""A toy run of `moe train` for launchers, and how it ends where nobody disturbs it."""

from pathlib import Path

import launching
import pytest
import toy_run
from launching import STEPS


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def real_bin(tmp_path_factory) -> Path:
    return launching.real_bin(tmp_path_factory.mktemp("real") / "bin")


@pytest.fixture(scope="session")
def straight(toys, real_bin, tmp_path_factory) -> Path:
    """A run on two ranks of torchrun.sh at one go."""
    folder = tmp_path_factory.mktemp("straight")
    script = [launching.ROOT / "launch/torchrun.sh", "--ranks", 2]
    command = [*script, toys.write(folder / "run"), *STEPS]
    launch = launching.run(command, folder / "log", {"BIN": str(real_bin)})
    assert launch.ended == [0], launch.text
    return folder / "run"
