"""Ranks as launchers start them: real processes, one of which differs, dies or falls silent."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_run

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("launch"))


def start(config: Path, *overrides: str, each: tuple[str, ...] = ("", "")) -> list:
    """Two ranks of one run, each with an override of its own; nobody watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(each))}
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "moe.train", str(config), *overrides, *filter(None, [own])],
            env={**os.environ, **place, **quiet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(each)
    ]


def finish(processes: list, timeout: float = 90.0) -> list[tuple[int, str, str]]:
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        ends.append((process.returncode, out, err))
    return ends


def wait_for_steps(out: Path, count: int, processes: list) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        path = out / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        assert all(p.poll() is None for p in processes), [p.stderr.read() for p in processes]
        time.sleep(0.05)
    raise AssertionError("no steps in time")


def test_another_configuration_on_one_rank_is_found_and_said_once(toys, tmp_path):
    each = ("optimizer.lr=1e-3", "optimizer.lr=1e-4")
    (first, second) = finish(start(toys.write(tmp_path / "run"), each=each))
    assert first[0] == second[0] == 2
    assert "1 of 2 ranks were started with another configuration than rank 0" in first[2]
    assert "optimizer.lr 0.001 -> 0.0001" in first[2]
    assert "error" not in second[2] and "Traceback" not in first[2] + second[2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_no_rank_can_do_is_said_once(toys, tmp_path):
    config = toys.write(tmp_path / "run")
    for override, said in (
        ("parallel.expert=3", "does not divide the 2 ranks"),
        ("parallel.tensor=2", "does not divide"),
    ):
        (first, second) = finish(start(config, override))
        assert first[0] == second[0] == 2
        assert said in first[2] and "error" not in second[2], first[2] + second[2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_ends_the_others_with_a_line(toys, tmp_path, how):
    out = tmp_path / "run"
    long = ("train.steps=100000", "checkpoint.every=100000", "parallel.timeout=5")
    processes = start(toys.write(out), *long)
    try:
        wait_for_steps(out, 3, processes)
        processes[1].send_signal(how)
        begin = time.monotonic()
        ((code, _, said),) = finish(processes[:1])
        assert time.monotonic() - begin < 25, "within the time limit, and what it takes to end"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert code == 1 and "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "another of the 2 ranks is gone" in lines[0], said


def test_deepspeeds_own_launcher_starts_a_run(toys, tmp_path):
    out = tmp_path / "run"
    config = toys.write(out)
    options = ["engine=deepspeed", "deepspeed.stage=2", "train.steps=2"]
    process = subprocess.run(
        [BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29611", "--module", "moe.train",
         str(config), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"on 2 rank\(s\)", process.stdout)
    assert len(toy_run.metrics(out)) == 2
    manifest = json.loads((out / "checkpoints/step-2/manifest.json").read_text())
    assert len([f for f in manifest["files"] if f.startswith("rank-")]) == 2
