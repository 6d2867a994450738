"""Reads so many wrong inputs in a process of its own, and says which of them did harm.

    python fuzz.py TARGET,… COUNT SEED FOLDER      # JSON: what was found, by target

Harm is: an exception that is not one of our own, a file opened for writing or moved outside of the
folder or at all, a program started, a name that a pickle asks for, more than SECONDS, or memory
beyond ROOM more than the process had when it began.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOM = 1536 * 2**20
SECONDS = 10
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
MOVES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
         "os.chmod", "shutil.rmtree", "shutil.copyfile", "shutil.move")  # fmt: skip


class TooLong(BaseException):
    """An input that keeps its reader busy."""


class Watch:
    """An audit hook that notes what a reader has no business doing."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & WRITING
            if writes and str(path) not in ("/dev/null", "/dev/shm"):
                self.seen.append(f"open {path!r} {mode}")
        elif event in STARTS or event in MOVES:
            self.seen.append(f"{event} {arguments!r:.200}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Address space as it is now and ROOM; a long read is interrupted."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))

    def late(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


def harm(target: Any, place: Path, data: bytes, watch: Watch) -> str | None:
    """What reading one input did that it must not; None where it read or refused it."""
    from moe.errors import MoeError

    path = target.put(place, data)
    watch.seen, watch.on = [], True
    signal.alarm(SECONDS)
    try:
        target.read(path)
    except MoeError as error:
        if not str(error).strip():
            return "an error without a word"
    except OSError as error:
        if error.filename is None:
            return traceback.format_exc()[-1500:]
    except TooLong:
        return f"longer than {SECONDS} s"
    except BaseException:
        return traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)
        watch.on = False
    return f"it did {watch.seen[:3]}" if watch.seen else None


def fuzz(target: Any, name: str, count: int, seed: int, folder: Path, watch: Watch) -> Any:
    """So many inputs to one reader, in a folder of its own."""
    place = folder / "in"
    place.mkdir(parents=True)
    target.prepare(place)
    found = []
    for index in range(count):
        data = target.draw(random.Random(f"{name} {seed} {index}"))
        if said := harm(target, place, data, watch):
            found.append({"index": index, "said": said, "data": repr(data[:300])})
    return {"harm": found, "outside": sorted(p.name for p in folder.iterdir() if p.name != "in")}


def main(names: str, count: int, seed: int, folder: Path, module: str = "targets") -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like, some of them past sys.stdout
    known = importlib.import_module(module).TARGETS
    watch = Watch()
    with limited():
        found = {
            name: fuzz(known[name], name, count, seed, folder / name, watch)
            for name in names.split(",")
        }
    answer.write(json.dumps(found))
    answer.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
