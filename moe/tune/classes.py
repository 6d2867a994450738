"""The prompts of a trace as two classes: which rows belong to each, and which are held out.

    rows, is_target, notes = classes(trace, "REFUSED", None)
    held = split(groups, is_target, 0.3, seed)

P prompts. Rows that repeat a prompt stay on one side.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from moe.errors import UserError, raise_all
from moe.tune.trace import Trace

HELD_OUT = 0.3
ENOUGH = 10  # prompts of a class, for some of them to be held out unasked


def classes(trace: Trace, target: str, vs: str | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows that count [P], which of them are the target's bool [P], and notes."""
    if not trace.rows:
        raise UserError("the trace has 0 prompts: there is nothing to rank by. Record some.")
    labels = trace.labels
    found = Counter(label for label in labels if label is not None)
    if not found:
        raise UserError(
            f"none of the {len(labels)} prompts in the trace has a label. Record them again with "
            "--labels, or with a field `label` in the prompts' file."
        )
    raise_all(
        [
            _unknown(option, label, found)
            for option, label in (("target", target), ("vs", vs))
            if label is not None and label not in found
        ]
    )
    if vs == target:
        raise UserError(f"vs={vs!r} is the target itself. Name another label, or leave it out.")
    if len(found) == 1:
        raise UserError(
            f"every labelled prompt is {target!r}: one class has nothing to be compared with."
        )
    counts = [label is not None and (vs is None or label in (target, vs)) for label in labels]
    empty = [n for n, used in enumerate(counts) if used and not trace.tokens[n]]
    rows = np.array([n for n, used in enumerate(counts) if used and trace.tokens[n]], np.int64)
    notes = []
    if unlabelled := labels.count(None):
        notes.append(f"{unlabelled:,} of {len(labels):,} prompts have no label and are left out.")
    if empty:
        some = ", ".join(str(n + 1) for n in empty[:5]) + (", …" if len(empty) > 5 else "")
        notes.append(
            f"{len(empty):,} prompts had 0 tokens watched and are left out (rows {some} of "
            "the trace)."
        )
    return rows, np.array([labels[n] == target for n in rows], bool), notes


def _unknown(option: str, label: str, found: Counter[str]) -> str:
    close = difflib.get_close_matches(label, found, n=3, cutoff=0.5)
    known = close or [name for name, _ in found.most_common(10)]
    return (
        f"{option}={label!r} is not a label of the trace. "
        f"{'The closest are' if close else 'It has'} "
        f"{', '.join(f'{name!r} ({found[name]} prompts)' for name in known)}."
    )


def identities(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each row's prompt; rows with the same id or the same prompt share one."""
    names: list[str] = []
    known: dict[tuple[str, str], str] = {}
    for number, row in enumerate(rows):
        keys = [(key, str(row[key])) for key in ("id", "prompt") if row.get(key) is not None]
        same = {known[key] for key in keys if key in known}
        name = min(same) if same else _name(row, number)
        if len(same) > 1:  # this row has the id of one and the prompt of another
            names = [name if other in same else other for other in names]
            known = {key: name if other in same else other for key, other in known.items()}
        names.append(name)
        known |= dict.fromkeys(keys, name)
    return names


def _name(row: dict[str, Any], number: int) -> str:
    if row.get("id") is not None:
        return str(row["id"])
    # rows without either are prompts of their own
    text = str(row["prompt"]) if row.get("prompt") is not None else f"\0{number}"
    return xxhash.xxh3_128(text.encode()).hexdigest()


def hold_out(
    groups: np.ndarray, target: np.ndarray, share: float | None, names: tuple[str, str], seed: int
) -> tuple[float, np.ndarray, list[str]]:
    """The share, what is held out bool [P], and notes. Raises UserError for a class too small."""
    sizes = [len(set(groups[which])) for which in (target, ~target)]
    raise_all(
        [
            f"class {name!r} has {size} different prompts with tokens watched: an interval takes 2."
            for name, size in zip(names, sizes, strict=True)
            if size < 2
        ]
    )
    notes = []
    if share is None:
        share = HELD_OUT if min(sizes) >= ENOUGH else 0.0
        if not share:
            notes.append(
                f"class {names[int(np.argmin(sizes))]!r} has {min(sizes)} different prompts, fewer "
                f"than {ENOUGH}: nothing is held out, so the scores of the chosen are flattered by "
                "the choice."
            )
    elif not share:
        notes.append("nothing is held out: the scores of the chosen are flattered by the choice.")
    held = split(groups, target, share, seed)
    problems = []
    for name, which in zip(names, (target, ~target), strict=True):
        left, out = len(set(groups[which & ~held])), len(set(groups[which & held]))
        if left < 2 or (share > 0 and out < 1):
            problems.append(
                f"held_out={share}: class {name!r} has {left + out} different prompts, so {out} "
                f"would be held out and {left} left to rank by; it takes 1 and 2."
            )
    raise_all(problems)
    return share, held, notes


def split(groups: np.ndarray, target: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which prompts are held out, bool [P]: groups whole, and of each class the same share."""
    rng = np.random.default_rng([seed, 0])
    kinds: dict[str, int] = {}  # 1 of the target, 2 of the rest, 3 of both
    for group, of_target in zip(groups, target, strict=True):
        kinds[group] = kinds.get(group, 0) | (1 if of_target else 2)
    held: set[str] = set()
    for kind in (1, 2, 3):
        members = sorted(group for group, its in kinds.items() if its == kind)
        held.update(rng.permutation(members)[: round(share * len(members))].tolist())
    return np.array([group in held for group in groups], bool)


def repeats(groups: np.ndarray) -> list[str]:
    repeated = len(groups) - len(set(groups))
    if not repeated:
        return []
    return [
        f"{repeated:,} prompts repeat another: they are held out, drawn and relabelled together."
    ]
