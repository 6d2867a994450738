"""`moe tune control` from its arguments to the page: everything checked first."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.errors import UserError, problem, raise_all
from moe.progress import quiet_libraries
from moe.tune import control_report
from moe.tune import labels as label_sources
from moe.tune import prompts as prompt_files
from moe.tune.control import Cases, Measure, Plan, control, leave_out, summarise
from moe.tune.generation import Sampling
from moe.tune.labels import Field, Labels
from moe.tune.matched import KINDS
from moe.tune.measure import windows
from moe.tune.prompts import Prompt, encode
from moe.tune.record_run import check_out
from moe.tune.subject import Subject, check_scale, open_subject
from moe.tune.tuning import Tuning

WINDOW, MOST = 256, 16_384  # tokens of --text that are looked at, and at once
ALL = "all prompts"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked for."""

    model: Path
    tuning: Path
    prompts: Path
    out: Path
    measure: Measure
    labels: str | None
    target: str | None
    kinds: tuple[str, ...]
    seeds: int
    scale: float | None
    sampling: Sampling
    batch_size: int
    chat: bool
    text: Path | None
    tasks: str | None
    data: Path | None
    task_limit: int | None
    all_prompts: bool
    other_model: bool


def run(request: Request, say: Say, quiet: bool) -> tuple[dict[str, Any], str]:
    """Measure and write. Returns the results and the page. Raises UserError."""
    prompts, source, target = _checked(request)
    if not request.all_prompts:
        prompts = leave_out(prompts, Tuning.read(request.tuning), say)
    quiet_libraries()
    given = request.model, request.tuning, request.scale, request.other_model
    subject = open_subject(*given)
    tuning = subject.tuning
    assert tuning is not None
    tuning.scale = subject.scale
    for odd in tuning.cautions(subject.sites):
        say(f"note: {odd}")
    cases = _cases(subject, prompts, source, target, request)
    pieces = None if request.text is None else _text(subject, request.text)
    if pieces is not None and cases.measure == "loss":
        cases = _with_text(cases, pieces)
    plan = Plan(
        kinds=request.kinds,  # type: ignore[arg-type]  # checked
        seeds=request.seeds,
        batch_size=request.batch_size,
    )
    found = control(subject, tuning, cases, plan, quiet)
    result = summarise(found, cases, tuning)
    about: dict[str, Any] = {"model": subject.identity, "tuning": tuning.summary()}
    if pieces is not None and cases.measure == "label":
        beside = control(subject, tuning, pieces, plan, quiet)
        about["text"] = control_report.table(summarise(beside, pieces, tuning))
    if request.tasks is not None:
        del subject.model  # the harness loads its own
        about["tasks"] = _tasks(request, tuning, say)
    request.out.mkdir(parents=True)
    page = control_report.write(request.out, result, tuning, about)
    return {"out": str(request.out), **about, **result}, page


def _checked(request: Request) -> tuple[list[Prompt], Labels, str]:
    """Prompts, labels and the target, or everything that is wrong with the request."""
    problems = problem(check_out, request.out)
    problems += problem(check_scale, request.scale, request.tuning)
    if unknown := [kind for kind in request.kinds if kind not in KINDS]:
        problems.append(f"--kind {', '.join(unknown)}: use {', '.join(KINDS)}.")
    for option, path in (("--text", request.text), ("--data", request.data)):
        if path is not None and not path.exists():
            problems.append(f"{option} {path} does not exist.")
    if request.tasks is None and (request.data is not None or request.task_limit is not None):
        problems.append("--data and --task-limit go with --tasks.")
    found: dict[str, Any] = {}
    for name, call, argument in (
        ("prompts", prompt_files.read, request.prompts),
        ("labels", label_sources.read, request.labels),
        ("tuning", Tuning.read, request.tuning),
    ):
        problems += problem(lambda c=call, a=argument, n=name: found.update({n: c(a)}))
    source = found.get("labels")
    if request.measure == "label" and isinstance(source, Field):
        problems.append(
            "--measure label asks what responses are called: give --labels a YAML of rules or a "
            "judge."
        )
    if "tuning" in found:
        target = request.target or found["tuning"].method.get("target")
        if target is None:
            problems.append(
                f"{request.tuning} does not say what it was ranked for. Give --target LABEL."
            )
    if source is not None and "prompts" in found:
        problems += problem(source.check, found["prompts"])
    problems += _task_problems(request)
    raise_all(problems)
    if request.measure == "label" and source is not None and target not in (source.names or ()):
        raise UserError(
            f"no response can be called {target!r}: --labels {request.labels} has "
            f"{', '.join(source.names or ())}. Give --target one of them."
        )
    return found["prompts"], found["labels"], target


def _task_problems(request: Request) -> list[str]:
    """Tasks that do not exist, said before anything is measured."""
    if request.tasks is None:
        return []
    from moe.evals.run import find_tasks

    return problem(find_tasks, _names(request.tasks), None, request.data)


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]


def _cases(
    subject: Subject, prompts: list[Prompt], source: Labels, target: str, request: Request
) -> Cases:
    """The prompts in groups. Raises UserError where there is none of the target."""
    if request.measure == "loss":
        groups = source.label(prompts, [p.response for p in prompts])
        labelled = [n for n, group in enumerate(groups) if group is not None]
        if not labelled:
            raise UserError(
                "none of the prompts has a label, so there are no groups to compare. Give "
                "--labels, or a field `label` in the prompts' file."
            )
        prompts = [prompts[n] for n in labelled]
        names = [str(groups[n]) for n in labelled]
        if target not in names:
            close = difflib.get_close_matches(target, names, n=3) or sorted(set(names))
            raise UserError(
                f"no prompt is labelled {target!r}; there are {', '.join(dict.fromkeys(close))}. "
                "Give --target, or other prompts."
            )
    else:
        field = [p.fields.get("label") for p in prompts]
        names = [ALL if value is None else str(value) for value in field]
    longest = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    room = request.sampling.max_new_tokens if request.measure == "label" else 0
    encoded = encode(prompts, subject.tokenizer, request.chat, longest, room)
    if request.measure == "loss":
        short = [p.line for p, e in zip(prompts, encoded, strict=True)
                 if e.response == [] or (len(e.prompt) < 2 and not e.response)]  # fmt: skip
        if short:
            raise UserError(
                f"{prompt_files.say_lines(short)}: an empty response, or a prompt of one token, "
                "has no likelihood. Leave them out."
            )
    return Cases(
        prompts=prompts, encoded=encoded, groups=names, measure=request.measure, target=target,
        source=source, sampling=request.sampling,
    )  # fmt: skip


def _text(subject: Subject, path: Path) -> Cases:
    """A text in windows, as a group of its own. Raises UserError for one that is too short."""
    try:
        ids = subject.tokenizer(path.read_text())["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read as text: {error}.") from error
    pieces = windows(ids, WINDOW, MOST)
    if len(pieces) < 2:
        raise UserError(f"--text {path} has {len(ids)} tokens: give {2 * WINDOW} or more.")
    group = f"text: {path.name}"
    rows = [
        Prompt(line=n, text=f"{group} {n}", messages=None, response=None, fields={})
        for n in range(len(pieces))
    ]
    groups = [group] * len(rows)
    return Cases(prompts=rows, encoded=pieces, groups=groups, measure="loss", target=group)


def _with_text(cases: Cases, more: Cases) -> Cases:
    """One more group."""
    return replace(
        cases,
        prompts=[*cases.prompts, *more.prompts],
        encoded=[*cases.encoded, *more.encoded],
        groups=[*cases.groups, *more.groups],
    )


def _tasks(request: Request, tuning: Tuning, say: Say) -> str:
    """lm-eval's tasks with the tuning, beside the model as it is: a table."""
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from moe.evals import run as harness

    names = _names(request.tasks or "")
    report = harness.evaluate(
        [request.model, request.model], names, None, request.data, request.task_limit,
        harness.How(batch_size=request.batch_size), say=say, tuning=tuning,
    )  # fmt: skip
    return harness.table(report, ["tuned", "as it is"])
