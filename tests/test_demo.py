"""The road of `make demo`, every step of it, at toy size: launch/demo.sh itself on a toy GGUF."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_gguf import write_toy_gguf

ROOT = Path(__file__).resolve().parents[1]
TOY = ["train.steps=6", "data.sequence_length=64", "eval.every=3", "eval.sequences=4",
       "checkpoint.every=3", "optimizer.lr=1e-3"]  # fmt: skip


def demo(folder: Path, gguf: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "DEMO_DIR": str(folder),
        "DEMO_GGUF": str(gguf),
        "DEMO_LIMIT": "2",
        "DEMO_FILES": "100",
        "BIN": str(Path(sys.executable).parent),
    }
    return subprocess.run(
        [ROOT / "launch/demo.sh", *TOY, *overrides],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_toy_gguf(folder / "toy.gguf")
    return folder / "out", demo(folder / "out", folder / "toy.gguf")


@pytest.mark.slow
def test_every_step_is_done_and_the_result_is_a_trained_mixture(done):
    folder, process = done
    assert process.returncode == 0, process.stdout + process.stderr
    steps = [s["recipe"] for s in json.loads((folder / "tuned/receipt.json").read_text())["steps"]]
    assert steps == ["import", "moh", "copy", "train", "export"]
    config = json.loads((folder / "tuned/config.json").read_text())
    assert all(layer["budget"] == "threshold" for layer in config["attention"])
    assert config["mlp"]["num_experts"] == 4
    calibration = json.loads((folder / "moh/receipt.json").read_text())["steps"][-1]["calibration"]
    assert calibration["path"].endswith("calibration.txt") and calibration["tokens"] > 1000
    lines = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["step"] == 6 and "validation_loss" in lines[-1]
    assert list((folder / "run/tensorboard").glob("events*"))


@pytest.mark.slow
def test_the_table_has_three_models_and_training_helped(done):
    folder, process = done
    rows = json.loads((folder / "evaluation/results.json").read_text())["rows"]
    (bits,) = (row["values"] for row in rows if row["metric"] == "bits_per_byte")
    tuned, converted, dense = bits
    assert tuned < converted  # the toy's weights are random, so its parent knows nothing either
    assert converted != dense
    table = (folder / "evaluation/results.md").read_text()
    assert table.strip() in process.stdout


@pytest.mark.slow
def test_it_ends_with_the_report(done):
    folder, process = done
    page = (folder / "report.html").read_text()
    lines = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    last = [line["loss"] for line in lines if "loss" in line][-1]
    assert f'data-loss="{last}"' in page
    assert 'data-evaluation="evaluation"' in page and "<strong>copy</strong>" in page
    assert "== 8 of 8" in process.stdout


@pytest.mark.slow
def test_nobody_trains_on_what_is_evaluated(done):
    folder, _ = done
    held_out = [p.read_text() for p in (folder / "text/held-out/text").iterdir()]
    trained = "".join(
        p.read_text() for part in ("sources", "documentation")
        for p in (folder / "text" / part).iterdir()
    )  # fmt: skip
    fitted = (folder / "text/calibration.txt").read_text()
    assert not any(text[:500] in fitted for text in held_out)
    assert (folder / "text/sources/abc.py").exists() and len(fitted) > 5000
    assert len(held_out) >= 4 and all(len(text) > 1000 for text in held_out)
    assert not any(text in trained for text in held_out)
    assert (folder / "text/documentation/LOOPING.txt").read_text() in trained  # it would be seen


@pytest.mark.slow
def test_the_second_time_only_shows_the_result(done):
    folder, first = done
    second = demo(folder, folder / "not-needed-any-more.gguf")
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("is there already") == 9
    assert second.stdout.split("== done")[1] == first.stdout.split("== done")[1]


@pytest.mark.slow
@pytest.mark.parametrize("override", ["engine=deepspeed", "parallel.expert=2"])
def test_one_override_trains_it_otherwise_to_the_same_losses(done, tmp_path, override):
    folder, _ = done
    there = shutil.ignore_patterns("run", "tuned", "evaluation", "report.html")
    shutil.copytree(folder, tmp_path / "out", ignore=there)
    process = demo(tmp_path / "out", folder / "not-needed-any-more.gguf", override)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = [
        [json.loads(x) for x in (f / "run/metrics.jsonl").read_text().splitlines()]
        for f in (tmp_path / "out", folder)
    ]
    losses = [[line["loss"] for line in side if "loss" in line] for side in lines]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    key, value = override.split("=")
    config = yaml.safe_load((tmp_path / "out/run/config.yaml").read_text())
    for part in key.split("."):
        config = config[part]
    assert str(config) == value
