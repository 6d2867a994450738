"""What has happened to a run from without: `events.jsonl` of its folder has a line for each start
and each preemption, and none is ever taken back.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


def note(out: Path, step: int, event: str, **more: Any) -> None:
    """Append that a run was `started` or `preempted` at a step, and when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (out / NAME).open("a") as file:
        file.write(json.dumps({"step": step, "event": event, "time": now, **more}) + "\n")
