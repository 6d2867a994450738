"""srun, sbatch and scontrol that start real processes on this machine, and write down their calls.

install(folder) puts the three into a folder for PATH. As SLURM does: sbatch runs a copy of the
script, again where it was requeued; srun hands signals to every task, ends the others where one
fails and itself with the largest code; `scontrol show hostnames` writes out the nodes.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

JOB = "4711"


def install(folder: Path) -> Path:
    folder.mkdir()
    for name in ("srun", "sbatch", "scontrol"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return folder


def note(line: str) -> None:
    with Path(os.environ["FAKE_SLURM_LOG"]).open("a") as file:
        file.write(line + "\n")


def sbatch(arguments: list[str]) -> int:
    """sbatch NODES SCRIPT ARGUMENTS; `batch.pid` beside the log is the running script's."""
    nodes, script, *rest = arguments
    place = Path(os.environ["FAKE_SLURM_LOG"]).parent
    copy = place / "spool_script"
    shutil.copyfile(script, copy)
    code = 0
    for life in range(int(os.environ.get("FAKE_SLURM_LIVES", "3"))):
        (place / "requeued").unlink(missing_ok=True)
        environment = {
            "SLURM_JOB_ID": JOB, "SLURM_NNODES": nodes, "SLURM_SUBMIT_DIR": os.getcwd(),
            "SLURM_JOB_NODELIST": f"localhost[1-{nodes}]", "SLURM_RESTART_COUNT": str(life),
        }  # fmt: skip
        note(f"life {life}")
        batch = subprocess.Popen(["bash", str(copy), *rest], env={**os.environ, **environment})
        (place / f"batch-{life}.pid").write_text(str(batch.pid))
        code = batch.wait()
        note(f"ended {code}")
        if not (place / "requeued").exists():
            break
    return code


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        count = int(arguments[2].split("-")[1].rstrip("]"))
        print("\n".join(["localhost"] * count))
        return 0
    note("scontrol " + " ".join(arguments))
    (Path(os.environ["FAKE_SLURM_LOG"]).parent / "requeued").touch()
    return 0


def srun(arguments: list[str]) -> int:
    given = list(arguments)
    options = {}
    while given[0].startswith("--"):
        name, equals, value = given.pop(0).partition("=")
        options[name] = value if equals else given.pop(0)
    note("srun " + " ".join(given))
    tasks = [
        subprocess.Popen(
            given, env={**os.environ, "SLURM_NODEID": str(i), "SLURM_PROCID": str(i)},
            start_new_session=True,
        )
        for i in range(int(options["--ntasks"]))
    ]  # fmt: skip

    def hand_on(number: int, _: object = None) -> None:
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):
                task.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    codes: list[int] = []
    waiting = list(tasks)
    while waiting:
        pid, status = os.wait()
        (task,) = (t for t in waiting if t.pid == pid)
        waiting.remove(task)
        task.returncode = os.waitstatus_to_exitcode(status)  # not to be signalled any more
        codes.append(task.returncode if task.returncode >= 0 else 128 - task.returncode)
        if codes[-1] and options.get("--kill-on-bad-exit") == "1":
            hand_on(signal.SIGTERM)
    return max(codes)


if __name__ == "__main__":
    sys.exit({"srun": srun, "sbatch": sbatch, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
