"""Calls the `moe` command in this process, as a shell would: exit code and what was printed.

result = moe("inspect", folder, "--json")
"""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from moe.cli import call


class Result(NamedTuple):
    code: int
    out: str
    err: str


def moe(*arguments: object) -> Result:
    """Run `moe` with these arguments; a traceback is a failure of the test, not a result."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["moe", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            call()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Result(code, out.getvalue(), err.getvalue())
