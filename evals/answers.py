"""What a model has answered already, kept in a folder: an evaluation that was killed goes on there.

answers = Answers(Path("cache"), identity)     # cache/HASH-OF-THE-MODEL.sqlite
answers.put({key: values}); answers.get([key])

The harness's own cache holds pickles, which run code when they are read, and does not know which
model it is of. These are JSON, in SQLite, a file a model.
"""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from moe.errors import Corrupt, UserError
from moe.jsonfile import parse_json

SECONDS = 60.0  # that another process may write
SUFFIX = ".sqlite"
TABLES = ("model (identity TEXT)", "answers (key TEXT PRIMARY KEY, found TEXT)")


def digest(value: Any) -> str:
    """A hash of plain values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


class Answers:
    """Lists of answers by their keys, of one model. `identity`: all that its answers depend on.

    Raises UserError where the file is another model's or cannot be written, Corrupt where it is
    damaged. There is no file before there is an answer.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = folder / f"{digest(identity)}{SUFFIX}", identity
        self._file: sqlite3.Connection | None = None
        if self.path.exists():
            self._open()

    def _open(self) -> sqlite3.Connection:
        if self._file is not None:
            return self._file
        wanted = json.dumps(self.identity, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=SECONDS)
            with self._file:
                for table in TABLES:
                    self._file.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                held = [row[0] for row in self._file.execute("SELECT identity FROM model")]
                if not held:
                    self._file.execute("INSERT INTO model VALUES (?)", (wanted,))
        except (sqlite3.OperationalError, OSError) as error:
            raise self._unwritable(error) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        if held not in ([], [wanted]):
            raise UserError(f"{self.path} holds answers of another model: {held[0]}. Remove it.")
        return self._file

    def get(self, keys: Iterable[str]) -> dict[str, list[Any]]:
        """The answers that are there."""
        found: dict[str, list[Any]] = {}
        if self._file is None:
            return found
        query = "SELECT found FROM answers WHERE key = ?"
        try:
            for key in keys:
                for (text,) in self._file.execute(query, (key,)):
                    found[key] = parse_json(text)
                    if not isinstance(found[key], list):
                        raise ValueError(f"{text[:40]!r} is no list of answers")
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise self._damaged(error) from error
        return found

    def put(self, found: dict[str, list[Any]]) -> None:
        """Keep them from now on, whatever happens to this process."""
        rows = [(key, json.dumps(values)) for key, values in found.items()]
        file = self._open()
        try:
            with file:
                file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} cannot be written: {error}. Mend that, or choose another --cache, and "
            "the same command goes on."
        )

    def _damaged(self, error: Exception) -> Corrupt:
        return Corrupt(f"{self.path} is damaged ({error}): remove it, and its answers come again.")


def strangers(folder: Path, identities: Iterable[dict[str, Any]]) -> list[Path]:
    """Files of answers in a folder that are of none of these models."""
    known = {f"{digest(identity)}{SUFFIX}" for identity in identities}
    return [path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.name not in known]
