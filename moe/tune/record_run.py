"""`moe tune record` from its arguments to the file: everything checked first, labels last."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moe.errors import UserError, problem, raise_all
from moe.progress import quiet_libraries
from moe.tune import labels as label_sources
from moe.tune import prompts as prompt_files
from moe.tune.prompts import Encoded, Prompt, say_lines
from moe.tune.record import Partial, Recording, check_tokens, record, settings_of
from moe.tune.subject import check_scale, open_subject
from moe.tune.trace import Trace
from moe.tune.tuning import Tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked for."""

    model: Path
    prompts: Path
    out: Path
    labels: str | None
    chat: bool
    tuning: Path | None
    scale: float | None
    other_model: bool
    limit: int | None
    recording: Recording


def run(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Record, label and write. Returns what the command reports. Raises UserError."""
    prompts, source, encoded = _checked(request)
    if again := prompt_files.repeated(prompts):
        say(f"{request.prompts}: {say_lines(again)}: a prompt that an earlier line has too")
    quiet_libraries()
    subject = open_subject(request.model, request.tuning, request.scale, request.other_model)
    partial = Partial(
        request.out.with_name(request.out.name + ".partial"),
        settings_of(subject, _hash(prompts), request.recording, request.chat, _tuning(request)),
    )
    if done := len(partial.read()):
        say(f"{partial.folder}: {done} of {len(prompts)} prompts are there, going on")
    try:
        trace = record(subject, prompts, encoded, request.recording, partial)
    except KeyboardInterrupt:
        say(f"stopped; what is done is in {partial.folder}, and the same command goes on")
        raise
    del subject.model  # a judge takes its place
    responses = [row["response"] for row in trace.rows]
    for row, label in zip(trace.rows, source.label(prompts, responses), strict=True):
        row["label"] = label
    trace.settings["labels"] = source.describe()
    trace.write(request.out)
    partial.remove()
    return _report(trace, request, done)


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    labels = ", ".join(f"{name} {n}" for name, n in report["labels"].items())
    lines = [
        f"{report['prompts']} prompts, {report['tokens']} tokens ({report['watched']}), "
        f"{report['routers']} routers with {report['experts']} experts",
        f"labels: {labels}" if labels else "labels: none (`moe tune rank` needs them)",
    ]
    if report["unlabelled"] and labels:
        lines.append(f"without a label: {report['unlabelled']}")
    if report["empty"]:
        lines.append(f"without a token to watch: {report['empty']}")
    return "\n".join([*lines, report["out"]])


def _checked(
    request: Request,
) -> tuple[list[Prompt], label_sources.Labels, list[Encoded]]:
    """Prompts, labels and tokens, or everything that is wrong with the request."""
    from moe.hf.loading import load_tokenizer
    from moe.upcycle.source import read_config

    problems = problem(check_out, request.out)
    problems += problem(check_scale, request.scale, request.tuning)
    found: dict[str, Any] = {}

    def attempt(name: str, call: Callable[..., Any], *given: Any) -> None:
        try:
            found[name] = call(*given)
        except UserError as error:
            problems.extend(str(error).split("\n"))

    attempt("prompts", prompt_files.read, request.prompts, request.limit)
    attempt("labels", label_sources.read, request.labels)
    attempt("config", read_config, request.model)
    if "config" in found:
        attempt("tokenizer", load_tokenizer, request.model)
        causal = getattr(found["config"], "causal", True)
        problems += problem(check_tokens, request.recording.tokens, causal)
    if request.tuning is not None:
        attempt("tuning", Tuning.read, request.tuning)
    lines: list[str] = []  # said of lines of the prompts
    if "prompts" in found:
        problems += _response_problems(request, found["prompts"], found.get("labels"))
        if "labels" in found:
            lines += problem(found["labels"].check, found["prompts"])
    if "prompts" in found and "tokenizer" in found:
        sampling = request.recording.sampling
        room = sampling.max_new_tokens if sampling else 0
        longest = getattr(found["config"].get_text_config(), "max_position_embeddings", None)
        given = found["prompts"], found["tokenizer"], request.chat, longest, room
        lines += problem(lambda: found.update(encoded=prompt_files.encode(*given)))
    problems += [f"{request.prompts}, {t}" if t.startswith("line") else t for t in lines]
    raise_all(problems)
    return found["prompts"], found["labels"], found["encoded"]


def check_out(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists. Choose another --out, or remove it.")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--out {out}: {parent} is not a folder that can be written to.")


def _response_problems(
    request: Request, prompts: Sequence[Prompt], source: label_sources.Labels | None
) -> list[str]:
    """What needs responses that are neither there nor generated."""
    without = [p.line for p in prompts if p.response is None]
    if request.recording.sampling is not None or not without:
        return []
    found = []
    where = f"{request.prompts}, {say_lines(without)}"
    if request.recording.tokens in ("generated", "all"):
        found.append(
            f"--tokens {request.recording.tokens} looks at responses, and {where}: no `response`. "
            "Give --generate N to have them written."
        )
    if source is not None and source.needs_response:
        found.append(
            f"--labels {request.labels} reads responses, and {where}: no `response`. Give "
            "--generate N to have them written."
        )
    return found


def _hash(prompts: Sequence[Prompt]) -> str:
    """xxh3-128 over the lines that count."""
    import json

    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(json.dumps(prompt.fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _tuning(request: Request) -> str | None:
    from moe.upcycle.source import hash_file

    return None if request.tuning is None else hash_file(request.tuning)


def _report(trace: Trace, request: Request, resumed: int) -> dict[str, Any]:
    labels = Counter(label for label in trace.labels if label is not None)
    return {
        "out": str(request.out),
        "prompts": len(trace.rows),
        "resumed": resumed,
        "tokens": int(trace.tokens.sum()),
        "watched": request.recording.tokens,
        "routers": len(trace.sites),
        "experts": sum(site.experts for site in trace.sites),
        "labels": dict(labels.most_common()),
        "unlabelled": sum(label is None for label in trace.labels),
        "empty": int((trace.tokens == 0).sum()),
    }
