"""`moe kernels`."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe.errors import UserError
from moe.jsonfile import read_json

if TYPE_CHECKING:  # it needs Triton, which is not everywhere
    from moe.kernels.tune import Sizes, Timing

app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None:
    """The Triton kernels of this machine's GPU."""


@app.command()
def tune(
    folder: Annotated[Path, typer.Argument(help="Model folder, whose sizes are tuned for.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table; added to if it exists.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step on one GPU.")] = 8192,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    workers: Annotated[int, typer.Option(min=1, help="Compilers side by side.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time every tiling of every kernel at a model's sizes, and write a table of the best.

    MOE_KERNELS_TABLE=FILE makes runs use the table. Nothing is ever tuned inside a step.
    """
    from moe.kernels.backend import has_triton

    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {dtype} has no kernels. Use bfloat16, float16 or float32.")
    if not has_triton():
        raise UserError("moe kernels tune needs Triton: pip install 'triton>=3.6'.")
    found = sizes_of(folder, tokens, dtype)
    ready()
    from moe.kernels import tune as tuning

    table = read_table(output)
    rows = []
    for sizes in found:
        timings = tuning.tune(sizes, workers, lambda timing: _show(timing, as_json))
        chosen = tuning.best(timings)
        tuning.add(table, sizes, chosen)
        rows += [asdict(timing) for timing in chosen]
        output.write_text(json.dumps(table, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps({"table": str(output), "chosen": rows}))
    else:
        typer.echo(f"{output}: {len(rows)} tilings. Use them with MOE_KERNELS_TABLE={output}.")


def read_table(path: Path) -> dict[str, Any]:
    """A table that is there already, or an empty one."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder to write a table into.")
    if not path.exists():
        return {}
    try:
        table = read_json(path)
        for by_dtype in table.values():
            for by_kernel in by_dtype.values():
                for by_rows in by_kernel.values():
                    assert all(isinstance(sizes, dict) for sizes in by_rows.values())
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is no table of tilings ({error!r}). Name another file.") from error
    return table


def ready() -> None:
    """Raise UserError where there is nothing to time."""
    import torch

    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        raise UserError("moe kernels tune times kernels on a GPU, and there is none here.")


def sizes_of(folder: Path, tokens: int, dtype: str) -> "list[Sizes]":
    """What there is to tune in a model: each routed MLP, each gated attention, once."""
    from moe.hf.families import routed_config
    from moe.hf.native import HOMES, from_native
    from moe.kernels.tune import Sizes
    from moe.model.attention import heads_on, widened
    from moe.model.spec import BAMAttention, DenseMLP, MoHAttention, UoEAttention, routed_on
    from moe.upcycle.source import read_config

    source = read_config(folder)
    config = from_native(source) if source.model_type in HOMES else routed_config(source)
    found: list[Sizes] = []
    for layer in range(config.num_hidden_layers):
        mlp, attention = config.mlp_spec(layer), config.attention_spec(layer)
        if not isinstance(mlp, DenseMLP):
            assert mlp.intermediate_size is not None
            k = max(1, round(routed_on(mlp)))
            sizes = config.hidden_size, mlp.intermediate_size, mlp.num_experts, k
            found.append(Sizes(tokens, *sizes, dtype=dtype))
        if isinstance(attention, UoEAttention) and dtype != "float32":
            parts = attention.num_experts
            assert config.num_key_value_heads is not None and config.head_dim is not None
            own = config.num_attention_heads // parts, config.num_key_value_heads // parts
            found.append(Sizes(tokens, 0, 0, 0, 0, *own, config.head_dim, dtype=dtype))
        if isinstance(attention, MoHAttention | BAMAttention) and dtype != "float32":
            wide = widened(config, attention)
            assert wide.num_key_value_heads is not None
            heads: dict[str, Any] = {
                "heads": wide.num_attention_heads,
                "kv_heads": wide.num_key_value_heads,
                "head_size": config.head_dim,
            }
            on = round(heads_on(attention, heads["heads"], heads["kv_heads"]))
            some = on if on < heads["heads"] else 0
            found.append(Sizes(tokens, 0, 0, 0, 0, **heads, heads_on=some, dtype=dtype))
    if not found:
        raise UserError(
            f"{folder} has no kernel to tune: neither a routed MLP nor MoH, BAM or UoE attention"
            + (" (which has none in float32)." if dtype == "float32" else ".")
        )
    return list(dict.fromkeys(found))


def _show(timing: "Timing", as_json: bool) -> None:
    cut = " ".join(f"{name} {value}" for name, value in timing.cut.items())
    took = timing.problem if timing.seconds is None else f"{1e3 * timing.seconds:9.4f} ms"
    typer.echo(f"{timing.kernel:>16} {took}  {cut}", err=as_json)
