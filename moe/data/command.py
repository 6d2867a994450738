"""`moe data prepare`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from moe.data.manifest import Manifest
from moe.data.prepare import Prepared, prepare
from moe.data.sources import SampleBy, SourceOptions

app = typer.Typer(help="Tokenise text for training.", no_args_is_help=True, add_completion=False)
DEFAULTS = SourceOptions()


@app.callback()
def _group() -> None:
    """Tokenise text for training."""  # makes `prepare` a subcommand although it is alone


@app.command("prepare")
def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Folder of text files (one document each), json, jsonl, parquet, csv or text "
            "file, or a hub dataset's id (owner/name or owner/name:config).",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Model folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="PREFIX of .bin, .idx and .json.")],
    text_field: Annotated[
        list[str], typer.Option(help="Field that holds the text; give it again to join fields.")
    ] = list(DEFAULTS.text_fields),  # noqa: B006  (typer copies it)
    pattern: Annotated[str, typer.Option(help="Names of files in a folder.")] = DEFAULTS.pattern,
    split: Annotated[str, typer.Option(help="Split of hub datasets.")] = DEFAULTS.split,
    sample_by: Annotated[
        SampleBy, typer.Option(help="What is one document in a text file given as SRC.")
    ] = DEFAULTS.sample_by,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default one a core.")
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of documents to hold out, in PREFIX-validation.")
    ] = 0.0,
    limit_documents: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many documents.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for machines.")
    ] = False,
) -> None:
    """Tokenise documents into the memory-mapped files that `moe train` reads."""
    options = SourceOptions(
        text_fields=tuple(text_field), pattern=pattern, split=split, sample_by=sample_by
    )
    prepared = prepare(
        sources,
        tokenizer,
        out,
        options=options,
        workers=workers,
        validation=validation,
        limit_documents=limit_documents,
        quiet=as_json,
    )
    typer.echo(json.dumps(dataclasses.asdict(prepared)) if as_json else _report(prepared, out))


def _report(prepared: Prepared, out: Path) -> str:
    lines = [_describe(prepared.train, str(out))]
    if prepared.validation:
        lines.append(_describe(prepared.validation, f"{out}-validation"))
    if prepared.empty:
        lines.append(f"left out {prepared.empty:,} empty documents")
    if prepared.undecodable:
        names = ", ".join(prepared.undecodable[:5])
        more = len(prepared.undecodable) - 5
        more_text = f" and {more:,} more" if more > 0 else ""
        lines.append(f"left out {len(prepared.undecodable):,} files not UTF-8: {names}{more_text}")
    return "\n".join(lines)


def _describe(manifest: Manifest, prefix: str) -> str:
    size = manifest.bin.bytes + manifest.idx.bytes
    return (
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{size / 1e6:,.1f} MB ({manifest.dtype})"
    )
