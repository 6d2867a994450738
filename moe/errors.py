"""The errors that users meet, each with the process exit code it ends in.

A message says what failed (the value), why (the rule, with the numbers) and what to do.
"""

from collections.abc import Callable, Sequence
from typing import Any


class MoeError(Exception):
    """Base of all errors that end a command with one line instead of a traceback."""

    exit_code = 1
    label = "error"  # before the message


class UserError(MoeError, ValueError):
    """The request cannot be carried out as written: fix the command or the config."""

    exit_code = 2


class SaidElsewhere(MoeError):
    """What another rank reports: this one ends in silence, with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class Corrupt(MoeError):
    """Data on disk is damaged or incomplete: a hash, a shape or a file is not what was written."""

    exit_code = 3


class Preempted(MoeError):
    """The run was asked to end and has saved: the same command again goes on."""

    exit_code = 85
    label = "preempted"


def problem(check: Callable[..., Any], *arguments: Any) -> list[str]:
    """What a check has to say against its arguments, one sentence a line; empty where nothing."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error).split("\n")
    return []


def raise_all(problems: Sequence[str]) -> None:
    """Raise UserError with every problem, if there is one: each of them once."""
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
