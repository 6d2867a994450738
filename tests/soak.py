"""A run on two ranks that is killed, signalled and denied its disk at random, again and again.

    python tests/soak.py --minutes 30 --seed 0 --out bench/results

Each journey is the same run, started again until it has reached its last step, and ends with the
tensors and the metrics of one that nobody disturbed. Full disks are limits that the kernel sets on
the size of what a rank may write. The log names every blow: the same seed deals the same ones.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import toy_run
from moments import Ranks

from moe.checkpoint import store
from moe.train.preempt import MARKER

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import report

STEPS = 120
OPTIONS = (f"train.steps={STEPS}", "checkpoint.every=4", "eval.every=10", "eval.sequences=16",
           "parallel.timeout=20", "train.micro_batch_size=4")  # fmt: skip
LONGEST = 8.0  # seconds from a start to the blow: some come before it trains, some after a while
KILLED = {-signal.SIGKILL}
SAVED = {85, -signal.SIGTERM, -signal.SIGUSR1}  # the latter where it was too early to be heard
ANY = KILLED | SAVED | {0, 1, 2}


class Soak:
    """Journeys of one configuration, and what became of them."""

    def __init__(self, folder: Path, seed: int, log: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.log, self.draw = folder, log, random.Random(seed)
        self.toys = toy_run.make(folder / "toys")
        self.blows: collections.Counter[str] = collections.Counter()
        self.codes: collections.Counter[int] = collections.Counter()
        self.starts = 0
        self.wrong: list[str] = []
        self.expected = self.journey("undisturbed", lambda: False)

    def start(self, out: Path) -> Ranks:
        self.starts += 1
        overrides = (*OPTIONS, self.toys.validation)
        place = self.folder / f"ranks {self.starts}"
        return Ranks(self.toys.write(out), place, *overrides)

    def journey(self, name: str, disturbed: Callable[[], bool]) -> Any:
        """Run to the last step, however often it takes; what it ended with."""
        out = self.folder / name
        while not finished(out):
            blow = self.draw.choice(list(BLOWS)) if disturbed() else "none"
            self.cycle(out, blow)
        tensors = toy_run.checkpoint(out, STEPS)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("tokens_per_second", None)
        return tensors, lines

    def cycle(self, out: Path, blow: str) -> None:
        """Start, strike once, and look at what is left."""
        before = newest(out)
        with self.start(out) as ranks:
            if blow != "none":
                time.sleep(self.draw.uniform(0.0, LONGEST))
                BLOWS[blow](self, ranks)
            ends = ranks.finish(timeout=120.0)
        self.blows[blow] += 1
        codes = [code for code, _, _ in ends]
        self.codes.update(codes)
        after = newest(out)
        self.log({"start": self.starts, "blow": blow, "codes": codes, "step": after})
        if not set(codes) <= (ANY if blow != "none" else {0}) or surprised(ends):
            self.wrong.append(f"start {self.starts}, {blow}: {ends}")
        if after < before:
            self.wrong.append(f"start {self.starts}, {blow}: step {before} is lost")
        if after and (damage := store.check(store.latest(out))):
            self.wrong.append(f"start {self.starts}, {blow}: {damage}")
        if codes == [85, 85]:
            marked = json.loads((out / MARKER).read_text())["step"]
            if marked != after:
                self.wrong.append(f"start {self.starts}: marked {marked}, saved {after}")

    def compare(self, name: str, found: Any) -> None:
        if toy_run.differing(found[0], self.expected[0]) or found[1] != self.expected[1]:
            self.wrong.append(f"{name} did not end as the undisturbed run")


def surprised(ends: list[tuple[int, str, str]]) -> bool:
    """Whether a rank ended in a traceback of ours: TensorBoard's thread prints its own."""
    return any(said.count("Traceback") > said.count("Exception in thread") for _, _, said in ends)


def newest(out: Path) -> int:
    return max((step for step, _ in store.steps(out)), default=0)


def finished(out: Path) -> bool:
    """Whether nothing is left to do: the last step is saved, and its validation reported."""
    path = out / "metrics.jsonl"
    if newest(out) < STEPS or not path.exists():
        return False
    return any(
        line.get("step") == STEPS and "validation_loss" in line
        for line in map(json.loads, path.read_text().splitlines())
    )


def some(soak: Soak) -> list[int]:
    """One of the ranks, or both."""
    return soak.draw.choice([[0], [1], [0, 1]])


def kill(soak: Soak, ranks: Ranks) -> None:
    ranks.signal(some(soak), signal.SIGKILL)


def terminate(soak: Soak, ranks: Ranks) -> None:
    ranks.signal(some(soak), signal.SIGTERM)


def notify(soak: Soak, ranks: Ranks) -> None:
    ranks.signal(some(soak), signal.SIGUSR1)


def insist(soak: Soak, ranks: Ranks) -> None:
    """Signals upon signals, and in the end no more patience."""
    for _ in range(soak.draw.randint(2, 6)):
        ranks.signal(some(soak), soak.draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        time.sleep(soak.draw.uniform(0.0, 0.2))
    if soak.draw.random() < 0.5:
        ranks.signal([0, 1], signal.SIGKILL)


def fill(soak: Soak, ranks: Ranks) -> None:
    """Files end early for a while; then the disk is free again, and the run is signalled."""
    struck = [ranks.processes[r].pid for r in some(soak)]
    limit = soak.draw.randint(200_000, 700_000)
    for pid, size in [
        *((p, limit) for p in struck),
        *((p, resource.RLIM_INFINITY) for p in struck),
    ]:
        if size != limit:
            time.sleep(soak.draw.uniform(0.2, 3.0) / len(struck))
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    ranks.signal([0, 1], signal.SIGTERM)


BLOWS: dict[str, Callable[[Soak, Ranks], None]] = {
    "SIGKILL": kill, "SIGTERM": terminate, "SIGUSR1": notify, "many signals": insist,
    "full disk": fill,
}  # fmt: skip


def soak(minutes: float, seed: int, log_path: Path | None = None) -> Soak:
    """Strike for so many minutes, then let the last journey end."""
    lines: list[str] = []

    def log(line: dict[str, Any]) -> None:
        lines.append(json.dumps(line))
        if log_path:
            log_path.write_text("\n".join(lines) + "\n")

    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        found = Soak(Path(folder), seed, log)
        end, journeys = time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end:
            journeys += 1
            name = f"journey {journeys}"
            found.compare(name, found.journey(name, lambda: time.monotonic() < end))
            print(f"{name}: {found.starts} starts so far, {len(found.wrong)} wrong", flush=True)
        found.log({"journeys": journeys, "wrong": found.wrong})
        found.journeys = journeys  # type: ignore[attr-defined]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="a line of JSON per start")
    parser.add_argument("--out", type=Path, help="folder for soak.json and .md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = soak(options.minutes, options.seed, options.log)
    rows = [{"blow": blow, "times": count} for blow, count in sorted(found.blows.items())]
    codes = ", ".join(f"{code} × {count}" for code, count in sorted(found.codes.items()))
    note = (
        f"{options.minutes:g} minutes, seed {options.seed}: {found.journeys} runs of {STEPS} steps "
        f"on two ranks, {found.starts} starts, each struck once at a random moment of its first "
        f"{LONGEST:g} s. Exit codes of ranks: {codes}. After every blow the newest checkpoint is "
        "checked, byte by byte; at its end every run is compared with an undisturbed one: every "
        "tensor and every line of metrics, to the last bit."
    )
    wrong = report.Goal("starts and runs with anything wrong", float(len(found.wrong)), "≤", 0)
    report.publish("soak", "Soak", rows, [wrong], [note, *found.wrong[:5]], options.out)
    sys.exit(0 if wrong.met else 1)


if __name__ == "__main__":
    main()
