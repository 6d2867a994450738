"""`make gpu` at toy sizes in Triton's interpreter: every section runs and leaves its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("correctness", "routing", "kernels", "heads", "layer")


def bench(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "bench/gpu.py", *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_every_section_runs_and_is_not_run_again(tmp_path):
    process = bench("--toy", "--results", tmp_path)
    assert process.returncode == 0, process.stderr
    found = {s: json.loads((tmp_path / f"gpu_{s}.json").read_text()) for s in SECTIONS}
    assert all(goal["met"] for goal in found["correctness"]["goals"])
    states = {row["side"]: row["state"] for row in found["layer"]["rows"]}
    assert states["ours"] == states["transformers grouped_mm"] == "ran"
    assert states["MegaBlocks"] == "ModuleNotFoundError"
    assert any("MegaBlocks" in note for note in found["layer"]["notes"])
    minimum = (64 + 2 * 2 * 32) * 4  # x and h
    (kept,) = (r["kept B/token"] for r in found["layer"]["rows"] if r["side"] == "ours")
    assert minimum <= kept < 1.05 * minimum
    again = bench("--toy", "--results", tmp_path)
    assert again.stdout.count("is there already") == len(SECTIONS)
    once_more = bench("--toy", "--results", tmp_path, "--only", "routing")
    assert "routing took" in once_more.stdout and "layer took" not in once_more.stdout


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path):
    """What the same code found of a shape is not measured again; a late side is given up."""
    code = (
        "import gpu, gpu_layer, torch, pathlib\n"
        f"place = pathlib.Path({str(tmp_path / 'p')!r})\n"
        "bench = gpu.Bench(torch.device('cpu'), True, place, 'now')\n"
        "import json\n"
        "rows = [{'shape': 'toy: kept', 'side': 'ours', 'ms': 3.0}]\n"
        "known = {str(bench.shapes[0]): [rows, ['a note']]}\n"
        "for text in (json.dumps(['now', known]), json.dumps(['then', known]), '['):\n"
        "    bench.partial.write_text(text)\n"
        "    print(gpu_layer.taken_up(bench) == known)\n"
        "bench.partial.write_text(json.dumps(['now', known]))\n"
        "_, found, _, notes = gpu_layer.layer(bench)\n"
        "print(found == rows, notes, bench.partial.exists())\n"
        "import time\n"
        "with gpu_layer.limited(0.1):\n    time.sleep(5)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "bench",
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split("\n")[:4] == ["True", "False", "False", "True ['a note'] False"]
    assert "TimeoutError: took longer than 0.1 s" in process.stderr


def test_what_makes_no_sense_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for options, message in (
        (("--toy",), "name a folder of its own"),
        (("--toy", "--results", tmp_path, "--peers", tmp_path / "no"), "is no folder"),
        (("--toy", "--results", tmp_path / "file"), "is no folder"),
    ):
        process = bench(*options)
        assert process.returncode == 1 and message in process.stderr


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_not_timed(tmp_path):
    """Negative control: a ScatterMoE whose output is twice what it should be."""
    (tmp_path / "peers/scattermoe/scattermoe").mkdir(parents=True)
    (tmp_path / "peers/scattermoe/COMMIT").write_text("0ddba11")
    (tmp_path / "peers/scattermoe/scattermoe/__init__.py").touch()
    (tmp_path / "peers/scattermoe/scattermoe/mlp.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class GLUMLP(nn.Module):\n"
        "    def __init__(self, hidden, inner, experts, k):\n"
        "        super().__init__()\n"
        "        self.experts, self.output_experts = nn.Module(), nn.Module()\n"
        "        self.experts.weight = nn.Parameter(torch.zeros(experts, 2 * inner, hidden))\n"
        "        self.output_experts.weight = nn.Parameter(torch.zeros(experts, hidden, inner))\n"
        "    def forward(self, x, weights, indices):\n"
        "        parts = [w.sum() for w in (self.experts.weight, self.output_experts.weight)]\n"
        "        return x * (weights.sum() + sum(parts))\n"
    )
    process = bench(
        "--toy", "--only", "layer", "--results", tmp_path, "--peers", tmp_path / "peers"
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "gpu_layer.json").read_text())
    (row,) = (r for r in found["rows"] if r["side"] == "ScatterMoE")
    assert row["state"] == "ValueError" and row["ms"] == 0
    assert any("computes something else" in note for note in found["notes"])
    assert "scattermoe at 0ddba11" in found["notes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    process = bench()
    assert process.returncode == 1 and "needs a CUDA device" in process.stderr
