"""The folders of a run's checkpoints: `checkpoints/step-N`, and `latest`, which names the newest.

What ends in .partial is being written, in .deleted being deleted; .replaced is the old one of a
step that is saved again, which counts until the new one is there; .damaged was set aside.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from moe.checkpoint.disk import delete, replace_file
from moe.checkpoint.manifest import DELETED, PARTIAL, STEP, is_complete
from moe.errors import UserError
from moe.upcycle.source import sync

FOLDER = "checkpoints"
LATEST = "latest"
REPLACED, DAMAGED = ".replaced", ".damaged"
_LEFTOVER = re.compile(rf"step-\d+.*({re.escape(PARTIAL)}|{re.escape(DELETED)})")


def steps(out: Path) -> list[tuple[int, Path]]:
    """Published checkpoints of a run, oldest first."""
    return [(step, path) for step, path in numbered(out) if is_complete(path)]


def numbered(out: Path) -> list[tuple[int, Path]]:
    """The folders that should be checkpoints, oldest first: of one that has lost its manifest too.

    Of a step that was being saved again, one of both.
    """
    found: dict[int, Path] = {}
    place = out / FOLDER
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        what = "a symbolic link, and what it leads to could be another's" if (
            place.is_symlink()) else "not a folder"  # fmt: skip
        raise UserError(
            f"{place} is {what}: nothing is read, written or deleted there. Move it away; to keep "
            "checkpoints on another disk, put out there (out itself may be a link)."
        )
    for path in place.glob("step-*"):
        match = STEP.fullmatch(path.name)
        if match and path.is_dir():
            step = int(match[1])
            rivals = [path, found[step]] if step in found else [path]
            found[step] = max(rivals, key=lambda p: (is_complete(p), not p.suffix))
    return sorted(found.items())


def latest(out: Path) -> Path | None:
    """The newest published checkpoint of a run."""
    found = steps(out)
    return found[-1][1] if found else None


def stale(out: Path) -> str | None:
    """What is wrong with the file `latest`, if anything: it names no checkpoint of the run."""
    path, newest = out / FOLDER / LATEST, latest(out)
    if path.is_symlink() or not path.is_file() or newest is None:
        return None if newest is None or not path.is_symlink() else f"{path}: a symbolic link."
    try:
        named = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    if named not in {folder.name for _, folder in steps(out)}:
        return f"{path}: names {named!r:.60}, which is no checkpoint; the newest is {newest.name}."
    return None


def step_folder(out: Path, step: int) -> Path:
    return out / FOLDER / f"step-{step}"


def publish(partial: Path, target: Path, damaged: Iterable[Path] = ()) -> None:
    """Give a complete folder its name; it is there for good when this returns.

    `damaged` folders are set aside first. There is no moment without a complete checkpoint: an
    earlier one of the same step goes by its name with .replaced until the new one has its own.
    """
    for folder in damaged:
        if folder.exists():
            os.rename(folder, _free(folder.with_name(folder.name.removesuffix(REPLACED) + DAMAGED)))
    if target.exists():
        old = target.with_name(target.name + REPLACED)
        if is_complete(target):
            discard(old)  # of a killed run, and older
            os.rename(target, old)
        else:
            discard(target)
    os.rename(partial, target)
    sync(target.parent)


def point_to(target: Path) -> None:
    """Let `latest` name a checkpoint. No run goes by it: it is for people and scripts."""
    replace_file(target.parent / LATEST, target.name + "\n")
    sync(target.parent)


def retain(out: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and those of every `keep_every` steps, and what
    killed runs have left.
    """
    found = steps(out)
    kept = {path for _, path in found[-keep:]}
    kept |= {path for step, path in found if keep_every and step % keep_every == 0}
    lost = {path for _, path in numbered(out) if not is_complete(path)}  # somebody else's doing
    clean(out, lambda p: p not in kept | lost and bool(STEP.fullmatch(p.name)))


def clean(out: Path, unwanted: Callable[[Path], bool] = lambda path: False) -> None:
    """Delete what killed runs have left of checkpoints, and the `unwanted` ones."""
    for path in sorted((out / FOLDER).glob("step-*")):
        ours = _LEFTOVER.fullmatch(path.name) or unwanted(path)
        if ours and path.is_dir() and not path.is_symlink():
            discard(path)


def discard(folder: Path) -> None:
    """Delete a folder of this run that is none of its checkpoints any more."""
    if folder.exists():
        delete(folder, folder if folder.name.endswith(DELETED) else _deleted(folder))


def _deleted(folder: Path) -> Path:
    return folder.with_name(folder.name + DELETED)


def _free(path: Path) -> Path:
    """That name, or the first with a number that is not taken."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
