"""What each prompt's response is a case of: by a field, by rules, or by a model that judges it.

source = read("rules.yaml")        # field:NAME, rules, or a judge: a file with `doc_to_choice`
source.check(prompts)
labels = source.label(prompts, responses)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from moe.errors import UserError, problem, raise_all
from moe.tune.prompts import Prompt, say_lines

FIELD = "label"
_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


class Labels(Protocol):
    """Where labels come from."""

    @property
    def needs_response(self) -> bool: ...

    @property
    def names(self) -> list[str] | None:
        """All that there are; None where that depends on the prompts."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError where these prompts cannot be labelled."""

    def label(
        self, prompts: Sequence[Prompt], responses: Sequence[str | None]
    ) -> list[str | None]: ...

    def describe(self) -> dict[str, Any]:
        """What a trace says of it."""


@dataclass(frozen=True)
class Field:
    """A field of the prompts' lines; `asked` for, some line must have it."""

    name: str = FIELD
    asked: bool = False
    needs_response = False
    names = None

    def check(self, prompts: Sequence[Prompt]) -> None:
        values = [(p.line, p.fields.get(self.name)) for p in prompts]
        if self.asked and all(value is None for _, value in values):
            raise UserError(f"--labels field:{self.name}: no prompt has a field of that name.")
        wrong = [line for line, value in values if not isinstance(value, str | int | None)]
        if wrong:
            raise UserError(
                f"{say_lines(wrong)}: {self.name} is not a string, a whole number or a truth value."
            )

    def label(self, prompts: Sequence[Prompt], responses: Sequence[str | None]) -> list[str | None]:
        values = [p.fields.get(self.name) for p in prompts]
        return [None if value is None else str(value) for value in values]

    def describe(self) -> dict[str, Any]:
        return {"kind": "field", "name": self.name}


@dataclass(frozen=True)
class Rules:
    """The first label of which an expression is found in the response, or in the prompt."""

    on: Literal["response", "prompt"]
    default: str | None
    labels: dict[str, list[re.Pattern[str]]]

    @property
    def needs_response(self) -> bool:
        return self.on == "response"

    @property
    def names(self) -> list[str]:
        return [*self.labels, *([self.default] if self.default is not None else [])]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Rules fit any prompts."""

    def label(self, prompts: Sequence[Prompt], responses: Sequence[str | None]) -> list[str | None]:
        texts = responses if self.needs_response else [p.text for p in prompts]
        return [None if text is None else self.label_of(text) for text in texts]

    def label_of(self, text: str) -> str | None:
        for label, patterns in self.labels.items():
            if any(pattern.search(text) for pattern in patterns):
                return label
        return self.default

    def describe(self) -> dict[str, Any]:
        labels = {label: [p.pattern for p in some] for label, some in self.labels.items()}
        return {"kind": "rules", "on": self.on, "default": self.default, "labels": labels}


@dataclass(frozen=True)
class Judge:
    """The choice that a model finds likeliest after a text made of prompt and response.

    As lm-eval's multiple choice has it: the sum of the log-probabilities of the choice's tokens,
    delimiter included.
    """

    model: Path
    doc_to_text: str
    doc_to_choice: list[str]
    target_delimiter: str = " "

    @property
    def needs_response(self) -> bool:
        return "response" in self._names()

    @property
    def names(self) -> list[str]:
        return list(self.doc_to_choice)

    def check(self, prompts: Sequence[Prompt]) -> None:
        names = self._names() - {"prompt", "response"}
        missing = {name: [p.line for p in prompts if name not in p.fields] for name in names}
        raise_all(
            [
                f"{say_lines(lines)}: no field {name!r}, which the judge's doc_to_text names."
                for name, lines in sorted(missing.items())
                if lines
            ]
        )

    def label(self, prompts: Sequence[Prompt], responses: Sequence[str | None]) -> list[str | None]:
        from moe.tune.judge import likeliest

        texts = [self.render(p, response) for p, response in zip(prompts, responses, strict=True)]
        chosen = likeliest(
            self.model, texts, [self.target_delimiter + c for c in self.doc_to_choice]
        )
        return [self.doc_to_choice[i] for i in chosen]

    def render(self, prompt: Prompt, response: str | None) -> str:
        """The text that a choice follows."""
        given = prompt.fields | {"prompt": prompt.text, "response": response or ""}
        try:
            return _TEMPLATES.from_string(self.doc_to_text).render(**given)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"line {prompt.line}: the judge's doc_to_text: {error}.") from error

    def describe(self) -> dict[str, Any]:
        from moe.hf.loading import identity

        return {"kind": "judge", "model": identity(self.model), "doc_to_text": self.doc_to_text,
                "doc_to_choice": self.doc_to_choice}  # fmt: skip

    def _names(self) -> set[str]:
        return meta.find_undeclared_variables(_TEMPLATES.parse(self.doc_to_text))


def read(spec: str | None) -> Labels:
    """`field:NAME`, or a YAML file with rules or a judge; by itself the field `label`.

    Raises UserError with everything that is wrong in the file.
    """
    if spec is None:
        return Field()
    if spec.startswith("field:"):
        return Field(spec.removeprefix("field:"), asked=True)
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"--labels {spec} is neither field:NAME nor a file of rules or a judge.")
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({reason}).") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} has no keys: write `labels:` for rules, `doc_to_choice:` for a "
                        "judge.")  # fmt: skip
    if True in body:  # what YAML 1.1 makes of a bare `on`
        body["on"] = body.pop(True)
    judge = "doc_to_choice" in body
    problems = _judge_problems(body) if judge else _rule_problems(body)
    raise_all([f"{path}: {text}" for text in problems])
    if judge:
        return Judge(**{**body, "model": Path(body["model"])})
    patterns = {k: [re.compile(p) for p in some] for k, some in body["labels"].items()}
    return Rules(body.get("on", "response"), body.get("default"), patterns)


def _unknown(body: dict[Any, Any], known: tuple[str, ...]) -> list[str]:
    strange = sorted(str(key) for key in body if key not in known)
    return [f"{key} is not a key here. Known are {', '.join(known)}." for key in strange]


def _rule_problems(body: dict[Any, Any]) -> list[str]:
    found = _unknown(body, ("on", "default", "labels"))
    if body.get("on", "response") not in ("response", "prompt"):
        found.append(f"on={body['on']!r} is unknown. Use response or prompt.")
    if not isinstance(body.get("default"), str | None):
        found.append(f"default={body['default']!r} is not a string: put it in quotes.")
    labels = body.get("labels")
    if not isinstance(labels, dict) or not labels:
        return [*found, "labels is not a table of label: [expression, …]."]
    for label, patterns in labels.items():
        if not isinstance(label, str):
            found.append(f"labels: {label!r} is not a string: put it in quotes.")
        if not isinstance(patterns, list) or not patterns:
            found.append(f"labels: {label}: not a list of expressions.")
            continue
        for pattern in patterns:
            found += _pattern_problems(label, pattern)
    return found


def _pattern_problems(label: Any, pattern: Any) -> list[str]:
    if not isinstance(pattern, str):
        return [f"labels: {label}: {pattern!r} is not a string: put it in quotes."]
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return [f"labels: {label}: {pattern!r} is not a regular expression ({error})."]
    return []


def _judge_problems(body: dict[Any, Any]) -> list[str]:
    known = ("model", "doc_to_text", "doc_to_choice", "target_delimiter")
    found = _unknown(body, known)
    for key in ("model", "doc_to_text", "target_delimiter"):
        if not isinstance(body.get(key, " " if key == "target_delimiter" else None), str):
            found.append(f"{key}={body.get(key)!r} is not a string.")
    choices = body["doc_to_choice"]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        found.append(f"doc_to_choice={choices!r} is not a list of strings: put them in quotes.")
    elif len(set(choices)) < 2 or len(set(choices)) < len(choices):
        found.append("doc_to_choice needs two choices or more, all different.")
    if isinstance(body.get("doc_to_text"), str):
        try:
            _TEMPLATES.parse(body["doc_to_text"])
        except TemplateError as error:
            found.append(f"doc_to_text is not a template ({error}).")
    if isinstance(body.get("model"), str):
        found += problem(_check_model, Path(body["model"]))
    return found


def _check_model(folder: Path) -> None:
    from moe.hf.loading import load_tokenizer
    from moe.upcycle.source import read_config

    if not getattr(read_config(folder), "causal", True):
        raise UserError(f"{folder} is not causal: its likelihoods mean nothing.")
    load_tokenizer(folder)
