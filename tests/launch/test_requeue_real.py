"""From submission to requeue to the end with the real `moe train`: SIGUSR1 to the batch script."""

import json
import os
import signal

import fake_slurm
import pytest
import toy_run
from launching import ROOT, STEPS, start, wait_for
from test_elastic import logged, untimed

pytestmark = pytest.mark.slow


def test_a_job_of_two_nodes_is_requeued_once_and_ends_in_the_same_bits(
    toys, straight, real_bin, tmp_path
):
    out = tmp_path / "run"
    fakes = fake_slurm.install(tmp_path / "slurm")
    environment = {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "FAKE_SLURM_LOG": str(tmp_path / "slurm.log"),
        "BIN": str(real_bin),
        "MOE_RANKS": "1",
    }
    command = ["sbatch", 2, "launch/slurm/train.sbatch", toys.write(out), *STEPS]
    job = start(command, tmp_path / "log", environment, cwd=ROOT)
    wait_for(lambda: logged(out) >= 3, "steps", job)
    os.kill(int((tmp_path / "batch-0.pid").read_text()), signal.SIGUSR1)
    wait_for((tmp_path / "batch-1.pid").exists, "the second life", job)
    begun = int(json.loads((out / "preempted").read_text())["step"]) if (
        out / "preempted").exists() else logged(out)  # fmt: skip
    assert begun < 30, "stopped before its end"
    assert job.wait(240) == 0, job.text
    lines = (tmp_path / "slurm.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("srun")] == [
        "life 0", f"scontrol requeue {fake_slurm.JOB}", "ended 85", "life 1", "ended 0"
    ]  # fmt: skip
    assert not (out / "preempted").exists()
    assert untimed(out) == untimed(straight)
    ends = [toy_run.checkpoint(place, 30) for place in (out, straight)]
    assert toy_run.differing(*ends) == []
