"""`moe tune chat`: a prompt without a tuning and with it, and a dial between.

talk(Session(subject, Sampling(max_new_tokens=64), chat=False))
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe.errors import MoeError, UserError
from moe.tune.families import PARTS, Part
from moe.tune.generation import Sampling
from moe.tune.legality import SEMANTICS, Semantics
from moe.tune.subject import Subject, answer, describe
from moe.tune.tuning import Edit, Tuning, shape_of

HELP = """A line that does not begin with / is a prompt: its response without and with the tuning.
/scale S                            turn the dial, 0 to 1
/semantics NAME                     post_zero, post_renorm, pre_topk or pre_select
/off LAYER EXPERT [attention]       switch an expert off (of the MLP, or a part of the attention)
/force LAYER EXPERT [attention]     choose it always (pre_topk, pre_select)
/gain G LAYER EXPERT [attention]    multiply its weight (post_zero, post_renorm)
/bias B LAYER EXPERT [attention]    add to what it is chosen by (pre_topk, pre_select)
/undo                               take the last change back
/show                               the tuning, expert by expert
/again                              the last prompt once more
/save FILE                          write the tuning
/help, /quit"""


@dataclass(frozen=True)
class State:
    """What can be changed and taken back."""

    semantics: Semantics
    edits: tuple[Edit, ...]
    scale: float


@dataclass
class Session:
    """A model, the tuning as it now is, and how it came to be so."""

    subject: Subject
    sampling: Sampling
    chat: bool
    earlier: list[State] = field(default_factory=list)
    prompt: str | None = None

    def __post_init__(self) -> None:
        given = self.subject.tuning
        self.given = given
        self.state = State("post_zero", (), self.subject.scale)
        if given is not None:
            self.state = replace(self.state, semantics=given.semantics, edits=tuple(given.experts))

    @property
    def tuning(self) -> Tuning | None:
        """None where no expert is touched."""
        if not self.state.edits:
            return None
        method = self.given.method if self.given else {}
        if self.given is None or list(self.state.edits) != self.given.experts:
            kept: dict[str, Any] = {key: method[key] for key in ("target", "ids") if key in method}
            method = {"by": "hand", **kept, **({"from": method} if method else {})}
        return Tuning(
            semantics=self.state.semantics,
            experts=list(self.state.edits),
            scale=self.state.scale,
            model=dict(self.subject.identity),
            shape=shape_of(self.subject.sites),
            method=method,
            created_from=self.given.created_from if self.given else None,
        )

    def say(self, line: str) -> Iterator[str]:
        """What a line of input is answered with. Raises MoeError; the session then is as before."""
        if not line.startswith("/"):
            yield from self.respond(line)
            return
        name, *words = line[1:].split() or [""]
        if name not in COMMANDS:
            raise UserError(f"/{name} is not a command here. /help lists them.")
        yield from COMMANDS[name](self, words)

    def respond(self, prompt: str) -> Iterator[str]:
        """The response of the model as it is, then with the tuning."""
        self.prompt = prompt
        plain = self._answer(prompt, None)
        yield f"--- without\n{plain}"
        tuning = self.tuning
        if tuning is not None:
            tuned = self._answer(prompt, tuning)
            same = "\n(the same)" if tuned == plain else f"\n{tuned}"
            yield f"--- with {describe(tuning, tuning.scale)}{same}"

    def change(self, state: State) -> str:
        """Take a state over where it fits the model."""
        before, self.state = self.state, state
        try:
            if (tuning := self.tuning) is not None:
                tuning.check(self.subject.sites)
        except UserError:
            self.state = before
            raise
        self.earlier.append(before)
        tuning = self.tuning
        odd = [] if tuning is None else tuning.cautions(self.subject.sites)
        return "\n".join([describe(tuning, self.state.scale), *(f"note: {text}" for text in odd)])

    def _answer(self, prompt: str, tuning: Tuning | None) -> str:
        subject = replace(self.subject, tuning=tuning, scale=self.state.scale)
        return answer(subject, [prompt], self.sampling, self.chat)[0]


def _scale(session: Session, words: list[str]) -> Iterator[str]:
    scale = _number(words, 0, "/scale S", alone=True)
    if not 0 <= scale <= 1:
        raise UserError(f"/scale {words[0]}: must be between 0 and 1.")
    yield session.change(replace(session.state, scale=scale))


def _semantics(session: Session, words: list[str]) -> Iterator[str]:
    found = [name for name in SEMANTICS if words == [name]]
    if not found:
        raise UserError(f"/semantics takes one of {', '.join(SEMANTICS)}.")
    yield session.change(replace(session.state, semantics=found[0]))


def _edit(action: str) -> Callable[[Session, list[str]], Iterator[str]]:
    """The command of one kind of edit, with an amount or without."""

    def command(session: Session, words: list[str]) -> Iterator[str]:
        usage = f"/{action} LAYER EXPERT [attention]"
        what = action
        if action in ("gain", "bias"):
            usage = f"/{action} NUMBER LAYER EXPERT [attention]"
            what, words = f"{action}:{_number(words, 0, usage):g}", words[1:]
        layer, expert = (_whole(words, i, usage) for i in (0, 1))
        part: Part = "mlp"
        if len(words) > 2:
            parts = [name for name in PARTS if words[2:] == [name]]
            if not parts:
                raise UserError(f"{usage}: what is {' '.join(words[2:])!r}?")
            part = parts[0]
        edit = Edit(layer=layer, expert=expert, part=part, action=what)
        place = (edit.layer, edit.part, edit.expert)
        others = [e for e in session.state.edits if (e.layer, e.part, e.expert) != place]
        yield session.change(replace(session.state, edits=(*others, edit)))

    return command


def _undo(session: Session, words: list[str]) -> Iterator[str]:
    if not session.earlier:
        raise UserError("there is nothing to take back.")
    session.state = session.earlier.pop()
    yield describe(session.tuning, session.state.scale)


def _show(session: Session, words: list[str]) -> Iterator[str]:
    yield "\n".join([describe(session.tuning, session.state.scale), *map(str, session.state.edits)])


def _again(session: Session, words: list[str]) -> Iterator[str]:
    if session.prompt is None:
        raise UserError("there was no prompt yet.")
    yield from session.respond(session.prompt)


def _save(session: Session, words: list[str]) -> Iterator[str]:
    if not words:
        raise UserError("/save FILE")
    path, tuning = Path(" ".join(words)), session.tuning
    if tuning is None:
        raise UserError("there is no tuning to save: no expert is touched.")
    if path.exists():
        raise UserError(f"{path} exists. Choose another name.")
    tuning.write(path)
    yield f"{describe(tuning, tuning.scale)}: {path}"


def _help(session: Session, words: list[str]) -> Iterator[str]:
    yield HELP


COMMANDS: dict[str, Callable[[Session, list[str]], Iterator[str]]] = {
    "scale": _scale,
    "semantics": _semantics,
    "off": _edit("off"),
    "force": _edit("force"),
    "gain": _edit("gain"),
    "bias": _edit("bias"),
    "undo": _undo,
    "show": _show,
    "again": _again,
    "save": _save,
    "help": _help,
}


def talk(session: Session) -> None:
    """Answer lines of standard input until /quit or its end; an error is one more answer."""
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not text is one more error
    if terminal:
        print(f"{describe(session.tuning, session.state.scale)}. /help lists commands.")
    for line in _lines(terminal):
        if line == "/quit":
            return
        try:
            for text in session.say(line):
                print(text, flush=True)
        except MoeError as error:
            print(f"error: {error}", flush=True)
        except OSError as error:
            print(f"error: {error.filename}: {error.strerror}", flush=True)
        except KeyboardInterrupt:  # one response too long is no reason to lose the session
            print("interrupted", flush=True)


def _lines(terminal: bool) -> Iterator[str]:
    """Lines that are not empty."""
    if terminal:
        import readline  # noqa: F401  (arrows and history in input)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _number(words: list[str], place: int, usage: str, alone: bool = False) -> float:
    try:
        value = float(words[place])
    except (IndexError, ValueError) as error:
        raise UserError(f"usage: {usage}") from error
    if not abs(value) < 1e4 or (alone and len(words) > 1):
        raise UserError(f"usage: {usage}, a number below 10 000.")
    return value


def _whole(words: list[str], place: int, usage: str) -> int:
    try:
        value = int(words[place])
    except (IndexError, ValueError) as error:
        raise UserError(f"usage: {usage}") from error
    if value < 0:
        raise UserError(f"{usage}: {value} is not a number from 0 on.")
    return value
