"""`moe plan`, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
import toy_run
import yaml
from invoke import moe

from moe.checkpoint import pieces
from moe.model import RoutedLlamaConfig
from moe.plan import plan

VALUES = {
    "out": "run",
    "data": {"train": [{"path": "corpus"}], "sequence_length": 32},
    "train": {"global_batch_size": 32, "micro_batch_size": 1},
    "parallel": {"expert": 2},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    """A configuration whose model is a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("plan")
    tiny.routed_model(tiny.dense_model(), tiny.MOH, tiny.MOE).config.save_pretrained(folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(folder), **VALUES}))
    return path


@pytest.fixture(scope="module", autouse=True)
def _two_worlds():
    """A thousand ranks take some seconds."""
    with mock.patch.object(plan, "WORLDS", (8, 64)):
        yield


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def found(settings) -> dict:
    result = moe("plan", settings, "--world", 16, "--memory", 1, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_everything_that_was_asked_for_is_there(found):
    assert found["parameters"]["total"] > found["parameters"]["active"] > 0
    assert found["parallel"] == {"replicate": 1, "shard": 16, "expert": 2, "tensor": 1}
    assert (found["micro_batches"], found["tokens_per_step"]) == (2, 1024)
    for name in ("weights", "gradients", "moments", "activations", "dispatch"):
        assert found["bytes"][name]["total"] >= found["bytes"][name]["experts"] > 0, name
    held = found["bytes"]["weights"]["total"] + found["bytes"]["moments"]["total"]
    assert found["bytes"]["saved"] == held
    assert found["bytes"]["accumulated"] == 0  # each micro-batch's gradient is cut up at once
    assert found["fits"] and found["memory"] == 1e9
    kinds = {row["kind"] for row in found["collectives"]}
    assert kinds == {"all_gather", "reduce_scatter", "all_to_all"}
    assert [row["ranks"] for row in found["worlds"]] == [8, 16, 64]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_that_is_saved_is_counted_in_the_hosts_memory(toys, tmp_path, dtype):
    config = toys.config(tmp_path / "run", f"train.dtype={dtype}")
    with toy_run.opened(config) as (run, take):
        take()
        snapshot = pieces.take(run.engine.state(), 0, buffers := {})
        held = sum(buffer.nbytes for buffer in buffers.values())
        assert held == sum(h.block.nbytes for h in snapshot.held.values() if h.kind != "rng")
        shape = run.model_config
    total, _ = plan.parameter_counts(shape)
    told = plan.saved_bytes(config, plan.footprint(config, shape, 1), total, 1)
    assert told == pytest.approx(held, rel=0.02)


def test_legal_meshes_and_why_others_are_not(found):
    assert found["meshes"]["replicate"]["legal"] == [1, 2, 4, 8, 16]
    expert = found["meshes"]["expert"]
    assert expert["legal"] == [1, 2, 4]
    assert "does not divide the experts of every layer" in expert["refused"]["8"]


def test_worlds_whose_ranks_cannot_be_shared_say_so(found):
    """Of 64 ranks 32 hold the same experts, and cannot cut 72 rows."""
    assert "cannot cut their rows evenly" in found["worlds"][-1]["refused"]
    eight = found["worlds"][0]
    slower = eight["compute_seconds"] + eight["all_to_all_seconds"]
    assert eight["step_seconds"] >= slower > eight["compute_seconds"] > 0
    assert eight["tokens_per_second"] == pytest.approx(8 * 2 * 32 / eight["step_seconds"])


def test_people_get_tables(settings):
    result = moe("plan", settings, "--world", 2, "--memory", "0.0001", "train.dtype=float32")
    assert result.code == 0, result.err
    for text in ("parameters", "parallel.expert", "activations", "does not fit", "Assumed",
                 "tokens to experts", "GPUs", "balanced routing"):  # fmt: skip
        assert text in result.out, text
    assert max(len(line) for line in result.out.splitlines()) < 260


def test_assumptions_can_be_changed(settings, found):
    options = "--mfu", "0.2", "--tflops", "100", "--network-bandwidth", "1", "--gpus-per-node", "4"
    other = json.loads(moe("plan", settings, "--world", 16, "--json", *options).out)
    assert other["assumptions"]["outside"] == 1e9
    for row, before in zip(other["worlds"][:2], found["worlds"][:2], strict=True):
        assert row["compute_seconds"] == pytest.approx(before["compute_seconds"] * 2 * 989 / 100)
        assert row["all_gather_seconds"] > before["all_gather_seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world", 3), "is not a multiple of train.micro_batch_size=1 × 3 ranks"),
        (("--world", 16, "parallel.expert=8"), "does not divide the experts of every layer (4)"),
        (("--world", 16, "parallel.expert=3"), "does not divide the 16 ranks"),
        (("--world", 16, "parallel.replicate=5"), "a replicate that divides the ranks"),
        (("--world", 0), "--world 0 must be greater than 0"),
        (("--world", 4, "--memory", 0), "--memory 0.0 must be greater than 0"),
        (("--world", 4, "--memory", "-1"), "--memory -1.0 must be greater than 0"),
        (("--world", 4, "--mfu", 2), "at most 1"),
        (("--world", 4, "train.stepz=1"), "Did you mean `steps`"),
        (("--world", 4, "model=nowhere"), "nowhere is not a folder"),
        (("--world", 4, "train.trainable=['*.nothing']"), "matches none of the"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(settings, arguments, message):
    result = moe("plan", settings, *arguments)
    assert result.code == 2 and message in result.err and not result.out


def test_a_dense_model_has_no_experts_to_divide(tmp_path):
    tiny.dense_model().config.save_pretrained(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(tmp_path), **VALUES}))
    refused = moe("plan", path, "--world", 2)
    assert refused.code == 2 and "the model has no routed MLP" in refused.err
    result = moe("plan", path, "--world", 2, "parallel.expert=1", "--json")
    assert json.loads(result.out)["visits"] is None


def test_other_kernels_keep_other_activations(settings, found, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "naive")
    result = moe("plan", settings, "--world", 16)
    assert result.code == 2 and "MOE_KERNELS=naive looks at values" in result.err
    monkeypatch.setenv("MOE_KERNELS", "triton")
    result = moe("plan", settings, "--world", 16, "--json")
    kept = json.loads(result.out)["bytes"]["activations"]["total"]
    assert kept == pytest.approx(found["bytes"]["activations"]["total"], rel=0.1)
    assert kept != found["bytes"]["activations"]["total"]


def test_it_is_among_the_commands():
    help_text = subprocess.run(
        [sys.executable, "-m", "moe", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "plan" in help_text


@pytest.mark.slow
def test_a_large_model_on_many_ranks_takes_no_memory(tmp_path):
    """47 B parameters, whose weights alone would be 187 GB, on 1024 ranks: under 4 GB here."""
    code = (
        "import resource, sys; from moe.cli import call\n"
        "try: call()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    mlp = {"kind": "moe", "num_experts": 8, "top_k": 2}
    RoutedLlamaConfig(**sizes, mlp=mlp).save_pretrained(tmp_path)
    path = tmp_path / "run.yaml"
    batch = {"global_batch_size": 2048, "micro_batch_size": 1}
    path.write_text(yaml.safe_dump({"model": str(tmp_path), **VALUES, "train": batch}))
    command = [
        sys.executable,
        "-c",
        code,
        "plan",
        str(path),
        "parallel.expert=8",
        "--world",
        "1024",
        "--json",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    held = json.loads(done.stdout)["bytes"]
    assert held["start"] == 0  # divided layer by layer
    assert held["weights"]["total"] == pytest.approx(187e9 / 1024, rel=0.02)
    assert int(done.stderr.split()[-1]) < 4e6


def test_deepspeed_is_planned_by_its_stages(settings):
    def planned(*overrides: str) -> dict:
        result = moe("plan", settings, "--world", 4, "--json", "engine=deepspeed", *overrides)
        assert result.code == 0, result.err
        return json.loads(result.out)["bytes"]

    one, two = planned("deepspeed.stage=1"), planned("deepspeed.stage=2")
    three = planned("deepspeed.stage=3", "parallel.expert=1")
    assert one["moments"] == two["moments"]
    assert two["gradients"]["total"] < one["gradients"]["total"]
    away = planned("deepspeed.stage=2", "deepspeed.offload=optimizer")
    assert away["moments"]["total"] == 0 and away["host"] > two["moments"]["total"]
    assert three["start"] > 0 and one["activations"] == two["activations"]
    refused = moe("plan", settings, "--world", 4, "engine=deepspeed", "deepspeed.stage=3")
    assert refused.code == 2 and "no expert parallelism with divided weights" in refused.err
    text = moe("plan", settings, "--world", 4, "engine=deepspeed", "deepspeed.offload=optimizer")
    assert "offloaded to the host" in text.out, text.err


def test_a_world_that_would_take_long_is_refused(settings):
    result = moe("plan", settings, "--world", 1_000_000)
    assert result.code == 2 and "at most 4096" in result.err
