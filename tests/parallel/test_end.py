"""How a process with ranks ends: everything is written, and the interpreter is not taken down."""

import subprocess
import sys

import pytest

BEGIN = """
import atexit, sys
class Late:
    def __del__(self): print("torn down", flush=True)
late = Late()
late.itself = late  # collected at the very end
atexit.register(print, "handled")
"""
ENDS = {
    "end": ("from moe.parallel.world import end; print('said', end=' '); end(7)", 7),
    "refused": ("sys.argv[1:] = ['none.yaml']; from moe.train.__main__ import main; main()", 2),
    "train": ("sys.argv[1:] = ['--help']; from moe.train.__main__ import main; main()", 0),
    "failed": (
        "import moe.train.command as c; c.load = lambda *a: 1 / 0; sys.argv[1:] = ['x']\n"
        "from moe.train.__main__ import main; main()", 1,
    ),
    "moe": ("sys.argv[1:] = ['--version']; from moe.cli import main; main()", 0),
    "moe refused": ("sys.argv[1:] = ['train', 'none.yaml']; from moe.cli import main; main()", 2),
}  # fmt: skip


def end(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"{BEGIN}{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_nothing_is_taken_down_where_there_were_ranks(name):
    code, expected = ENDS[name]
    done = end(f"import moe.parallel.world\n{code}")
    assert done.returncode == expected, done.stderr
    assert "handled" in done.stdout and "torn down" not in done.stdout
    assert ("ZeroDivisionError" in done.stderr) == (name == "failed")
    if name == "end":
        assert done.stdout == "said handled\n"


def test_without_any_a_process_ends_as_usual():
    """Negative control."""
    done = end(ENDS["moe"][0])
    assert done.returncode == 0 and done.stdout.endswith("handled\ntorn down\n")
