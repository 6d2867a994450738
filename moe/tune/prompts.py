"""Prompts to look at a model with: JSON lines, and the tokens they become.

prompts = read(Path("a.jsonl"))            # {"prompt": …} or {"messages": […]}, "response"?
encoded = encode(prompts, tokenizer, chat=False, longest=2048)
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from moe.errors import UserError, raise_all

MOST_SAID = 10  # problems of one file: the rest are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One line of the file."""

    line: int  # from 1
    text: str  # the prompt; of a chat, its messages as "role: content"
    messages: list[dict[str, Any]] | None  # None for a plain prompt
    response: str | None
    fields: dict[str, Any]  # all of the line, for judges and labels

    @property
    def id(self) -> str:
        """xxh3-128 of the text."""
        return xxhash.xxh3_128(self.text.encode()).hexdigest()


class Encoded(NamedTuple):
    """A prompt's tokens, and those of its response where it has one."""

    prompt: list[int]
    response: list[int] | None


def read(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file of JSON lines, the first `limit` of them; empty lines do not count.

    Raises UserError with what is wrong in the file, line by line.
    """
    try:
        # what else ends a line may stand in a string
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{path}: {reason}. Give a file of JSON lines, one prompt each.") from error
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            prompts.append(prompt_of(number, json.loads(line)))
        except UserError as error:
            problems.append(f"{path}, line {number}: {error}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}, line {number} is not JSON ({error}).")
    raise_all(_shortened(problems))
    if not prompts:
        raise UserError(f"{path} has no prompts. Write one JSON object a line with a `prompt`.")
    return prompts


def repeated(prompts: Sequence[Prompt]) -> list[int]:
    """Lines of the prompts that an earlier line has too."""
    return [p.line for p, place in zip(prompts, places(prompts), strict=True) if place[-2:] != "-0"]


def places(prompts: Sequence[Prompt]) -> list[str]:
    """What tells each prompt from all others, wherever it stands: its id, and which one of that."""
    met: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"{prompt.id}-{met[prompt.id]}")
        met[prompt.id] += 1
    return names


def encode(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    chat: bool,
    longest: int | None,
    room: int = 0,
    unit: str = "line",
) -> list[Encoded]:
    """Tokens of prompts: chats by the tokenizer's template, with `chat` plain prompts too.

    Raises UserError for those of no token, and of more than `longest` less the `room` for what is
    to be generated.
    """
    if (chat or any(p.messages for p in prompts)) and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the model's tokenizer has no chat template, so messages cannot be written as it reads "
            "them. Use plain prompts, or copy chat_template.jinja beside it."
        )
    encoded, problems, too_long = [], [], []
    for prompt in prompts:
        try:
            text, special = prompt.text, True
            if prompt.messages is not None or chat:
                messages = prompt.messages or [{"role": "user", "content": prompt.text}]
                text, special = rendered(messages, tokenizer), False
            entry = _encode(text, prompt.response, special, tokenizer)
        except UserError as error:
            problems.append(f"{unit} {prompt.line}: {error}")
            continue
        size = len(entry.prompt) + (room if entry.response is None else len(entry.response))
        if not entry.prompt:
            problems.append(f"{unit} {prompt.line}: there are no tokens in it.")
        elif longest is not None and size > longest:
            too_long.append((prompt.line, size))
        encoded.append(entry)
    if too_long:
        line, size = max(too_long, key=lambda pair: pair[1])
        where = say_lines([n for n, _ in too_long], unit)
        problems.append(
            f"{where}: longer than the model's {longest} positions with what is to follow "
            f"({unit} {line}: {size} tokens). Shorten or drop them."
        )
    raise_all(_shortened(problems))
    return encoded


def rendered(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """A chat as the model reads it, up to where its answer begins."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from error


def _encode(text: str, response: str | None, special: bool, tokenizer: Any) -> Encoded:
    if any("\ud800" <= letter <= "\udfff" for letter in text + (response or "")):
        raise UserError("it is not text: half a character, or bytes that are not UTF-8.")

    def ids(of: str, special: bool = False) -> list[int]:
        return list(tokenizer(of, add_special_tokens=special)["input_ids"])

    prompt = ids(text, special)
    if response is None:
        return Encoded(prompt, None)
    whole, alone = ids(text + response), ids(text)
    if whole[: len(alone)] == alone:
        return Encoded(prompt, whole[len(alone) :])
    return Encoded(prompt, ids(response))  # where a token would lie across the border


def prompt_of(number: int, row: Any) -> Prompt:
    problem = _row_problem(row)
    if problem:
        raise UserError(problem)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError("half of a surrogate pair is in it, which is no character.") from error
    messages = row.get("messages")
    text = row.get("prompt")
    if messages is not None:
        text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return Prompt(
        line=number, text=text, messages=messages, response=row.get("response"), fields=row
    )


def _row_problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"{json.dumps(row)[:40]} is not an object with a `prompt`."
    prompt, messages, response = (row.get(k) for k in ("prompt", "messages", "response"))
    if prompt is None and messages is None:
        return "no `prompt` and no `messages`."
    if prompt is not None and messages is not None:
        return "both `prompt` and `messages`: give one of them."
    if prompt is not None and not isinstance(prompt, str):
        return f"prompt={json.dumps(prompt)[:40]} is not a string."
    if prompt == "" or messages == []:
        return "the prompt is empty."
    if messages is not None and not (
        isinstance(messages, list)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in messages
        )
    ):
        return "messages is not a list of objects with a `role` and a `content`, both strings."
    if response is not None and not isinstance(response, str):
        return f"response={json.dumps(response)[:40]} is not a string."
    return None


def say_lines(numbers: Sequence[int], unit: str = "line") -> str:
    """`line 3`, or `lines 3, 5, 8 … (12 of them)`."""
    some = ", ".join(str(n) for n in numbers[:5])
    if len(numbers) == 1:
        return f"{unit} {some}"
    return f"{unit}s {some}" + (f" … ({len(numbers)} of them)" if len(numbers) > 5 else "")


def _shortened(problems: Sequence[str]) -> list[str]:
    left = len(problems) - MOST_SAID
    return [*problems[:MOST_SAID], *([f"… and {left} more lines."] if left > 0 else [])]


def chunks(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Runs of `size`, the last one what is left."""
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])
