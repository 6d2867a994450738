"""Readers that do what a reader must not: negative controls of the fuzz."""

import collections
import pickle
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from targets import Target

from moe.errors import UserError


def raises(_: Path) -> None:
    {}["x"]


def writes(path: Path) -> None:
    (path.parent.parent / "escape").write_text("x")


def starts(_: Path) -> None:
    subprocess.run(["true"], check=True)


def allocates(_: Path) -> int:
    return len(bytearray(4 * 2**30))


def hangs(_: Path) -> None:
    time.sleep(60)


def unpickles(_: Path) -> Any:
    return pickle.loads(pickle.dumps(collections.OrderedDict))


def silent(_: Path) -> None:
    raise UserError("")


READERS: tuple[Callable[[Path], Any], ...] = (
    raises, writes, starts, allocates, hangs, unpickles, silent
)  # fmt: skip
TARGETS = {reader.__name__: Target(lambda _: b"{}", reader) for reader in READERS}
