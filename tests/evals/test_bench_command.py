"""`moe bench`: what is counted by hand, who the parent is, points that memory does not allow."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from invoke import moe
from PIL import Image

from moe.errors import UserError
from moe.evals import bench
from moe.evals.command import ANSWERS
from moe.model.accounting import cache_bytes, flops_per_token, parameter_counts

BAM = {"kind": "bam", "num_experts": 2}
UOE = {"kind": "uoe", "num_experts": 3, "top_k": 2}
LENGTH = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A dense folder, an MoH made from it, and a mixture made from that one."""
    folder = tmp_path_factory.mktemp("bench")
    tiny.dense_model("llama", max_position_embeddings=64).save_pretrained(folder / "dense")
    tiny.tokenizer().save_pretrained(folder / "dense")
    moh = ("moh", "--source", folder / "dense", "--shared-heads", 4, "--top-k", 3)
    copy = ("copy", "--source", folder / "moh", "--num-experts", 4, "--top-k", 2)
    for arguments, name in ((moh, "moh"), (copy, "mixture")):
        made = moe("upcycle", *arguments, "--no-verify", "--out", folder / name)
        assert made.code == 0, made.err
    return folder


def model(attention: Any = None, family: str = "llama") -> Any:
    dense = tiny.dense_model(family)
    return dense if attention is None else tiny.routed_model(dense, attention)


@pytest.mark.parametrize(
    ("attention", "family", "heads"),
    [
        (None, "llama", 3),
        (tiny.MOH, "llama", 3),  # every key and value is computed and kept
        (BAM, "llama", 6),
        (BAM | {"kv": "shared"}, "llama", 3),
        (None, "qwen3", 3),
    ],
)
def test_a_caches_bytes_are_counted_and_computed_alike(attention, family, heads):
    subject = model(attention, family)
    measured = bench.measure(subject, 2, LENGTH, 1, memory=True)["cache_bytes_per_token"]
    by_hand = 2 * heads * subject.config.head_dim * 4 * 3  # keys and values, float32, layers
    config = bench.known(subject.config)
    assert measured == by_hand == cache_bytes(config, LENGTH, 4) / LENGTH
    half = bench.measure(subject.bfloat16(), 1, 8, 1, memory=True)["cache_bytes_per_token"]
    assert half == by_hand / 2


def test_a_cache_that_slides_or_that_tokens_choose():
    """A window keeps what it reaches; a union's experts keep their own tokens, padded to a row."""
    mistral = model(family="mistral")
    measured = bench.measure(mistral, 2, LENGTH, 1, memory=True)["cache_bytes_per_token"] * LENGTH
    config = bench.known(mistral.config)
    assert measured == cache_bytes(config, LENGTH, 4) == 2 * 6 * 3 * 8 * 4 * 3
    union = model(UOE)
    per_token = bench.measure(union, 1, LENGTH, 1, memory=True)["cache_bytes_per_token"]
    dense = cache_bytes(bench.known(model().config), LENGTH, 4) / LENGTH
    computed = cache_bytes(bench.known(union.config), LENGTH, 4) / LENGTH
    assert computed == pytest.approx(dense * (1 + (LENGTH - 1) * 2 / 3) / LENGTH)  # one sink
    assert per_token == pytest.approx(computed)  # one sequence: no padding
    padded = bench.measure(union, 4, LENGTH, 1, memory=True)["cache_bytes_per_token"]
    assert per_token < padded <= dense


def test_speeds_are_of_the_clock(monkeypatch):
    """2 s until the first token, then 4 s for the others, of 3 sequences."""
    ticks = iter([10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    found = bench.measure(model(), 3, LENGTH, 8)
    assert found == {
        "time_to_first_token": 2.0,
        "prefill_tokens_per_second": 3 * LENGTH / 2,
        "decode_tokens_per_second": 3 * 8 / 4,
    }


def test_what_is_written_is_what_the_model_generates(monkeypatch):
    """The timed steps are real ones: their tokens are generate's own."""
    subject = model(tiny.MOH)
    seen: list[torch.Tensor] = []
    step = bench._step

    def watch(*given: Any) -> Any:
        cache, token = step(*given)
        seen.append(token)
        return cache, token

    monkeypatch.setattr(bench, "_step", watch)
    bench.measure(subject, 2, LENGTH, 5)
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    made = subject.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(seen, 1), made[:, LENGTH:])


def test_models_take_turns_and_ratios_are_of_a_round(monkeypatch):
    order: list[int] = []
    drift = iter([1.0, 1.0, 1.0, 2.0, 8.0, 16.0, 3.0, 7.5])  # the machine slows down at random

    def measure(subject: Any, batch: int, length: int, new: int, memory: bool) -> Any:
        order.append(models.index(subject))
        speed = next(drift)
        extra = {"peak_memory_bytes": 1.0, "cache_bytes_per_token": 1.0} if memory else {}
        return dict.fromkeys(bench.SPEEDS, speed) | extra

    models = [model(), model()]
    monkeypatch.setattr(bench, "measure", measure)
    point = bench._point(models, 1, 8, bench.Grid(repeats=3))
    assert order == [0, 1] * 4
    assert point["ratios"][0]["decode_tokens_per_second"] == [0.5, 0.4, 0.5]
    assert [m["decode_tokens_per_second"] for m in point["models"]] == [3.0, 7.5]


def test_peak_memory_sees_what_is_gone_again():
    with bench.peak_memory(torch.device("cpu")) as peak:
        torch.ones(16_000_000)
    assert 60e6 < peak[0] < 120e6
    with bench.peak_memory(torch.device("cpu")) as nothing:
        torch.ones(10)
    assert nothing[0] < 20e6  # negative control: the mark was put back


@pytest.mark.slow
def test_the_command_beside_the_receipts_parent(root, tmp_path):
    out = tmp_path / "out"
    options = ("--batch", "2,1", "--length", "16,8", "--new-tokens", 3, "--repeats", 2)
    result = moe("bench", root / "mixture", *options, "--out", out)
    assert result.code == 0, result.err
    report = json.loads((out / "bench.json").read_text())
    mixture, dense = report["models"]
    assert (mixture["name"], dense["name"]) == ("mixture", "dense")  # not moh, its own source
    ours = bench.known(bench.read_config(root / "mixture"))
    assert mixture["active_parameters"] == parameter_counts(ours).active
    assert [(p["length"], p["batch"]) for p in report["points"]] == [
        (16, 2),
        (16, 1),
        (8, 2),
        (8, 1),
    ]
    for point in report["points"]:
        first, second = point["models"]
        assert first["forward_flops_per_token"] == flops_per_token(ours, point["length"]) / 3
        assert first["cache_bytes_per_token"] == second["cache_bytes_per_token"] == 576
        middle, low, high = point["ratios"][0]["prefill_tokens_per_second"]
        assert 0 < low <= middle <= high
    with Image.open(out / "bench.png") as picture:
        assert picture.size == (1440, 1120) and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert "| mixture / dense |" in result.out and "bench.png" in result.out
    again = ("--against", root / "moh", "--out", tmp_path / "again", "--json")
    printed = moe("bench", root / "mixture", *options[:4], *options[4:], *again)
    report = json.loads(printed.out)
    assert report["models"][1]["name"] == "moh" and "not dense" in report["notes"][0]
    assert "forward MFLOPs/token" in result.out and "note:" not in result.out


def test_a_model_that_is_no_parent_is_named_as_such(root, tmp_path):
    """By what it holds: a copy of the parent is one, other weights of its shape are not."""
    moved = Path(shutil.copytree(root / "dense", tmp_path / "moved"))
    assert bench.caution(root / "mixture", moved) == []
    other = tiny.dense_model("llama", seed=9, max_position_embeddings=64)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(root / "dense" / "config.json", tmp_path / "other")
    (note,) = bench.caution(root / "mixture", tmp_path / "other")
    assert "is not what" in note and "names none like it" in note
    itself = bench.caution(root / "mixture", root / "mixture")
    assert len(itself) == 2 and "is not dense" in itself[1]


def test_the_parent_is_the_dense_folder_that_still_is_what_it_was(root, tmp_path):
    assert bench.find_parent(root / "mixture") == root / "dense"
    assert bench.find_parent(root / "moh") == root / "dense"
    assert bench.find_parent(root / "dense") is None
    config = root / "dense" / "config.json"
    sound = config.read_text()
    for change in (lambda: config.write_text(sound + "\n"), config.unlink):
        change()
        try:
            result = moe("bench", root / "mixture", "--out", tmp_path / "out")
        finally:
            config.write_text(sound)
        assert result.code == 2 and "Name one with --against" in result.err
        assert str(root / "dense") in result.err and not (tmp_path / "out").exists()
    bare = Path(shutil.copytree(root / "moh", tmp_path / "bare"))
    (bare / "receipt.json").unlink()
    with pytest.raises(UserError, match="it has no receipt"):
        bench.find_parent(bare)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("--length", "8,40,33"), ("length=40 and 32 new tokens", "length=33", "has 64 positions")),
        (("--length", "8", "--new-tokens", 60), ("Use 4 or less",)),
        (("--length", "0", "--batch", "1,x"), ("--length '0'", "--batch '1,x'")),
        (("--against", "no/such"), ("no/such is not a folder",)),
        (("--repeats", 0), ("--repeats",)),
    ],
)
def test_impossible_requests_are_refused(arguments, messages, root, tmp_path):
    result = moe("bench", root / "mixture", *arguments, "--out", tmp_path / "out")
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert all(message in result.err for message in messages), result.err


def test_an_evaluation_that_was_begun_is_in_the_way(root, tmp_path):
    (tmp_path / "out" / ANSWERS).mkdir(parents=True)  # `moe eval` would go on there
    result = moe("bench", root / "mixture", "--out", tmp_path / "out")
    assert result.code == 2 and "exists. Choose another --out" in result.err


def test_what_looks_ahead_is_a_points_result(root):
    ahead = {"kind": "uoe", "num_experts": 4, "top_k": 2, "mode": "expert_choice"}
    subject = tiny.routed_model(tiny.dense_model("llama"), None, ahead)
    point = bench._point([subject, model()], 1, 8, bench.Grid(repeats=1, new_tokens=2))
    assert "expert_choice" in point["models"][0]["error"]
    assert "decode_tokens_per_second" in point["models"][1] and point["ratios"] == [None]


def test_a_fault_of_ours_is_not_a_points_result(monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(bench, "measure", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        bench._point([model()], 1, 8, bench.Grid())


SHORT = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import tiny
from moe.evals import bench
subject = tiny.dense_model("llama")
grid = bench.Grid(repeats=1, new_tokens=2)
bench.measure(subject, 1, 8, 2)
limit = bench._status("VmSize") + 150_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
points = [bench._point([subject], batch, 256, grid) for batch in (1, 4000, 2)]
print(json.dumps([point["models"][0] for point in points]))
"""


@pytest.mark.slow
def test_a_point_without_the_memory_is_that_points_result():
    """Really without: the process may not grow beyond what one point of three needs."""
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SHORT, tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(done.stdout)
    assert second == {"error": "out of memory"}
    assert first["prefill_tokens_per_second"] > 0 and third["prefill_tokens_per_second"] > 0
