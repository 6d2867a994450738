"""`moe upcycle RECIPE`: options to a recipe, a plan to a folder, proof to a receipt."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from moe.errors import Corrupt, UserError
from moe.hf.importing import write_both_ropes
from moe.model.accounting import parameter_counts
from moe.upcycle import writer
from moe.upcycle.receipt import Receipt, seal, versions
from moe.upcycle.recipes import Conversion, Copy, MoH, Recipe, convert
from moe.upcycle.source import Source, hash_file
from moe.upcycle.tokenizer import keep_class
from moe.upcycle.verify import summary, verify, windows

app = typer.Typer(
    help="Turn a dense checkpoint into a mixture and prove what was kept.", no_args_is_help=True
)

Dtype = Literal["float32", "bfloat16"]
SourceOption = Annotated[
    list[Path], typer.Option(help="Model folder: Llama, Mistral, Qwen2, Qwen3, or a RoutedLlama.")
]
Out = Annotated[Path, typer.Option(help="Folder to create.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
Layers = Annotated[str | None, typer.Option(help="Layers to convert, like 0-3,7; default all.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of the result; default the source's.")]
Purpose = Annotated[
    Literal["train", "serve"],
    typer.Option(help="train: balance loss 0.01 in the config. serve: none. Routers are drawn "
                 "small in both: renormalised weights are exact at any draw, so it is chosen for "
                 "even loads."),
]  # fmt: skip
Text = Annotated[Path | None, typer.Option(help="Held-out text to verify on.")]
Verify = Annotated[bool, typer.Option(help="Reload the result and compare it with the source.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What every recipe is asked for besides its own options."""

    source: Path
    out: Path
    seed: int
    layers: str | None
    dtype: Dtype | None
    text: Path | None
    verify: bool
    dry_run: bool
    as_json: bool


@app.command()
def moh(
    source: SourceOption,
    out: Out,
    router: Annotated[
        Literal["qnorm", "two_stage"],
        typer.Option(help="qnorm: no parameters, heads on or off; two_stage: learned, soft."),
    ] = "qnorm",
    shared_heads: Annotated[
        int | None, typer.Option(help="The first N heads are always on; default half.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Routed heads per token; default so that 75 % are active.")
    ] = None,
    granularity: Annotated[
        Literal["head", "kv_group"], typer.Option(help="What competes: heads, or whole KV groups.")
    ] = "head",
    purpose: Purpose = "train",
    layers: Layers = None,
    seed: Seed = 0,
    dtype: DtypeOption = None,
    text: Text = None,
    verify: Verify = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Mixture of attention heads (MoH): some heads always on, the others compete per token."""
    recipe = MoH(
        router=router,
        shared_heads=shared_heads,
        top_k=top_k,
        granularity=granularity,
        purpose=purpose,
    )
    request = Request(
        source=_single(source), out=out, seed=seed, layers=layers, dtype=dtype, text=text,
        verify=verify, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    run(recipe, request)


@app.command()
def copy(
    source: SourceOption,
    out: Out,
    num_experts: Annotated[int, typer.Option(help="Experts per layer.")],
    top_k: Annotated[int, typer.Option(help="Experts per token.")],
    router_init: Annotated[
        str | None, typer.Option(help="normal:STD or zero; default normal:0.02.")
    ] = None,
    diversify: Annotated[
        str, typer.Option(help="none, noise:S (deviation) or drop:R (share of neurons redrawn).")
    ] = "none",
    purpose: Purpose = "train",
    layers: Layers = None,
    seed: Seed = 0,
    dtype: DtypeOption = None,
    text: Text = None,
    verify: Verify = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Mixture of experts by copying each MLP (sparse upcycling)."""
    recipe = Copy(
        num_experts=num_experts,
        top_k=top_k,
        router_init=router_init,
        diversify=diversify,
        purpose=purpose,
    )
    request = Request(
        source=_single(source), out=out, seed=seed, layers=layers, dtype=dtype, text=text,
        verify=verify, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    run(recipe, request)


def _single(sources: list[Path]) -> Path:
    if len(sources) > 1:
        raise UserError(f"{len(sources)} sources given: this recipe takes one --source.")
    return sources[0]


def run(recipe: Recipe, request: Request) -> None:
    """Carry out a request and print what came of it."""
    import json

    source = Source.open(request.source)
    dtype = getattr(torch, request.dtype) if request.dtype else None
    conversion = convert(source, recipe, request.seed, request.layers, dtype)
    plan = writer.cast(conversion.plan, dtype)
    if os.path.lexists(request.out):
        raise UserError(f"{request.out} exists. Choose another --out, or remove it.")
    if request.out.resolve().is_relative_to(source.folder.resolve()):
        raise UserError(f"--out {request.out} lies in the source's folder. Choose another.")
    for warning in conversion.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if request.dry_run:
        described = describe_plan(conversion, plan, source)
        typer.echo(json.dumps(described) if request.as_json else describe_lines(described))
        return
    if request.verify:  # what would make it fail is said now, not after an hour of writing
        windows(source.folder, request.text, source.config.vocab_size)
    receipt = execute(request, source, conversion, plan)
    if request.as_json:
        typer.echo(json.dumps({"out": str(request.out), **dataclasses.asdict(receipt)}))
        return
    total, active = parameter_counts(conversion.config)
    typer.echo(f"{request.out}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active")
    exactness = "preserves the function" if conversion.exact else "does not preserve the function"
    typer.echo(f"{recipe.name} {exactness}: {conversion.statement}")
    typer.echo(summary(receipt.verification) if receipt.verification else "not verified")


def execute(request: Request, source: Source, conversion: Conversion, plan: writer.Plan) -> Receipt:
    """Write, verify, seal and publish. Raises Corrupt where a claim of exactness does not hold."""
    step = describe_step(request, source, conversion)
    identity = {k: v for k, v in step.items() if k != "created"}
    staging = writer.Staging(request.out, writer.fingerprint(identity))
    if staging.open():
        typer.echo(f"continuing in {staging.folder}", err=True)
    earlier = Receipt.read(source.folder)
    receipt = Receipt(steps=[*(earlier.steps if earlier else []), step])
    written = writer.write_weights(plan, [source], staging, quiet=request.as_json)
    with writer.building(staging):
        writer.copy_side_files(source.folder, staging.folder)
        # beside its place until it is verified: a folder without a config loads nowhere
        config = staging.folder / "unverified"
        conversion.config.save_pretrained(config)
        write_both_ropes(config / "config.json")
        keep_class(source.folder, staging.folder, config)
        if request.verify:
            parent, target = source.folder, staging.folder
            receipt.verification = verify(
                parent, target, request.text, conversion.exact, config, quiet=request.as_json
            )
            if receipt.verification["status"] == "fail":
                raise Corrupt(
                    f"{request.out} should compute what {source.folder} computes and does not: "
                    f"relative difference {receipt.verification['relative_difference']:.1e}, bound "
                    f"{receipt.verification['bound']:g}. Not published."
                )
        for path in config.iterdir():
            path.rename(staging.folder / path.name)
        config.rmdir()
        receipt.files, receipt.tensors = written.files, written.tensors
        seal(staging.folder, receipt)
        staging.publish()
    return receipt


def describe_step(request: Request, source: Source, conversion: Conversion) -> dict[str, Any]:
    """The receipt's entry for this conversion."""
    recipe = conversion.recipe
    return {
        "recipe": recipe.name,
        "options": {**dataclasses.asdict(recipe), "layers": request.layers, "dtype": request.dtype},
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
        ],
        "exact": conversion.exact,
        "statement": conversion.statement,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_plan(conversion: Conversion, plan: writer.Plan, source: Source) -> dict[str, Any]:
    """The plan by groups of tensors that differ only in their layer, and its sizes."""
    linked = written = 0
    for shard in writer.shards(plan, [source]):
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
    lines.append(
        f"{described['linked_bytes'] / 1e9:.2f} GB linked where the file system allows, "
        f"{described['written_bytes'] / 1e9:.2f} GB written; "
        f"{described['total_parameters'] / 1e6:.1f} M parameters, "
        f"{described['active_parameters'] / 1e6:.1f} M active"
    )
    verdict = "preserves the function" if described["exact"] else "does not preserve the function"
    return "\n".join([*lines, f"{verdict}: {described['statement']}"])
