"""On one CUDA device: every engine over NCCL, its losses those of a CPU, checkpoints in common."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "native": (),
    "native bf16": ("train.dtype=bfloat16",),
    "compiled": ("train.compile=true",),
    "recomputed": ("train.activation_checkpointing=full",),
    **{f"zero {n}": ("engine=deepspeed", f"deepspeed.stage={n}") for n in range(4)},
    "zero 2 bf16": ("engine=deepspeed", "deepspeed.stage=2", "train.dtype=bfloat16"),
    "zero 3 bf16": ("engine=deepspeed", "deepspeed.stage=3", "train.dtype=bfloat16"),
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    import toy_run

    return toy_run.make(tmp_path_factory.mktemp("toys"), hidden_size=96, num_attention_heads=6)


def losses(toys, out: Path, *overrides: str, cpu: bool = False) -> list[float]:
    """Of a run in a process of its own, as `torchrun` starts it."""
    config = toys.write(out)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("TRITON_INTERPRET", None)
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "1", "-m", "moe.train", str(config), *overrides]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if "loss" in r]


@pytest.fixture(scope="module")
def on_a_cpu(toys, tmp_path_factory):
    return losses(toys, tmp_path_factory.mktemp("cpu") / "run", cpu=True)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_a_cpu(toys, on_a_cpu, tmp_path, name):
    if "zero" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    found = losses(toys, tmp_path / "run", *RUNS[name])
    near = 0.02 if "bf16" in name else 1e-4
    assert len(found) == len(on_a_cpu) == 4
    assert all(abs(a - b) < near for a, b in zip(found, on_a_cpu, strict=True)), (found, on_a_cpu)
    assert found[0] - found[-1] > 2 * near  # it learns, so equal losses say something


def test_a_checkpoint_goes_on_in_another_engine(toys, tmp_path):
    straight = losses(toys, tmp_path / "straight")
    first = losses(toys, tmp_path / "first", "train.steps=2", "schedule.kind=constant")
    there = f"train.resume={tmp_path}/first/checkpoints/step-2"
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    constant = losses(toys, tmp_path / "whole", "schedule.kind=constant")
    how = (there, "schedule.kind=constant", "engine=deepspeed", "deepspeed.stage=2")
    rest = losses(toys, tmp_path / "rest", *how)
    assert all(abs(a - b) < 1e-4 for a, b in zip(first + rest, constant, strict=True))
    assert straight[0] == pytest.approx(first[0], abs=1e-5)
