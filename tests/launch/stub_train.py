"""Stands for `moe.train` where launchers are tested: no torch, a step takes 50 ms.

It keeps the contract of a run: a signal, its own or its launcher's, ends it after its step with a
saved state, rank 0's marker `OUT/preempted` and exit code 85; started again it removes the marker
and goes on. Every signal and every step is written down. STUB_FAIL=RANK:STEP:CODE makes a rank end
with a code, once; with STUB_ALONE=1 others can save without it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from moe.train.preempt import LAUNCHER, Launcher


def main() -> int:
    values = yaml.safe_load(Path(sys.argv[1]).read_text())
    values |= dict(text.split("=", 1) for text in sys.argv[2:])
    out, rank = Path(values["out"]), os.environ["RANK"]
    launcher = Launcher(Path(os.environ[LAUNCHER]))
    signals: list[str] = []

    def note(name: str) -> None:
        signals.append(name)
        with (out / f"signals-{rank}").open("a") as file:
            file.write(f"{name}\n")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda given, _: note(signal.Signals(given).name))
    out.mkdir(parents=True, exist_ok=True)
    if rank == "0":
        (out / "preempted").unlink(missing_ok=True)
    state = out / f"state-{rank}.json"
    step, value = json.loads(state.read_text()) if state.exists() else (0, 1)
    print(f"rank {rank} begins at step {step}", flush=True)
    fails, at, code = os.environ.get("STUB_FAIL", "-:0:0").split(":")
    failed = out / f"failed-{rank}"
    while step < int(os.environ.get("STUB_STEPS", "20")):
        time.sleep(0.05)
        step, value = step + 1, value * 6364136223846793005 % 2**64 + int(rank)
        with (out / f"values-{rank}").open("a") as file:
            file.write(f"{step} {value}\n")
        if rank == fails and step == int(at) and not failed.exists():
            failed.touch()
            if int(code) > 128:
                os.kill(os.getpid(), int(code) - 128)
            return int(code)
        if launcher.reason and launcher.reason not in signals:
            note(launcher.reason)
        if signals and list(out.glob("failed-*")) and "STUB_ALONE" not in os.environ:
            return 1  # saving takes all ranks, and one is gone
        if signals:
            time.sleep(float(os.environ.get("STUB_SAVE", "0.3")))
            print(f"rank {rank} leaves at step {step}", flush=True)
            state.write_text(json.dumps([step, value]))
            if rank == "0":
                (out / "preempted").write_text(json.dumps({"step": step, "reason": "signal"}))
            return 85
    (out / f"done-{rank}").touch()
    return 0


sys.exit(main())
