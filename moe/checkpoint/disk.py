"""Files that are on the disk when the call returns, or an OSError says why not."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moe.upcycle.source import sync

CHUNK_BYTES = 16 * 2**20


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """A new file of these parts, forced to disk. Raises FileExistsError where there is one, and no
    OSError without the file's name.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(descriptor, view[:CHUNK_BYTES]) :]
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """The old text or the new one, whenever somebody looks; the folder is to be synced after. What
    was there is replaced, not written into: a link leads nowhere.
    """
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # of a run that was killed
    try:
        write_file(new, [text.encode()])
        os.replace(new, path)
    except OSError as error:
        error.filename = str(path)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def sync_tree(folder: Path) -> None:
    """Force a folder and what lies in it to disk, folders last."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            sync_tree(path)
        elif not path.is_symlink():
            sync(path)
    sync(folder)


def delete(folder: Path, aside: Path) -> None:
    """Delete a folder that has been moved `aside` first, where nobody takes it for what it was.

    What cannot be deleted stays there for the next time.
    """
    if folder != aside:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
