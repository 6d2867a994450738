"""The JSONL files of a run's folder, and what has happened to a run from without: `events.jsonl`
has a line for each start and each preemption, and none is ever taken back.
"""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from moe.checkpoint.disk import replace_file
from moe.jsonfile import parse_json

NAME = "events.jsonl"


def note(out: Path, step: int, event: str, **more: Any) -> None:
    """Append that a run was `started` or `preempted` at a step, and when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with appended(out / NAME) as file:
        file.write(json.dumps({"step": step, "event": event, "time": now, **more}) + "\n")


def lines_until(path: Path, last: int) -> list[str]:
    """The lines of a file up to a step; a kill may have cut the very last one short, and what is no
    line of ours goes.
    """
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if (_step(line) or last + 1) <= last]


def _step(line: str) -> int | None:
    """The step that a line is of."""
    try:
        return int(parse_json(line)["step"]) if line.endswith("}\n") else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def rewritten(path: Path, lines: Sequence[str]) -> IO[str]:
    """A file that holds these lines and no others, open for more; a kill leaves the old one."""
    replace_file(path, "".join(lines))
    return appended(path)


def appended(path: Path) -> IO[str]:
    """A file open for more. A link is refused: it may lead out of the folder."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "a")
