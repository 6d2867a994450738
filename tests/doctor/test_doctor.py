"""`moe doctor` on this machine, as it is and with things made wrong."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import toy_run

from moe.doctor import machine, training
from moe.errors import UserError

pytestmark = pytest.mark.slow
OUT_OF_ORDER = {"GLOO_SOCKET_IFNAME": "none0", "MOE_KERNELS": "triton",
                "MASTER_ADDR": "none.invalid", "TRITON_INTERPRET": "0"}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("toys"))


def doctor(*arguments: object, limit: int | None = None, **environment: str) -> Any:
    """Exit code and findings by subject."""

    def few() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "moe", "doctor", *map(str, arguments), "--json"],
        env={**clean, "GLOO_SOCKET_IFNAME": "lo", **environment},
        capture_output=True, text=True, timeout=120, check=False, preexec_fn=few,
    )  # fmt: skip
    body = json.loads(done.stdout)
    assert "Traceback" not in done.stderr and body["sound"] == (done.returncode == 0)
    return done.returncode, {f["subject"]: f for f in body["findings"]}


def test_a_legal_run_is_fine_and_its_figures_are_told(toys, tmp_path):
    config = toys.write(tmp_path / "run")
    code, found = doctor(config)
    assert code == 0, found
    assert not (tmp_path / "run").exists(), "nothing is left behind"
    assert found["versions"]["values"]["torch"] and found["devices"]["verdict"] == "fine"
    assert found["ranks"]["values"]["backend"] in ("gloo", "nccl")
    assert found["kernels"]["values"]["bfloat16"]["routed_mlp"] in machine.ops.BACKENDS
    assert found["disk"]["values"]["bytes_per_second"] > 0
    toy_run.run(toys.config(tmp_path / "run", "train.steps=1"))
    folder = tmp_path / "run/checkpoints/step-1"
    written = sum(p.stat().st_size for p in folder.glob("rank-*"))
    each = found["checkpoints"]["values"]["each"]
    assert abs(written - each) < 0.1 * each, "the checkpoint is as large as was told"


def test_what_is_out_of_order_is_found_with_advice(toys, tmp_path):
    config = toys.write(tmp_path / "run")
    (tmp_path / "mix.bin").touch()
    code, found = doctor(
        config, "parallel.expert=2", "data.train.0.path=none", "engine=native",
        limit=100, WORLD_SIZE="3", **OUT_OF_ORDER,
    )  # fmt: skip
    assert code == 2
    wrong = {name for name, finding in found.items() if finding["verdict"] == "fails"}
    assert wrong == {"ranks", "kernels", "launcher", "open files", "configuration"}
    assert all(found[name]["advice"] for name in wrong)
    assert "none0" in found["ranks"]["advice"]
    problems = found["configuration"]["advice"]
    assert "parallel.expert=2 does not divide the 3 ranks" in problems and "none.json" in problems


def test_a_checkpoint_is_as_good_a_model_as_a_folder(toys, tmp_path):
    toy_run.run(toys.config(tmp_path / "first", "train.steps=1"))
    step = tmp_path / "first/checkpoints/step-1"
    config = toys.config(tmp_path / "run", f"model={step}")
    assert [f.verdict for f in training.look(config)] == ["fine", "fine"]
    (step / "manifest.json").unlink()  # negative control: neither a folder nor a checkpoint
    finding, *_ = training.look(config)
    assert finding.verdict == "fails" and "Restore the index" in finding.advice


@pytest.mark.parametrize("value", ["x", "", "-1", "2.5"])
def test_a_number_of_ranks_that_is_none_is_told(toys, tmp_path, monkeypatch, value):
    config = toys.config(tmp_path / "run", "train.steps=1")
    monkeypatch.setenv("WORLD_SIZE", value)
    (finding,) = training.look(config)
    assert finding.verdict == "fails" and f"WORLD_SIZE={value!r} is no whole" in finding.advice
    with pytest.raises(UserError, match="is no whole number: torchrun sets it"):
        toy_run.run(config)


def test_a_wrong_configuration_does_not_keep_the_machine_from_being_looked_at(toys, tmp_path):
    code, found = doctor(toys.write(tmp_path / "run"), "train.stepz=3")
    assert code == 2 and "Did you mean `steps`?" in found["configuration"]["advice"]
    assert {"disk", "ranks", "versions"} <= found.keys()


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_for_the_next_checkpoint_fails(toys, tmp_path, monkeypatch):
    config = toys.config(tmp_path / "run")
    for free, verdict in ((4 * 12_000, "fine"), (4 * 12_000 - 1, "fails")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        finding = training.checkpoints(config, 1000)
        assert finding.verdict == verdict, "three to keep and one that is being written"
    held = tmp_path / "run/checkpoints/step-1/rank-00000.safetensors"
    held.parent.mkdir(parents=True)
    held.write_bytes(bytes(12_000))
    assert training.checkpoints(config, 1000).verdict == "fine", "one of the four is there"


def test_figures_of_the_machine_become_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 64 * 2**20))
    assert machine.shared_memory().verdict == "doubtful"
    monkeypatch.setattr(machine, "SLOW_DISK", 1e12)
    speed, clock = machine.disk(tmp_path)
    assert speed.verdict == "doubtful" and clock.verdict == "fine"
    monkeypatch.setattr(machine, "SKEW", -1.0)
    assert machine.disk(tmp_path)[1].verdict == "doubtful"
    (failing,) = machine.disk(Path("/proc"))
    assert failing.verdict == "fails" and failing.advice
    needs = lambda _: ["torch>=99", "pytest", "no-such-thing; extra == 'x'"]  # noqa: E731
    monkeypatch.setattr(machine.importlib.metadata, "requires", needs)
    found = machine.versions()
    assert found.verdict == "fails" and "torch>=99" in found.said and "no-such" not in found.said
