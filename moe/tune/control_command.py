"""`moe tune control`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

KINDS = "random, rate_matched or layer_matched; repeat; default all three."
Scale = Annotated[float | None, typer.Option(help="Dial, 0 to 1; default the tuning's own.")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, with and without the tuning.")]
Data = Annotated[Path | None, typer.Option(help="Folder that local_… tasks read.")]
Out = Annotated[Path, typer.Option(help="Folder to create for report.md and results.json.")]


def control(
    model: Annotated[Path, typer.Argument(help="Model folder or training checkpoint.")],
    tuning: Annotated[Path, typer.Option(help="tuning.json to test.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with prompt or messages, label.")],
    out: Out,
    measure: Annotated[
        Literal["loss", "label"],
        typer.Option(help="Perplexity of the prompts, or how often responses are the target."),
    ] = "loss",
    labels: Annotated[
        str | None, typer.Option(help="field:NAME, or YAML of rules or a judge of responses.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Default: what was ranked for.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help=KINDS)] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Control sets of each kind.")] = 3,
    scale: Scale = None,
    generate: Annotated[int, typer.Option(min=1, help="Longest response, tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 8,
    chat: Annotated[bool, typer.Option(help="Prompts are a user's messages of a chat.")] = False,
    text: Annotated[Path | None, typer.Option(help="Text that must not suffer.")] = None,
    tasks: Tasks = None,
    data: Data = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    all_prompts: Annotated[bool, typer.Option(help="Those that ranked the experts too.")] = False,
    other_model: Annotated[
        bool, typer.Option(help="Tuning of another model of the shape.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hold a tuning's effect against the same done to other experts, dose by dose."""
    from moe.tune import matched
    from moe.tune.control_run import Request, run
    from moe.tune.generation import Sampling

    request = Request(
        model=model, tuning=tuning, prompts=prompts, out=out, measure=measure, labels=labels,
        target=target, kinds=tuple(dict.fromkeys(kind or matched.KINDS)), seeds=seeds, scale=scale,
        sampling=Sampling(max_new_tokens=generate, temperature=temperature, seed=seed),
        batch_size=batch_size, chat=chat, text=text, tasks=tasks, data=data,
        task_limit=task_limit, all_prompts=all_prompts, other_model=other_model,
    )  # fmt: skip
    result, page = run(request, lambda words: typer.echo(words, err=True), quiet=as_json)
    typer.echo(json.dumps(result) if as_json else f"{page}\n{out}/report.md")
