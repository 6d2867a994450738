"""The errors that users meet, each with the process exit code it ends in.

A message says what failed (the value), why (the rule, with the numbers) and what to do.
"""


class MoeError(Exception):
    """Base of all errors that end a command with one line instead of a traceback."""

    exit_code = 1


class UserError(MoeError, ValueError):
    """The request cannot be carried out as written: fix the command or the config."""

    exit_code = 2


class Corrupt(MoeError):
    """Data on disk is damaged or incomplete: a hash, a shape or a file is not what was written."""

    exit_code = 3
