"""Signals and time limits, at any moment and on any rank: saved, marked, exit code 85, no trace."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import toy_run
from harness import run_ranks
from moments import Ranks, free_port
from torch import distributed

from moe.checkpoint import store
from moe.errors import Preempted
from moe.parallel import world
from moe.train import preempt

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
OPTIONS = (
    "train.steps=6", "checkpoint.every=4", "eval.every=3", "eval.sequences=8", "parallel.timeout=60"
)  # fmt: skip
STEPS = {"import": 0, "build": 0, "data": 2, "step": 2, "validation": 3, "save": 4}
WHO = {"one": [1], "all": [0, 1]}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
Case = tuple[str, str, signal.Signals]
GRID: list[Case] = list(product(STEPS, WHO, SIGNALS))
# every moment with either signal, and on one rank and on all
PAIRS = [c for i, c in enumerate(GRID) if i % 4 in ((0, 3) if i // 4 % 2 else (1, 2))]


class Alone:
    rank = 0


def named(case: Case) -> str:
    moment, who, number = case
    return f"{moment}, {who}, {number.name}"


def write(toys: toy_run.Toys, out: Path) -> tuple[Path, tuple[str, ...]]:
    return toys.write(out), (*OPTIONS, toys.validation)


def preempted(toys: toy_run.Toys, folder: Path, case: Case) -> None:
    """Start two ranks, signal at the moment, and check how they end."""
    moment, who, number = case
    out = folder / named(case)
    config, overrides = write(toys, out)
    with Ranks(config, folder / f"{out.name} ranks", *overrides, moment=moment) as ranks:
        ranks.wait_until_there(*([0] if moment == "save" else []))
        ranks.signal(WHO[who], number)
        ranks.let_go()
        check_ends(ranks.finish(), out, number.name)
    expected = STEPS[moment]
    marker = json.loads((out / preempt.MARKER).read_text())
    assert marker["step"] == expected or (moment == "save" and marker["step"] <= expected + 2)
    assert ("on rank 1" in marker["reason"]) == (who == "one")
    newest = store.latest(out)
    assert (newest.name if newest else "step-0") == f"step-{marker['step']}"
    assert not newest or store.check(newest) == []
    if moment == "validation":
        assert "validation_loss" not in (out / "metrics.jsonl").read_text()


def check_ends(ends: list[tuple[int, str, str]], out: Path, reason: str) -> None:
    """Every rank ended with 85, and rank 0 alone says so, in a line."""
    assert [code for code, _, _ in ends] == [85] * len(ends), ends
    lines = [line for _, _, said in ends for line in said.splitlines() if "Warning" not in line]
    lines = [line for line in lines if line.startswith(("preempted", "error", "Traceback"))]
    assert len(lines) == 1 and lines[0].startswith("preempted: "), ends
    marker = json.loads((out / preempt.MARKER).read_text())
    assert marker.keys() == {"step", "reason", "time"} and reason in marker["reason"]
    assert marker["reason"] in ends[0][2]


def go_on(toys: toy_run.Toys, outs: list[Path]) -> None:
    """Run all of these to their end, on two ranks."""
    for out in outs:
        own = out.with_name(f"{out.name} of {distributed.get_rank()}")
        config = toys.config(own, *OPTIONS, toys.validation)
        toy_run.run(config.model_copy(update={"out": out}))


def compare(toys: toy_run.Toys, folder: Path, cases: list[Case]) -> list[str]:
    """Which of the preempted runs, gone on with, are not the undisturbed one."""
    outs = [folder / named(case) for case in cases]
    run_ranks(go_on, 2, toys, [folder / "straight", *outs])
    tensors, lines = state(folder / "straight")
    found = []
    for out in outs:
        own, own_lines = state(out)
        differing = toy_run.differing(own, tensors)
        if differing or own_lines != lines or (out / preempt.MARKER).exists():
            found.append(f"{out.name}: {differing[:3]} {own_lines} {lines}")
    return found


def state(out: Path) -> tuple[Any, Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return toy_run.checkpoint(out, 6), lines


@pytest.fixture(scope="module")
def ended(toys, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the pairwise runs, and what is wrong with them once they have gone on."""
    folder = tmp_path_factory.mktemp("preempted")
    for case in PAIRS:
        preempted(toys, folder, case)
    return folder, compare(toys, folder, PAIRS)


def test_every_pair_of_moment_and_rank_and_signal_is_covered() -> None:
    for chosen in ((0, 1), (0, 2), (1, 2)):
        pairs = {tuple(case[i] for i in chosen) for case in PAIRS}
        assert pairs == {tuple(case[i] for i in chosen) for case in GRID}
    assert len(PAIRS) == len(GRID) // 2


def test_preempted_runs_go_on_as_if_nothing_had_happened(ended) -> None:
    _, wrong = ended
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_whole_grid(toys, tmp_path) -> None:
    for case in GRID:
        preempted(toys, tmp_path, case)
    wrong = compare(toys, tmp_path, GRID)
    assert not wrong, "\n".join(wrong)


def test_a_second_signal_during_the_save_does_no_harm(toys, tmp_path) -> None:
    out = tmp_path / "run"
    config, overrides = write(toys, out)
    with Ranks(config, tmp_path / "ranks", *overrides, *LONG, moment="save") as ranks:
        wait_for_steps(out, 2)
        ranks.signal([1], signal.SIGTERM)
        ranks.wait_until_there(0)  # the save that the first has caused
        for _ in range(3):
            for number in SIGNALS:
                ranks.signal([0, 1], number)
        ranks.let_go()
        ends = ranks.finish()
    check_ends(ends, out, "SIG")
    assert store.check(store.latest(out)) == []


def test_a_time_limit_ends_a_run_the_same_way(toys, tmp_path) -> None:
    out = tmp_path / "run"
    config, overrides = write(toys, out)
    limited = (*overrides, "train.steps=100000", "checkpoint.every=100000", "train.time_limit=3")
    with Ranks(config, tmp_path / "ranks", *limited) as ranks:
        check_ends(ranks.finish(), out, "train.time_limit=3")
    step = json.loads((out / preempt.MARKER).read_text())["step"]
    assert step > 0 and store.latest(out).name == f"step-{step}"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}  # fmt: skip


def wait_for_steps(out: Path, count: int) -> None:
    path, deadline = out / "metrics.jsonl", time.monotonic() + 90
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "no steps in time"
        time.sleep(0.02)


LONG = ("train.steps=100000", "checkpoint.every=100000")
LAUNCHERS: dict[str, tuple[Any, ...]] = {
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2", "-m", "moe.train"),
    "deepspeed": (BIN / "deepspeed", "--num_gpus", "2", "--master_port", "0",
                  "--module", "moe.train"),
    "moe train": (sys.executable, "-m", "moe.cli", "train"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "to"),
    [
        ("torchrun", "one rank"),
        ("deepspeed", "launcher"),
        ("moe train", "launcher"),
        pytest.param("torchrun", "launcher", marks=pytest.mark.full),
        pytest.param("deepspeed", "one rank", marks=pytest.mark.full),
    ],
)
def test_launchers_leave_ranks_the_time_to_save(toys, tmp_path, launcher, to) -> None:
    out = tmp_path / "run"
    config, overrides = write(toys, out)
    command = [free_port() if part == "0" else part for part in LAUNCHERS[launcher]]
    engine = ["engine=deepspeed"] if launcher == "deepspeed" else []
    process = subprocess.Popen(
        [*map(str, command), str(config), *overrides, *LONG, *engine],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    workers: list[psutil.Process] = []
    try:
        wait_for_steps(out, 2)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True)
                   if p.environ().get("RANK") and "forkserver" not in p.cmdline()]  # fmt: skip
        target = process.pid
        if to == "one rank":
            target = next(p.pid for p in workers if p.environ()["RANK"] == "1")
        elif launcher == "deepspeed":  # its first process would die and leave the others behind
            (target,) = {p.ppid() for p in workers}
        os.kill(target, signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        for left in (process, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    step = json.loads((out / preempt.MARKER).read_text())["step"]
    assert store.latest(out).name == f"step-{step}" and store.check(store.latest(out)) == []
    assert printed.count("preempted: SIGTERM") == 1, printed
    assert process.returncode == 85 if launcher == "moe train" else process.returncode != 0


COMPILER = """#!/bin/sh
case "$*" in *.cpp*) touch "{at}"; while [ ! -e "{go}" ]; do sleep 0.05; done ;; esac
exec g++ "$@"
"""


def test_a_signal_to_the_whole_group_while_layers_compile(tmp_path) -> None:
    """As torchrun sends it: compilers must not die of it."""
    out, at, go = tmp_path / "run", tmp_path / "at", tmp_path / "go"
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(at=at, go=go))
    compiler.chmod(0o755)
    small = toy_run.make(tmp_path / "small", None, None, num_hidden_layers=1)
    config, overrides = small.write(out), (*OPTIONS, "train.micro_batch_size=8")
    process = subprocess.Popen(
        [sys.executable, "-m", "moe.train", str(config), *overrides, "train.compile=true"],
        env={**environment(), "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not at.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        go.touch()
        printed, said = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    check_ends([(process.returncode, printed, said)], out, "SIGTERM")
    assert store.latest(out).name == "step-1"


def test_ranks_that_do_not_watch_die_unsaved(toys, tmp_path) -> None:
    """Negative control."""
    out = tmp_path / "run"
    config, overrides = write(toys, out)
    with Ranks(config, tmp_path / "ranks", *overrides, moment="unwatched") as ranks:
        ranks.wait_until_there()
        ranks.signal([0, 1], signal.SIGTERM)
        ranks.let_go()
        assert [code for code, _, _ in ranks.finish()] == [-15, -15]
    assert store.latest(out) is None and not (out / preempt.MARKER).exists()


def test_a_new_start_removes_the_marker(toys, tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / preempt.MARKER).write_text("{}")
    toy_run.run(toys.config(out, "train.steps=1"))
    assert not (out / preempt.MARKER).exists()


def test_signals_wait_until_they_are_looked_for(tmp_path) -> None:
    """In a process of its own: handled or blocked, none is lost and none is fatal."""
    code = """
import os, signal, sys
from moe.train import preempt
class One:
    rank = 0
preempt.watch()
assert "torch" not in sys.modules and "pydantic" not in sys.modules, "watching comes first"
run = preempt.Preemption(__import__("pathlib").Path("."), One())
assert not run.asked
if sys.argv[1] == "unblocked":
    signal.pthread_sigmask(signal.SIG_UNBLOCK, preempt.SIGNALS)
for _ in range(3):
    os.kill(os.getpid(), signal.SIGUSR1)
assert run.reason == "SIGUSR1" and run.asked
child = os.popen("kill -TERM $$; echo alive").read()
assert child == "alive\\n", "processes that it starts outlive the signal"
"""
    for how in ("blocked", "unblocked"):
        subprocess.run([sys.executable, "-c", code, how], check=True, env=environment(), timeout=60)


def test_a_rank_that_shares_its_batch_is_heard_too() -> None:
    """Of a tensor axis the first rank's loss counts, and every rank's signal."""
    second = world.Ranks(1, 1, torch.device("cpu"), tensor=2)
    assert second.sum(torch.tensor([5.0, 1.0]), every=1).tolist() == [0.0, 1.0]
    assert second.any(True) and not second.any(False)
    assert second.sum(torch.tensor([5.0, 1.0])).tolist() == [0.0, 0.0]


def test_time_limit_counts_from_the_start(tmp_path) -> None:
    assert not preempt.Preemption(tmp_path, Alone()).asked
    for limit, reason in ((1e-9, "train.time_limit=1e-09"), (1000.0, "")):
        preemption = preempt.Preemption(tmp_path, Alone(), limit)
        assert not preemption.asked, "before there was a step"
        preemption.stepped = True
        assert preemption.reason == reason


def test_a_time_limit_shorter_than_the_start_still_gets_on(toys, tmp_path) -> None:
    out = tmp_path / "run"
    config = toys.config(out, "train.steps=3", "checkpoint.every=100", "train.time_limit=1e-6")
    for step in (1, 2, 3):
        with pytest.raises(Preempted, match=f"train.time_limit=1e-06 at step {step}"):
            toy_run.run(config)
        assert store.steps(out)[-1][0] == step
    toy_run.run(config)
    assert not (out / preempt.MARKER).exists(), "that was the last one"


def test_what_a_launcher_got_and_its_end_are_seen(tmp_path) -> None:
    folder = tmp_path / "launch"
    folder.mkdir()
    far = preempt.Launcher(folder)
    os.mkfifo(folder / "alive")
    elsewhere = preempt.Launcher(folder)  # nobody on this node holds it
    holder = os.open(folder / "alive", os.O_RDWR)
    near = preempt.Launcher(folder)
    assert [found.reason for found in (far, elsewhere, near)] == ["", "", ""]
    (folder / "signal").touch()  # before it is written
    assert near.reason == ""
    (folder / "signal").write_text("SIGUSR1\n")
    assert [found.reason for found in (far, elsewhere, near)] == ["SIGUSR1"] * 3
    (folder / "signal").unlink()
    os.close(holder)
    assert [found.reason for found in (far, elsewhere, near)] == ["", "", "lost launcher"]
