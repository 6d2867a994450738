"""`moe bench`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.errors import UserError, problem, raise_all
from moe.progress import quiet_libraries

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model folder or training checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to create for bench.json and bench.png.")],
    against: Annotated[
        Path | None, typer.Option(help="Its dense parent, where the receipt's is gone.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    length: Annotated[str, typer.Option(help="Tokens in a prompt, likewise.")] = "128,512",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds to take the median of.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Speed, memory and cache of a model beside its dense parent, in one run."""
    quiet_libraries()
    from moe.evals import bench
    from moe.evals.bench_plot import plot
    from moe.evals.command import check_model, check_out, short_names

    problems = problem(check_out, out)
    numbers: dict[str, tuple[int, ...]] = {}
    for option, text in (("--batch", batch), ("--length", length)):
        try:
            numbers[option] = _numbers(option, text)
        except UserError as error:
            problems.append(str(error))
    folders = [model]
    for folder in (model, against):
        if folder is not None:
            problems += problem(check_model, folder)
    raise_all(problems)
    parent = against or bench.find_parent(model)
    folders += [parent] if parent else []
    grid = bench.Grid(
        batches=numbers["--batch"], lengths=numbers["--length"],
        new_tokens=new_tokens, repeats=repeats,
    )  # fmt: skip
    bench.check(folders, grid)
    report = bench.bench(folders, grid, say=lambda text: typer.echo(text, err=True))
    report["notes"] = bench.caution(model, against) if against else []
    names = short_names(folders)
    out.mkdir(parents=True)
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, names, out / "bench.png")
    typer.echo(json.dumps(report) if as_json else f"{describe(report, names)}\n{out}/bench.png")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text!r}: give whole numbers above 0, separated by commas.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def describe(report: dict[str, Any], names: Sequence[str]) -> str:
    """What each model is, then a row a point and model, with the ratio to the parent."""
    from moe.evals.suites import aligned

    lines = [f"{report['device']}, {report['threads']} threads, {report['models'][0]['dtype']}"]
    for name, facts in zip(names, report["models"], strict=True):
        active = facts["active_parameters"]
        used = f", {active / 1e6:.1f} M active" if active else ""
        lines.append(f"{name}: {facts['total_parameters'] / 1e6:.1f} M parameters{used}")
    head = ["batch", "length", "model", "prompt tok/s", "first token ms", "writing tok/s",
            "forward MFLOPs/token", "peak MB", "cache B/token", "computed"]  # fmt: skip
    rows = [head]
    for point in report["points"]:
        for i, (name, found) in enumerate(zip(names, point["models"], strict=True)):
            place = [str(point["batch"]), str(point["length"]), name]
            if "error" in found:
                rows.append([*place, found["error"], *[""] * (len(head) - 4)])
                continue
            rows.append([*place, *_cells(found)])
            if i > 0 and point["ratios"][i - 1]:
                rows.append([*place[:2], f"{names[0]} / {name}", *_ratio(point["ratios"][i - 1])])
    notes = "".join(f"\n\nnote: {note}" for note in report["notes"])
    return "\n".join(lines) + "\n\n" + aligned(rows) + notes


def _cells(found: dict[str, Any]) -> list[str]:
    def number(key: str, unit: float = 1.0) -> str:
        return "–" if found[key] is None else f"{found[key] / unit:.4g}"

    return [
        number("prefill_tokens_per_second"),
        number("time_to_first_token", 1e-3),
        number("decode_tokens_per_second"),
        number("forward_flops_per_token", 1e6),
        number("peak_memory_bytes", 1e6),
        number("cache_bytes_per_token"),
        number("computed_cache_bytes_per_token"),
    ]


def _ratio(ratios: dict[str, list[float]]) -> list[str]:
    keys = ("prefill_tokens_per_second", "time_to_first_token", "decode_tokens_per_second")
    cells = [f"{m:.2f} ({low:.2f}–{high:.2f})" for m, low, high in (ratios[key] for key in keys)]
    return [*cells, "", "", "", ""]
