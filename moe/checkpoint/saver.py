"""Saving while training goes on: the step makes a copy, a thread writes it.

    saver = Saver(out, rank, gather, keep=3)
    saver.save(100, engine.state(), progress, side_files)    # on every rank
    if ranks.sum(saver.trouble): saver.learn()               # in each step
    saver.finish()                                           # before the run ends

Threads use no collectives. Each rank writes its file into one folder, then `rank-N.json`, which
says what is in it; rank 0's thread waits for all of these and publishes.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe.checkpoint import folders, pieces
from moe.checkpoint.damage import Gather
from moe.checkpoint.disk import sync_tree, write_file
from moe.checkpoint.manifest import PARTIAL, FileRecord, Manifest, Piece, TensorRecord
from moe.checkpoint.pieces import Entry, Snapshot
from moe.checkpoint.progress import Progress
from moe.errors import UserError
from moe.upcycle.source import hash_file, sync

GRACE = 10.0  # seconds for a save to end when the run is ending on an error
LOOK = 0.02  # seconds between looks for other ranks' files, growing to LOOK_MOST
LOOK_MOST = 1.0


class Abandoned(Exception):
    """Somebody else has failed: this rank's part is not needed any more."""


@dataclass(slots=True)
class Job:
    """One save of one rank, in its thread."""

    step: int
    partial: Path
    snapshot: Snapshot
    progress: Progress
    side_files: Callable[[Path], None]
    failure: Exception | None = None
    written: threading.Event = field(default_factory=threading.Event)  # this rank's part, or not
    published: threading.Event = field(default_factory=threading.Event)  # by rank 0, or not
    settled: threading.Event = field(default_factory=threading.Event)  # all know that it failed

    def proceed(self) -> None:
        if self.settled.is_set():
            raise Abandoned


class Saver:
    """Saves the checkpoints of a run, one at a time. All but `trouble` and `close` are called by
    every rank at the same point.

    A save that fails leaves the checkpoints before it as they are, and the run can go on: it is
    said once, and only `finish` raises.
    """

    def __init__(
        self,
        out: Path,
        rank: int,
        gather: Gather,
        *,
        keep: int = 1,
        keep_every: int | None = None,
        asynchronous: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        self.out, self.rank, self.gather = out, rank, gather
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous, self.timeout = asynchronous, timeout
        self.damaged: list[Path] = []  # to be set aside before the next one is published
        self._buffers: pieces.Buffers = {}
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._last: int | None = None  # the step that was saved last, unless that failed
        self._failed = ""
        self._ranks = self._count = 0
        self._token = ""

    def save(
        self,
        step: int,
        entries: Iterable[Entry],
        progress: Progress,
        side_files: Callable[[Path], None],
    ) -> None:
        """Start to write `out/checkpoints/step-N`, complete or not at all.

        `progress` of rank 0 is what the run resumes from; `side_files` puts config and tokenizer
        into the folder. The state may change as soon as this returns. Nothing is done where this
        very step was saved last.
        """
        self.wait()
        if step == self._last:
            return
        if not self._token:
            tokens = self.gather(secrets.token_hex(4))  # so that no leftover is taken for ours
            self._token, self._ranks = tokens[0], len(tokens)
        if self._thread is not None:
            self._thread.join()  # of a failed save, which may still use the buffers
        self._count += 1
        snapshot = pieces.take(entries, self.rank, self._buffers)
        target = folders.step_folder(self.out, step)
        partial = target.with_name(f"{target.name}.{self._token}-{self._count}{PARTIAL}")
        self._job = Job(step, partial, snapshot, progress, side_files)
        self._last, self._failed = step, ""
        self._thread = threading.Thread(
            target=self._run, args=(self._job,), name=f"save {step}", daemon=True
        )
        self._thread.start()
        if not self.asynchronous:
            self.wait()
            self._buffers.clear()

    @property
    def trouble(self) -> float:
        """1.0 where this rank's part of the save under way has failed, and nobody knows yet."""
        return float(self._job is not None and self._job.failure is not None)

    def learn(self) -> None:
        """Some rank has had trouble: tell all of them, once, and give that save up."""
        job = self._job
        if job is not None:
            self._settle(job, self.gather(_reason(job)))

    def wait(self) -> None:
        """Until the save under way, if any, is published or has failed."""
        job = self._job
        if job is None:
            return
        job.written.wait()
        reasons = self.gather(_reason(job))
        if not any(reasons):
            job.published.wait()  # on rank 0; others have nothing to wait for
            reasons = self.gather(_reason(job))
        if any(reasons):
            self._settle(job, reasons)
        self._job = None
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """`wait`, and raise UserError where the last save has failed."""
        self.wait()
        if self._failed:
            raise UserError(f"{self._failed} Start the run again once that is mended.")

    def close(self) -> None:
        """End without the others, who may be gone: a save that is nearly there gets some time."""
        if self._thread is not None:
            self._thread.join(min(GRACE, self.timeout))
            if self._job is not None:
                self._job.settled.set()

    def _settle(self, job: Job, reasons: list[str]) -> None:
        job.settled.set()
        self._job = self._last = None
        if job.failure is not None and not isinstance(job.failure, OSError | Abandoned):
            raise job.failure  # a mistake of ours
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text)
        on = f" on rank {rank}" if len(reasons) > 1 else ""
        target = folders.step_folder(self.out, job.step)
        self._failed = f"{target} cannot be written{on}: {reason}."
        if self.rank == 0:
            newest = folders.latest(self.out)
            print(
                f"{self._failed} Training goes on; the newest checkpoint is "
                f"{newest.name if newest else 'none'}.",
                flush=True,
            )

    def _run(self, job: Job) -> None:
        try:
            job.snapshot.wait()
            self._write_part(job)
            job.written.set()
            if self.rank == 0:
                self._publish(job)
        except Exception as error:
            job.failure = error
            job.written.set()
            job.published.set()
            if self.rank == 0:
                job.settled.wait(self.timeout)  # others are to learn it before the folder goes
                with contextlib.suppress(OSError):  # the next save, or start, tries again
                    folders.discard(job.partial)
        finally:
            job.published.set()

    def _write_part(self, job: Job) -> None:
        job.partial.mkdir(parents=True, exist_ok=True)
        path = job.partial / pieces.file_name(self.rank)
        records, entry = pieces.write(path, job.snapshot, job.proceed)
        described = {"file": asdict(entry), "tensors": {k: asdict(r) for k, r in records.items()}}
        part = _part(job.partial, self.rank)
        new = part.with_suffix(".new")
        write_file(new, [json.dumps(described).encode()])
        os.rename(new, part)

    def _publish(self, job: Job) -> None:
        records, files = [], {}
        for rank in range(self._ranks):
            described = self._await(job, rank)
            records.append({k: _record(r) for k, r in described["tensors"].items()})
            files[pieces.file_name(rank)] = FileRecord(**described["file"])
        for rank in range(self._ranks):
            os.unlink(_part(job.partial, rank))
        job.side_files(job.partial)
        for path in sorted(p for p in job.partial.rglob("*") if p.is_file()):
            name = path.relative_to(job.partial).as_posix()
            if name not in files:
                size = path.stat().st_size
                files[name] = FileRecord(size, size, hash_file(path))
        merged = pieces.merge(records)
        Manifest(tensors=merged, files=files, progress=job.progress).write(job.partial)
        sync_tree(job.partial)
        job.proceed()
        target = folders.step_folder(self.out, job.step)
        if not folders.numbered(self.out):
            sync(self.out)  # the folder of checkpoints may be new
        folders.publish(job.partial, target, self.damaged)
        self.damaged = []
        try:
            folders.point_to(target)
        except OSError as error:  # the checkpoint is there all the same
            print(
                f"{target} is saved, but {folders.LATEST} beside it cannot be written: "
                f"{error.strerror or error}. A run goes on from the newest checkpoint, whatever it "
                "names.",
                flush=True,
            )
        folders.retain(self.out, self.keep, self.keep_every)

    def _await(self, job: Job, rank: int) -> dict[str, Any]:
        """What a rank says of its file, as soon as it is there."""
        path, end, pause = _part(job.partial, rank), time.monotonic() + self.timeout, LOOK
        while not path.exists():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"rank {rank} has not written its part within {self.timeout:g} s "
                    "(parallel.timeout)"
                )
            job.proceed()
            job.settled.wait(pause)
            pause = min(pause * 1.5, LOOK_MOST)
        return json.loads(path.read_bytes())


def save(
    out: Path,
    step: int,
    entries: Iterable[Entry],
    progress: Progress,
    rank: int,
    gather: Gather,
    side_files: Callable[[Path], None],
) -> Path:
    """Write one checkpoint and keep all others; it is there when this returns."""
    saver = Saver(out, rank, gather, keep=len(folders.steps(out)) + 1, asynchronous=False)
    saver.save(step, entries, progress, side_files)
    saver.finish()
    return folders.step_folder(out, step)


def _part(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank}.json"


def _reason(job: Job) -> str:
    error = job.failure
    if error is None or isinstance(error, Abandoned):
        return ""
    if isinstance(error, OSError) and error.strerror:
        name = Path(error.filename).name if isinstance(error.filename, str) else ""
        return error.strerror + (f" ({name})" if name else "")
    return " ".join(str(error).split()) or type(error).__name__


def _record(values: dict[str, Any]) -> TensorRecord:
    found = tuple(
        Piece(p["file"], tuple(p["offset"]), tuple(p["shape"]), p["start"], p["xxh3"])
        for p in values["pieces"]
    )
    return TensorRecord(values["kind"], values["dtype"], tuple(values["shape"]), found)
