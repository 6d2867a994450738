"""Carrying out a conversion: a recipe and a request to a folder, proof to a receipt."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from torch import Tensor

from moe.errors import Corrupt, MoeError, SaidElsewhere, UserError, problem, raise_all
from moe.hf.importing import write_both_ropes
from moe.model import RoutedLlamaConfig
from moe.model.accounting import parameter_counts
from moe.upcycle import writer
from moe.upcycle.calibrate.branches import calibrate_branches
from moe.upcycle.calibrate.compare import side_by_side
from moe.upcycle.calibrate.fitting import calibrate
from moe.upcycle.calibrate.journal import FOLDER
from moe.upcycle.calibrate.labels import of_little, read_labelled
from moe.upcycle.calibrate.picture import NAME as PICTURE
from moe.upcycle.calibrate.picture import draw
from moe.upcycle.calibrate.ranks import Ranks, join
from moe.upcycle.calibrate.text import TOKENS, read_windows
from moe.upcycle.receipt import Receipt, seal, versions
from moe.upcycle.recipes import Conversion, convert
from moe.upcycle.scales import fit_scales
from moe.upcycle.source import Source, hash_file
from moe.upcycle.tokenizer import keep_class
from moe.upcycle.verify import assembled, require_other_text, summary, verify, windows

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What every recipe is asked for besides its own options."""

    source: list[Path]
    out: Path
    seed: int = 0
    layers: str | None = None
    dtype: Dtype | None = None
    calibrate: Path | None = None
    calibration_tokens: int | None = None  # None: TOKENS
    text: Path | None = None
    verify: bool = True
    dry_run: bool = False
    as_json: bool = False


def run(recipe: Any, request: Request) -> None:
    """Carry out a request and print what came of it; under torchrun the first rank does, and all
    share the text to fit to.
    """
    with join() as ranks:
        try:
            _run(recipe, request, ranks)
        except MoeError as error:
            if ranks.rank:
                raise SaidElsewhere(error.exit_code) from error
            raise


def _run(recipe: Any, request: Request, ranks: Ranks) -> None:
    require_other_text(request.calibrate, request.text)
    sources = [Source.open(folder) for folder in request.source]
    dtype = getattr(torch, request.dtype) if request.dtype else None
    conversion = convert(sources, recipe, request.seed, request.layers, dtype, request.calibrate)
    plan = writer.cast(conversion.plan, dtype)
    if os.path.lexists(request.out):
        raise UserError(f"{request.out} exists. Choose another --out, or remove it.")
    if any(request.out.resolve().is_relative_to(f.resolve()) for f in request.source):
        raise UserError(f"--out {request.out} lies in a source's folder. Choose another.")
    if request.calibration_tokens is not None and not conversion.fits.wanted:
        raise UserError(
            f"--calibration-tokens {request.calibration_tokens} is for what is fitted to "
            "--calibrate text: --router and --shared calibrated, --partition shared-coactivation."
        )
    if ranks.rank and (request.dry_run or not conversion.fits.wanted):
        return
    for warning in conversion.warnings if not ranks.rank else ():
        typer.echo(f"warning: {warning}", err=True)
    text = read_texts(request, sources, conversion)
    if (branches := conversion.fits.branches) and request.calibrate and not ranks.rank:
        folders, tokens = [s.folder for s in sources], request.calibration_tokens or TOKENS
        for warning in of_little(branches, folders, request.calibrate, tokens, text):
            typer.echo(f"warning: {warning}", err=True)
    if request.dry_run:
        described = describe_plan(conversion, plan, sources)
        typer.echo(json.dumps(described) if request.as_json else describe_lines(described))
        return
    if ranks.rank:
        fit(request, sources, conversion, text, None, ranks)
        return
    receipt = execute(request, sources, conversion, plan, text, ranks)
    if request.as_json:
        typer.echo(json.dumps({"out": str(request.out), **dataclasses.asdict(receipt)}))
        return
    total, active = parameter_counts(conversion.config)
    typer.echo(f"{request.out}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active")
    exactness = "preserves the function" if conversion.exact else "does not preserve the function"
    typer.echo(f"{conversion.recipe.name} {exactness}: {conversion.statement}")
    typer.echo(summary(receipt.verification) if receipt.verification else "not verified")


def read_texts(request: Request, sources: list[Source], conversion: Conversion) -> list[Tensor]:
    """Windows to fit to, none where nothing is fitted. Raises UserError over any text that is of no
    use: what would make a conversion fail is said now, not after an hour of writing.
    """
    problems, found = [], []
    source, branches = sources[0], conversion.fits.branches
    vocabulary = source.config.vocab_size
    if request.verify:
        problems += problem(windows, source.folder, request.text, vocabulary)
    if request.calibrate and conversion.fits.wanted:
        tokens = request.calibration_tokens or TOKENS
        try:
            given = request.calibrate, tokens, conversion.config
            if branches:
                found = read_labelled(branches, [s.folder for s in sources], *given)
            else:
                found = read_windows(source.folder, *given)
        except UserError as error:
            problems += str(error).split("\n")
    elif request.calibrate:
        problems += problem(windows, source.folder, request.calibrate, vocabulary)
    raise_all(problems)
    return found


def fit(
    request: Request,
    sources: list[Source],
    conversion: Conversion,
    text: list[Tensor],
    folder: Path | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Give the plan and the config what is fitted to text; returns the receipt's record."""
    assert request.calibrate is not None
    config, fits = conversion.config, conversion.fits
    layers, path, quiet = conversion.layers, request.calibrate, request.as_json
    if fits.branches:
        dtype = getattr(torch, request.dtype) if request.dtype else None
        plan = writer.cast(conversion.plan, dtype)
        record = calibrate_branches(
            sources, config, plan, layers, fits, text, path, folder, ranks, quiet
        )
    else:
        key = str(request.seed)
        record = calibrate(sources[0], layers, fits, text, path, key, folder, ranks, quiet)
    for part, changes in fits.changes.items():
        change_layers(config, part, changes)
    if problems := config.problems():
        raise UserError("\n".join(problems))
    count, longest = sum(map(len, text)), max(map(len, text))
    return {"tokens": count, "windows": [len(text), longest], "ranks": ranks.size, **record}


@contextlib.contextmanager
def fitting(staging: writer.Staging) -> Iterator[None]:
    """Nothing is kept of what was begun for a text that turns out not to suit the model."""
    with writer.building(staging):
        try:
            yield
        except UserError:
            staging.discard()
            raise


def execute(
    request: Request,
    sources: list[Source],
    conversion: Conversion,
    plan: writer.Plan,
    text: list[Tensor],
    ranks: Ranks,
) -> Receipt:
    """Fit, write, verify, seal, publish. Raises Corrupt where a claim of exactness fails."""
    source = sources[0]
    step = describe_step(request, sources, conversion)
    identity = {k: v for k, v in step.items() if k != "created"}
    staging = writer.Staging(request.out, writer.fingerprint(identity))
    if staging.open():
        typer.echo(f"continuing in {staging.folder}", err=True)
    earlier = Receipt.read(source.folder)
    receipt = Receipt(steps=[*(earlier.steps if earlier else []), step])
    if conversion.fits.wanted:
        with fitting(staging):
            given = text, staging.folder / FOLDER, ranks
            step["calibration"] |= fit(request, sources, conversion, *given)
    written = writer.write_weights(plan, sources, staging, quiet=request.as_json)
    with writer.building(staging):
        writer.copy_side_files(source.folder, staging.folder)
        # beside its place until it is verified: a folder without a config loads nowhere
        config = staging.folder / "unverified"
        conversion.config.save_pretrained(config)
        write_both_ropes(config / "config.json")
        with assembled(staging.folder, config) as whole:
            keep_class(source.folder, whole, staging.folder)
        if getattr(conversion.recipe, "fits_scales", False):
            assert request.calibrate is not None
            with assembled(staging.folder, config) as whole:
                step["output_scales"] = fit_scales(source.folder, whole, request.calibrate)
            set_scales(conversion.config, step["output_scales"])
            conversion.config.save_pretrained(config)
            write_both_ropes(config / "config.json")
        if request.verify:
            with assembled(staging.folder, config) as whole:
                receipt.verification = prove(request, source, whole, conversion)
        for path in config.iterdir():
            path.rename(staging.folder / path.name)
        config.rmdir()
        shutil.rmtree(staging.folder / FOLDER, ignore_errors=True)
        if conversion.fits.parts:
            draw(step["calibration"]["parts"], staging.folder / PICTURE)
        receipt.files, receipt.tensors = written.files, written.tensors
        seal(staging.folder, receipt)
        staging.publish()
    return receipt


def prove(request: Request, source: Source, whole: Path, conversion: Conversion) -> dict[str, Any]:
    """The record of a verification. Raises Corrupt where a claim of exactness does not hold."""
    record = verify(
        source.folder, whole, request.text, conversion.exact, quiet=request.as_json,
        others=request.source[1:],
    )  # fmt: skip
    if any(part.routes for part in conversion.fits.parts):
        record["choices"] = compare(request, source, whole, conversion)
    if record["status"] == "fail":
        raise Corrupt(
            f"{request.out} should compute what {source.folder} computes and does not: "
            f"relative difference {record['relative_difference']:.1e}, bound "
            f"{record['bound']:g}. Not published."
        )
    return record


def compare(
    request: Request, source: Source, converted: Path, conversion: Conversion
) -> list[dict[str, Any]]:
    """The fitted choice beside others, on the held-out text and on Python's documentation."""
    texts = [request.text, None] if request.text else [None]
    held_out = [windows(source.folder, text, source.config.vocab_size) for text in texts]
    given = [(name, ids) for ids, name in held_out]
    return side_by_side(source.folder, converted, conversion.fits, given)


def set_scales(config: RoutedLlamaConfig, scales: Mapping[int, float]) -> None:
    """Give each of these layers' MLPs its own output scale."""
    change_layers(config, "mlp", {i: {"output_scale": scale} for i, scale in scales.items()})


def change_layers(
    config: RoutedLlamaConfig, part: str, changes: Mapping[int, Mapping[str, Any]]
) -> None:
    """Give these layers' attention or MLP fields of their own; one entry where all are equal."""
    given: Any = getattr(config, part)
    layers = given if isinstance(given, list) else [given] * config.num_hidden_layers
    changed = [{**layer, **changes.get(i, {})} for i, layer in enumerate(layers)]
    same = all(layer == changed[0] for layer in changed)
    setattr(config, part, changed[0] if same else changed)


def describe_step(
    request: Request, sources: list[Source], conversion: Conversion
) -> dict[str, Any]:
    """The receipt's entry for this conversion."""
    recipe = conversion.recipe
    return {
        "recipe": recipe.name,
        "options": {**dataclasses.asdict(recipe), "layers": request.layers, "dtype": request.dtype},  # type: ignore[call-overload]
        "seed": request.seed,
        "versions": versions(),
        "sources": [
            {
                "path": str(source.folder),
                "config": hash_file(source.folder / "config.json"),
                "files": {
                    name: {"xxh3": hash_file(source.folder / name), "bytes": size}
                    for name in source.files
                    for size in [(source.folder / name).stat().st_size]
                },
            }
            for source in sources
        ],
        "calibration": request.calibrate
        and {
            "path": str(request.calibrate),
            "xxh3": hash_file(request.calibrate),
            **({"tokens": request.calibration_tokens or TOKENS} if conversion.fits.wanted else {}),
        },
        "exact": conversion.exact,
        "statement": conversion.statement,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_plan(
    conversion: Conversion, plan: writer.Plan, sources: list[Source]
) -> dict[str, Any]:
    """The plan by groups of tensors that differ only in their layer, and its sizes."""
    linked = written = 0
    for shard in writer.shards(plan, sources):
        if shard.linked:
            linked += shard.size
        else:
            written += shard.size
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, expression in plan.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        key = _without(name, layer), _without(str(expression), layer)
        group = groups.setdefault(
            key, {"tensor": key[0], "from": key[1], "shape": list(expression.shape), "count": 0}
        )
        group["count"] += 1
    total, active = parameter_counts(conversion.config)
    return {
        "groups": list(groups.values()),
        "fitted": [part.describe() for part in conversion.fits.wanted],
        "linked_bytes": linked,
        "written_bytes": written,
        "total_parameters": total,
        "active_parameters": active,
        "exact": conversion.exact,
        "statement": conversion.statement,
    }


def _without(text: str, layer: str) -> str:
    return text.replace(f".layers.{layer}.", ".layers.*.") if layer else text


def describe_lines(described: dict[str, Any]) -> str:
    """A described plan for people."""
    lines = [
        f"{g['count']:>4} × {g['tensor']} {tuple(g['shape'])}"
        + ("" if g["from"] == g["tensor"] else f" = {g['from']}")
        for g in described["groups"]
    ]
    lines += [f"to be fitted to text: {what}" for what in described["fitted"]]
    lines.append(
        f"{described['linked_bytes'] / 1e9:.2f} GB linked where the file system allows, "
        f"{described['written_bytes'] / 1e9:.2f} GB written; "
        f"{described['total_parameters'] / 1e6:.1f} M parameters, "
        f"{described['active_parameters'] / 1e6:.1f} M active"
    )
    verdict = "preserves the function" if described["exact"] else "does not preserve the function"
    return "\n".join([*lines, f"{verdict}: {described['statement']}"])
