"""launch/bam.sh itself, all three phases, from a toy seed and two toy domains."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from moe.config import load as load_config
from moe.hf.inspect import inspect

ROOT = Path(__file__).resolve().parents[1]
TOY = ["train.steps=30", "train.global_batch_size=8", "train.dtype=float32", "optimizer.lr=1e-2",
       "data.sequence_length=32", "schedule.warmup_steps=2", "checkpoint.every=30"]  # fmt: skip
LETTERS = {"vowels": "aeiou", "digits": "01234", "general": "aeiou01234"}


def launch(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    places = "--seed", folder / "seed", "--text", folder / "text", "--out", folder / "out"
    return subprocess.run(
        [ROOT / "launch/bam.sh", *places, *more, *TOY],
        env={**os.environ, "BIN": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bam")
    tiny.dense_model("llama").save_pretrained(folder / "seed")
    tiny.tokenizer().save_pretrained(folder / "seed")
    chance = random.Random(0)
    for domain, letters in LETTERS.items():
        for part, size in (("train", 8000), ("held-out", 1000)):
            path = folder / "text" / domain / part / "a.txt"
            path.parent.mkdir(parents=True)
            path.write_text("".join(chance.choices(letters, k=size)))
    return folder / "out", launch(folder)


@pytest.mark.slow
def test_branches_know_their_domain_and_mixtures_know_all(done):
    out, process = done
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((out / "evaluation/results.json").read_text())["rows"]
    found = {
        row["task"].removeprefix("local_perplexity_"): row["values"]
        for row in rows
        if "bits" in row["metric"]
    }
    assert set(found) >= set(LETTERS)
    cheap = "bam-same-compute", "bam-shared-same-compute"
    order = "bam", "bam-shared", *cheap, "btx", "branch-digits", "branch-vowels", "seed"
    bits = {d: dict(zip(order, found[d], strict=True)) for d in LETTERS}
    assert bits["digits"]["branch-digits"] < bits["digits"]["branch-vowels"]
    assert bits["vowels"]["branch-vowels"] < bits["vowels"]["branch-digits"]
    for domain in LETTERS:
        for mixture in ("bam", "bam-shared", "btx", *cheap):
            assert bits[domain][mixture] < bits[domain]["seed"]


@pytest.mark.slow
def test_the_same_compute_is_fewer_steps(done):
    out, process = done
    flops = {n: inspect(out / n)["flops_per_token"] for n in ("btx", "bam", "bam-shared")}
    for name in ("bam", "bam-shared"):
        steps = load_config(out / f"runs/{name}-same-compute/config.yaml").train.steps
        assert steps == 30 * flops["btx"] // flops[name] < 30
        assert f"{flops[name] / 1e6:.0f} MFLOPs" in process.stdout


@pytest.mark.slow
def test_the_mixtures_have_the_branches_and_the_seed_as_experts(done):
    out, _ = done
    config = json.loads((out / "bam-shared/config.json").read_text())
    assert config["attention"]["kind"] == "bam" and config["attention"]["num_experts"] == 3
    assert config["attention"]["kv"] == "shared" and config["mlp"]["num_experts"] == 3
    assert json.loads((out / "btx/config.json").read_text())["mlp"]["num_experts"] == 3
    first = json.loads((out / "bam-0/receipt.json").read_text())["steps"][-1]
    sources = [Path(source["path"]).name for source in first["sources"]]
    assert sources == ["branch-digits", "branch-vowels", "seed"]


@pytest.mark.slow
def test_the_second_time_only_shows_the_result(done):
    out, first = done
    second = launch(out.parent)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "$ moe train" not in second.stdout
    assert (out / "evaluation/results.md").read_text() in second.stdout
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--general", "news"], "name the seed's domain with --general"), (["--sead", "x"], "--seed")],
)
def test_what_cannot_run_is_refused_before_anything_is_made(arguments, message, tmp_path):
    (tmp_path / "text/general/train").mkdir(parents=True)
    process = launch(tmp_path, *arguments)
    assert process.returncode == 2
    assert message in process.stdout + process.stderr
    assert not (tmp_path / "out").exists()
