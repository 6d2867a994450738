"""Where documents come from: folders of files, and everything `datasets.load_dataset` reads.

    for source in open_sources(["corpus.jsonl", "src/"], SourceOptions()):
        for text in source.texts: ...

Everything is streamed: nothing is converted or cached, and a hub dataset is fetched as it is read.
"""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe.errors import UserError

LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}

SampleBy = Literal["document", "paragraph", "line"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """How sources are read; the fields that do not concern a kind of source are not used by it."""

    text_fields: Sequence[str] = ("text",)  # of a record; several are joined by a newline
    pattern: str = "*.py,*.rst,*.txt,*.md"  # names of the files of a folder
    split: str = "train"  # of a hub dataset
    sample_by: SampleBy = "document"  # what one document of a text file is


@dataclass(kw_only=True, slots=True)
class Source:
    """Documents of one source, to be read once.

    documents: how many there are, None where counting means reading everything.
    undecodable: names of the files met so far that are not UTF-8.
    """

    name: str
    texts: Iterator[str]
    documents: int | None = None
    undecodable: list[str] = field(default_factory=list)


def open_sources(names: Sequence[str], options: SourceOptions) -> list[Source]:
    """Open every source, so that a missing one or a missing field is told before any work.

    A folder is source files, one document each; a file is read by its extension, and is text when
    that names no format; anything else is a hub dataset, `owner/name` or `owner/name:config`.
    """
    return [_open_source(name, options) for name in names]


def _open_source(name: str, options: SourceOptions) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_files(name, _files_below(path, options.pattern))
    if path.is_file():
        loader = LOADERS.get(_extension(path))
        if loader:
            return _open_records(name, loader, path, options)
        if options.sample_by == "document":
            return _open_files(name, [path])
        return _open_records(name, "text", path, options)
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such file or folder. Give a path, or a hub dataset's id.")
    return _open_records(name, name, None, options)


def _extension(path: Path) -> str:
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    return stem.suffix.lower()


def _files_below(folder: Path, pattern: str) -> list[Path]:
    """Files whose names match, in the order of their paths; hidden folders are left out."""
    patterns = [part.strip() for part in pattern.split(",") if part.strip()]
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]
    files = [path for path in found if path.is_file()]
    if not files:
        raise UserError(
            f"{folder}: no file matches --pattern '{pattern}'. Give the pattern of its text files; "
            f"data files ({', '.join(LOADERS)}) are given one by one, as {folder}/*.parquet."
        )
    return files


def _open_files(name: str, files: list[Path]) -> Source:
    source = Source(name=name, texts=iter(()), documents=len(files))
    source.texts = _read_files(files, source.undecodable)
    return source


def _read_files(files: list[Path], undecodable: list[str]) -> Iterator[str]:
    for path in files:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            undecodable.append(str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _open_records(name: str, loader: str, path: Path | None, options: SourceOptions) -> Source:
    import datasets

    arguments: dict[str, Any] = {"split": options.split}
    if path is not None:
        arguments["data_files"] = {options.split: [str(path)]}
        if loader == "text":
            arguments["sample_by"] = options.sample_by
        elif _extension(path) == ".tsv":
            arguments["sep"] = "\t"
    elif ":" in loader:
        loader, arguments["name"] = loader.split(":", 1)
    fields = ("text",) if loader == "text" else tuple(options.text_fields)
    try:
        records = datasets.load_dataset(loader, streaming=True, **arguments)
        first = next(iter(records), None)
        documents = _count_records(path) if path else _count_hub_records(records, options.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error
    except StopIteration:  # out of datasets' own hands, for an empty JSON file
        first = None
    if first is None:
        return Source(name=name, texts=iter(()), documents=0)
    if missing := [key for key in fields if key not in first]:
        raise UserError(
            f"{name} has no field {', '.join(map(repr, missing))}. "
            f"Its fields are {', '.join(first)}: name the text's with --text-field."
        )
    records = records.select_columns(list(fields))
    return Source(name=name, texts=_read_records(name, records, fields), documents=documents)


def _read_records(name: str, records: Any, fields: Sequence[str]) -> Iterator[str]:
    rows = enumerate(records)
    while True:
        try:
            index, row = next(rows)
        except StopIteration:
            return
        except (ValueError, OSError) as error:
            raise UserError(f"{name} cannot be read on: {error}") from error
        values = {key: row[key] for key in fields if row[key] is not None}
        for key, value in values.items():
            if not isinstance(value, str):
                raise UserError(
                    f"{name}: {key!r} of record {index} is {type(value).__name__}, not text. "
                    "Name a field of text with --text-field."
                )
        yield "\n".join(values.values())


def _count_records(path: Path) -> int | None:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))
    return None


def _count_hub_records(records: Any, split: str) -> int | None:
    splits = records.info.splits
    return splits[split].num_examples if splits and split in splits else None
