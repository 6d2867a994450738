"""JSON that others have written."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 512 * 2**20  # a receipt has some 150 bytes a tensor


def read_json(path: Path) -> Any:
    """The value in a file.

    Raises OSError where there is none, ValueError where it is not JSON, not text, larger than any
    that is written here, or nested beyond what can be read.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size} bytes, at most {MAX_BYTES} are read")
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The same of a text."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
