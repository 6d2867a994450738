"""launch/slurm/*.sbatch under a stand-in for SLURM that starts real processes."""

import os
import shutil
import signal
import time
from pathlib import Path

import fake_slurm
import launching
import pytest
import tiny
from launching import ROOT, Launch, signals, start, undisturbed, values, wait_for

pytestmark = pytest.mark.slow


class Cluster:
    """A folder of fake commands, and what they wrote down."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder, self.log = folder, folder / "slurm.log"
        self.environment = {
            "PATH": f"{fake_slurm.install(folder / 'slurm')}:{os.environ['PATH']}",
            "FAKE_SLURM_LOG": str(self.log),
            "BIN": str(bin_folder),
        }

    def submit(self, nodes: int, *arguments: object, **more: str) -> Launch:
        command = ["sbatch", nodes, *arguments]
        return start(command, self.folder / "job.log", {**self.environment, **more}, cwd=ROOT)

    def signal(self, life: int, number: int) -> None:
        """As SLURM does with --signal=B:…: the batch script alone."""
        os.kill(int((self.folder / f"batch-{life}.pid").read_text()), number)

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def requeues(self) -> int:
        return self.lines.count(f"scontrol requeue {fake_slurm.JOB}")


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path, launching.stub_bin(tmp_path / "bin"))


TRAIN = "launch/slurm/train.sbatch"
RANKS = {"torchrun": {"MOE_LAUNCHER": "torchrun"}, "deepspeed": {"MOE_LAUNCHER": "deepspeed"}}


@pytest.mark.parametrize("launcher", RANKS)
def test_a_preempted_job_is_requeued_once_and_ends_exactly(tmp_path, cluster, launcher):
    """Two nodes of two ranks; the second signal comes while the first is being answered."""
    out = tmp_path / "run"
    more = {**RANKS[launcher], "MOE_RANKS": "2"}
    job = cluster.submit(2, TRAIN, launching.write_config(out), **more)
    wait_for(lambda: all(values(out, r) for r in range(4)), "steps", job)
    cluster.signal(0, signal.SIGUSR1)
    wait_for(lambda: all(signals(out, r) for r in range(4)), "signals", job)
    cluster.signal(0, signal.SIGUSR1)
    cluster.signal(0, signal.SIGTERM)
    assert job.wait(240) == 0, job.text
    assert [line for line in cluster.lines if not line.startswith("srun")] == [
        "life 0", f"scontrol requeue {fake_slurm.JOB}", "ended 85", "life 1", "ended 0"
    ]  # fmt: skip
    for rank in range(4):
        assert values(out, rank) == undisturbed(rank), "the run that nobody disturbed"
        assert (out / f"logs/rank-0000{rank}.log").exists()
    assert {tuple(signals(out, r)) for r in range(4)} == {("SIGUSR1",)}


def test_each_preemption_is_one_requeue(tmp_path, cluster):
    out = tmp_path / "run"
    job = cluster.submit(1, TRAIN, launching.write_config(out), MOE_RANKS="1", STUB_STEPS="40")
    for life in (0, 1):
        before = len(values(out, 0))
        wait_for(lambda before=before: len(values(out, 0)) > before, "steps", job)
        cluster.signal(life, signal.SIGTERM if life else signal.SIGUSR1)
        wait_for(lambda life=life: cluster.requeues == life + 1, "a requeue", job)
    assert job.wait() == 0, job.text
    assert cluster.requeues == 2 and values(out, 0) == undisturbed(0, 40)


FULL = [pytest.param(moment, marks=pytest.mark.full) for moment in ("torchrun", "agent")]


@pytest.mark.parametrize("moment", ["at once", "step", "checks", "rank", *FULL])
def test_a_signal_while_it_starts_is_a_requeue(tmp_path, cluster, moment):
    """However early the job is preempted: nothing in it has failed."""
    out = tmp_path / "run"
    job = cluster.submit(1, TRAIN, launching.write_config(out), MOE_RANKS="1", FAKE_SLURM_LIVES="1")
    batch = tmp_path / "batch-0.pid"
    wait_for(lambda: batch.exists() and batch.read_text(), "the batch script", job)
    pid = int(batch.read_text())
    wait_for(lambda: launching.answers(pid, signal.SIGUSR1), "a trap", job)
    there = {
        "at once": lambda: True,
        "step": lambda: "+ srun" in job.text,
        "torchrun": lambda: any(line.startswith("srun") for line in cluster.lines),
        "checks": lambda: launching.below(pid, "torchrun.sh"),
        "agent": lambda: list(out.glob("launch.*")),
        "rank": lambda: list(out.glob("launch.*/pid-*")),
    }
    wait_for(there[moment], moment, job)
    cluster.signal(0, signal.SIGUSR1)
    assert job.wait() == 85, job.text
    assert cluster.requeues == 1 and len(values(out, 0)) <= 2
    assert "error" not in job.text and "Traceback" not in job.text


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failing_rank_ends_the_job_with_its_code_and_no_requeue(tmp_path, cluster, code):
    """Negative control."""
    out = tmp_path / "run"
    more = {"MOE_RANKS": "1", "STUB_FAIL": f"0:2:{code}"}
    job = cluster.submit(1, TRAIN, launching.write_config(out), **more)
    assert job.wait() == code, job.text
    assert cluster.requeues == 0 and cluster.lines[-1] == f"ended {code}"


def test_a_failing_node_takes_the_other_along_without_a_requeue(tmp_path, cluster):
    out = tmp_path / "run"
    more = {"MOE_RANKS": "1", "STUB_FAIL": "1:2:3", "STUB_STEPS": "100"}
    job = cluster.submit(2, TRAIN, launching.write_config(out), **more)
    assert job.wait() not in (0, 85), job.text
    assert cluster.requeues == 0


def test_a_requeue_that_slurm_refuses_is_said(tmp_path, cluster):
    launching.executable(Path(cluster.environment["PATH"].split(":")[0]) / "scontrol",
                         '[ "$1" = show ] && echo localhost || exit 1')  # fmt: skip
    out = tmp_path / "run"
    job = cluster.submit(1, TRAIN, launching.write_config(out), MOE_RANKS="1")
    wait_for(lambda: values(out, 0), "steps", job)
    cluster.signal(0, signal.SIGUSR1)
    assert job.wait() == 85, job.text
    assert f"job {fake_slurm.JOB} was not requeued: submit it again" in job.text


def test_a_conversion_that_is_stopped_is_requeued_and_ends(tmp_path):
    """The real `moe upcycle`, which first waits, so that a signal can meet it."""
    cluster = Cluster(tmp_path, launching.real_bin(tmp_path / "bin"))
    moe = tmp_path / "bin" / "moe"
    body = moe.read_text().splitlines()[1]
    mark = tmp_path / "waited"
    launching.executable(moe, f"[ -e {mark} ] || {{ touch {mark}; exec sleep 60; }}\n{body}")
    tiny.dense_model("llama").save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    options = ["copy", "--source", tmp_path / "dense", "--num-experts", 2, "--top-k", 1,
               "--out", tmp_path / "mixture"]  # fmt: skip
    job = cluster.submit(1, "launch/slurm/upcycle.sbatch", *options)
    wait_for(mark.exists, "the conversion", job)
    time.sleep(0.3)
    cluster.signal(0, signal.SIGUSR1)
    assert job.wait() == 0, job.text
    assert cluster.requeues == 1 and (tmp_path / "mixture/receipt.json").exists()
    shutil.rmtree(tmp_path / "slurm")
    again = Cluster(tmp_path, tmp_path / "bin")  # negative control: it fails by itself
    refused = again.submit(1, "launch/slurm/upcycle.sbatch", *options)
    assert refused.wait() == 2 and "exists" in refused.text
    assert again.requeues == 1, "the earlier one"


def test_an_evaluation_keeps_its_code(tmp_path):
    cluster = Cluster(tmp_path, launching.real_bin(tmp_path / "bin"))
    job = cluster.submit(1, "launch/slurm/eval.sbatch", tmp_path / "none", "--suite", "smoke",
                         "--out", tmp_path / "e")  # fmt: skip
    assert job.wait() == 2 and "none" in job.text
    assert cluster.requeues == 0
