"""torchrun.sh with the real `moe.train`: a rank that is killed, a configuration that is wrong."""

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_run
from launching import ROOT, STEPS, run, start, wait_for

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "launch/torchrun.sh"


def untimed(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in toy_run.metrics(out)
    ]


def logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_after_a_killed_rank_all_start_again_and_end_the_same(toys, straight, real_bin, tmp_path):
    out = tmp_path / "run"
    command = [SCRIPT, "--ranks", 2, "--max-restarts", 1, toys.write(out), *STEPS]
    launch = start(command, tmp_path / "log", {"BIN": str(real_bin)})
    wait_for(lambda: logged(out) >= 7, "steps beyond a checkpoint", launch)
    (file,) = out.glob("launch.*/pid-1.*")
    os.kill(int(file.read_text()), signal.SIGKILL)
    assert launch.wait() == 0, launch.text
    log = (out / "logs/rank-00001.log").read_text()
    assert "attempt 0" in log and "attempt 1" in log
    assert "going on from" in (out / "logs/rank-00000.log").read_text()
    assert "rank 1 on" in launch.text and "ended with 137" in launch.text
    assert untimed(out) == untimed(straight) and len(untimed(out)) == 30
    ends = [toy_run.checkpoint(place, 30) for place in (out, straight)]
    assert toy_run.differing(*ends) == []


def test_without_restarts_it_ends_the_run(toys, real_bin, tmp_path):
    """Negative control."""
    out = tmp_path / "run"
    launch = start([SCRIPT, "--ranks", 2, toys.write(out), *STEPS], tmp_path / "log",
                   {"BIN": str(real_bin)})  # fmt: skip
    wait_for(lambda: logged(out) >= 3, "steps", launch)
    (file,) = out.glob("launch.*/pid-1.*")
    os.kill(int(file.read_text()), signal.SIGKILL)
    assert launch.wait() == 137, launch.text
    assert not (out / "checkpoints/step-30").exists()


def test_a_killed_launcher_leaves_a_saved_run_and_no_other_run_comes_between(
    toys, straight, real_bin, tmp_path
):
    """Two more starts: one while it runs, one as soon as it has lost its launcher."""
    out = tmp_path / "run"
    command = [SCRIPT, "--ranks", 2, toys.write(out), *STEPS]
    first = start(command, tmp_path / "first", {"BIN": str(real_bin)})
    wait_for(lambda: logged(out) >= 1, "a step", first)
    held = json.loads((out / "lock").read_text())
    assert held["host"] == socket.gethostname() and psutil.pid_exists(held["pid"])
    with contextlib.suppress(ProcessLookupError):  # it would end meanwhile
        os.kill(held["pid"], signal.SIGSTOP)
    try:
        second = run(command, tmp_path / "second", {"BIN": str(real_bin)})
    finally:
        os.kill(held["pid"], signal.SIGCONT)
    assert second.ended == [2], second.text
    said = [line for line in second.text.splitlines() if line.startswith("error: another run")]
    assert len(said) == 1 and f"out={out} ({held['host']}, process {held['pid']}" in said[0]
    first.process.kill()
    third = run(command, tmp_path / "third", {"BIN": str(real_bin)})
    assert third.ended == [0], third.text
    log = (out / "logs/rank-00000.log").read_text()
    assert "preempted: lost launcher at step" in log and "going on from" in third.text
    assert untimed(out) == untimed(straight)
    ends = [toy_run.checkpoint(place, 30) for place in (out, straight)]
    assert toy_run.differing(*ends) == []


def test_what_the_run_refuses_ends_with_2(toys, real_bin, tmp_path):
    config = toys.write(tmp_path / "run")
    command = [SCRIPT, "--ranks", 2, config, "parallel.expert=2", "parallel.replicate=3"]
    launch = run(command, tmp_path / "log", {"BIN": str(real_bin)})
    assert launch.ended == [2], launch.text
    assert "parallel.replicate=3" in launch.text
