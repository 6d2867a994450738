"""`moe tune`: look at a mixture's experts, and change what they do."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe.tune.control_command import control
from moe.tune.export_command import export
from moe.tune.rank_command import rank

app = typer.Typer(
    name="moe tune",
    help="Look at what a mixture's experts do, and tune it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(help="Model folder or training checkpoint.")]
TuningFile = Annotated[Path | None, typer.Option("--tuning", help="tuning.json to work under.")]
Scale = Annotated[float | None, typer.Option(help="Dial of the tuning, 0 to 1; its own if left.")]
OtherModel = Annotated[
    bool, typer.Option("--other-model", help="The tuning may be another model's, of one shape.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
Chat = Annotated[bool, typer.Option(help="Prompts are a user's messages of a chat.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def record(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="JSON lines with prompt or messages, response.")],
    out: Annotated[Path, typer.Option(help="trace.npz to write.")],
    tokens: Annotated[
        Literal["prompt", "last", "generated", "all"], typer.Option(help="Tokens to look at.")
    ] = "prompt",
    labels: Annotated[
        str | None, typer.Option(help="field:NAME, or YAML of rules or a judge.")
    ] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="Longest response, tokens.")] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 8,
    chat: Chat = False,
    tuning: TuningFile = None,
    scale: Scale = None,
    other_model: OtherModel = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many prompts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write how often, and how much, each expert was on for each prompt."""
    from moe.tune.generation import Sampling
    from moe.tune.record import Recording
    from moe.tune.record_run import Request, run, summary

    sampling = None
    if generate is not None:
        sampling = Sampling(max_new_tokens=generate, temperature=temperature, seed=seed)
    request = Request(
        model=model, prompts=prompts, out=out, labels=labels, chat=chat, tuning=tuning,
        scale=scale, other_model=other_model, limit=limit,
        recording=Recording(tokens=tokens, sampling=sampling, batch_size=batch_size),
    )  # fmt: skip
    report = run(request, say=lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(report) if as_json else summary(report))


@app.command()
def chat(
    model: Model,
    tuning: TuningFile = None,
    scale: Scale = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    chat: Chat = False,
    other_model: OtherModel = False,
) -> None:
    """Turn a tuning's dial in a session, and see each prompt without and with it."""
    from moe.errors import problem, raise_all
    from moe.progress import quiet_libraries
    from moe.tune.chat import Session, talk
    from moe.tune.generation import Sampling
    from moe.tune.subject import check_scale, open_subject

    raise_all(problem(check_scale, scale, tuning))
    quiet_libraries()
    subject = open_subject(model, tuning, scale, other_model)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    talk(Session(subject, sampling, chat))


app.command()(rank)
app.command()(control)
app.command()(export)
