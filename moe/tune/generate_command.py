"""`moe generate`."""

import json
from typing import Annotated

import typer

from moe.tune.command import AsJson, Chat, Model, OtherModel, Scale, Seed, Temperature, TuningFile

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to go on from; repeat for more.")],
    tuning: TuningFile = None,
    scale: Scale = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    chat: Chat = False,
    other_model: OtherModel = False,
    as_json: AsJson = False,
) -> None:
    """Print a response to each prompt, with a tuning at work if one is given."""
    from moe.errors import problem, raise_all
    from moe.progress import quiet_libraries
    from moe.tune.generation import Sampling
    from moe.tune.subject import answer, check_scale, describe, open_subject

    empty = ["a --prompt is empty. Give it some text."] if "" in prompt else []
    raise_all(problem(check_scale, scale, tuning) + empty)
    quiet_libraries()
    subject = open_subject(model, tuning, scale, other_model, dense=True)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    responses = answer(subject, prompt, sampling, chat)
    said = describe(subject.tuning, subject.scale)
    if as_json:
        rows = [{"prompt": p, "response": r} for p, r in zip(prompt, responses, strict=True)]
        typer.echo(json.dumps({"tuning": said, "responses": rows}))
        return
    if subject.tuning is not None:
        typer.echo(said, err=True)
        for odd in subject.tuning.cautions(subject.sites):
            typer.echo(f"note: {odd}", err=True)
    for number, (text, response) in enumerate(zip(prompt, responses, strict=True)):
        if len(prompt) > 1:
            typer.echo(("\n" if number else "") + f"> {text}")
        typer.echo(response)
