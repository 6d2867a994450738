"""What a run reports can be read by eyes, programs and TensorBoard; the command ends rightly."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import toy_run
import yaml
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.errors import UserError
from moe.model import RoutingLoad
from moe.train.events import lines_until
from moe.train.loads import LoadMeter, StepLoads
from moe.train.metrics import Reporter

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second"}
PARTS = ("heads", "experts")


@pytest.fixture(scope="module")
def reported(toys, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that drew its pictures, and what it printed."""
    out = tmp_path_factory.mktemp("reported") / "run"
    options = ("train.steps=12", "train.log_every=5", toys.validation, "eval.every=6")
    return out, toy_run.run(toys.config(out, *options), pictures=True)


def test_each_logged_step_is_one_json_object(reported) -> None:
    out, _ = reported
    lines = toy_run.metrics(out)
    assert [line["step"] for line in lines] == [5, 10, 12], "every five, and the last"
    for line in lines:
        assert line.keys() >= KEYS
        assert line["tokens"] == line["step"] * 8 * toy_run.SEQUENCE
        assert line["tokens_per_second"] > 0
        assert line["mfu"] is None, "no peak is known of a CPU"
        for noun in PARTS:
            assert line[f"{noun}/max_over_mean"] >= 1
            assert 0 <= line[f"{noun}/dead_share"] < 1
            assert 0 < line[f"{noun}/entropy_share"] <= 1
        assert all(math.isfinite(v) for v in line.values() if v is not None)
    assert (out / "config.yaml").read_text().startswith("model: ")


def columns(line: str) -> list[int]:
    """Where the names of a log line's columns stand."""
    return [m.start() for m in re.finditer(r"[a-z/]+(?= )", line.partition("left")[0])]


def test_log_lines_are_aligned(reported) -> None:
    _, printed = reported
    lines = [line for line in printed.splitlines() if "grad" in line]
    assert len(lines) == 3
    assert len({tuple(columns(line)) for line in lines}) == 1
    assert len({line.index("left") for line in lines}) == 1
    for word in ("step", "loss", "grad", "lr", "tok/s", "heads bal", "experts bal", "dead"):
        assert word in lines[0]
    moved = lines[0].replace("loss", " loss")
    assert columns(moved) != columns(lines[0]), "the check must see a shifted column"
    assert [v for v in printed.splitlines() if re.match(r"step +\d+  validation loss \d", v)]


def test_tensorboard_has_scalars_histograms_and_pictures(reported) -> None:
    out, _ = reported
    board = EventAccumulator(str(out / "tensorboard"), {"histograms": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    lines = toy_run.metrics(out)
    losses = {event.step: event.value for event in board.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)
    assert [event.step for event in board.Scalars("validation/loss")] == [6, 12]
    layers = {"heads/layer_00", "heads/layer_01", "experts/layer_00", "experts/layer_02"}
    assert set(tags["histograms"]) == layers
    for tag in layers:
        events = board.Histograms(tag)
        assert [event.step for event in events] == [5, 10, 12]
        units = {"heads/layer_00": 6, "heads/layer_01": 6, "experts/layer_00": 3}.get(tag, 4)
        chosen = {"heads/layer_00": 3, "heads/layer_01": 3, "experts/layer_00": 1}.get(tag, 2)
        assert len(events[0].histogram_value.bucket) == units
        assert sum(events[0].histogram_value.bucket) == chosen * 8 * toy_run.SEQUENCE
    for noun in PARTS:
        pictures = board.Images(f"{noun}/load")
        assert [picture.step for picture in pictures] == [5, 12], "no time for one in between"
        pixels = image.imread(io.BytesIO(pictures[0].encoded_image_string), format="png")
        assert pixels.shape[:2] == (pictures[0].height, pictures[0].width)
        assert pixels.std() > 0.01, "a picture of something"
    assert "sequence_length" in str(board.Tensors("config/text_summary")[0].tensor_proto)


def test_a_full_disk_is_said_in_a_line(tmp_path) -> None:
    reporter = Reporter(tmp_path, "", 0, 100)
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with (
        mock.patch.object(reporter._board, "add_scalar", full),
        pytest.raises(UserError, match=r"metrics\.jsonl or .*: No space left on device\. Start"),
    ):
        reporter.validation(1, 0.5)
    reporter.validation(2, 0.5)  # the control
    with mock.patch.object(reporter._board, "close", full):
        reporter.close()


def metrics_at(step: int) -> dict:
    return {"step": step, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0}


def seconds_left(reporter: Reporter, step: int, elapsed: float) -> float:
    reporter._begin -= elapsed
    return float(re.search(r"left (.*) s", reporter.line(metrics_at(step)))[1])


@pytest.mark.parametrize(
    ("first", "step", "left"), [(0, 10, 18.0), (0, 50, 2.0), (40, 50, 10.0), (40, 90, 0.4)]
)
def test_time_left_goes_by_the_steps_of_this_run(tmp_path, first, step, left) -> None:
    reporter = Reporter(tmp_path, "", first, 100)
    assert seconds_left(reporter, step, elapsed=2.0) == pytest.approx(left, rel=0.1, abs=0.1)
    reporter.close()


def test_an_interrupted_run_leaves_one_line_a_step(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 0.5}) + "\n" for s in (1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    assert lines_until(path, 9) == lines, "a line cut short by a kill is none"
    reporter = Reporter(tmp_path, "", 2, 6)
    reporter.report({**metrics_at(3), "tokens": 7}, StepLoads({}, 1))
    reporter.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert [line["loss"] for line in toy_run.metrics(tmp_path)] == [0.5, 0.5, 1.0]
    Reporter(tmp_path, "", 0, 6).close()
    assert path.read_text() == ""


def load(counts: list[float], tokens: float, balance: float) -> RoutingLoad:
    entropy = torch.tensor(math.log(len(counts)) * tokens)
    half = torch.tensor(counts) / 2
    scalars = map(torch.tensor, (tokens, balance, 2 * balance))
    return RoutingLoad(torch.tensor(counts), half, entropy, *scalars)


def test_loads_of_micro_batches_add_up_weighed_by_their_tokens(toys) -> None:
    from moe.model import LayerRouting, RoutedLlamaConfig

    config = RoutedLlamaConfig(num_hidden_layers=1, num_attention_heads=4)
    meter = LoadMeter(config)
    meter.add([LayerRouting(None, load([3.0, 0.0, 1.0], 4.0, 1.0))])
    meter.add([LayerRouting(None, load([6.0, 0.0, 2.0], 8.0, 4.0))])
    total = meter.total(lambda flat: 2 * flat)  # a second rank with the same
    found = total.routers[0, "mlp"]
    assert found.counts.tolist() == [18, 0, 6]
    assert found.probability.tolist() == [9, 0, 3]
    assert found.tokens == 24
    assert float(found.balance) == pytest.approx((4 * 1 + 8 * 4) / 12)
    assert float(found.balance) != pytest.approx((1 + 4) / 2), "the mean of means is another"
    assert float(found.z) == pytest.approx(2 * float(found.balance))
    summary = total.summary()
    assert summary["experts/max_over_mean"] == pytest.approx(18 / 8)
    assert summary["experts/dead_share"] == pytest.approx(1 / 3)
    assert summary["experts/per_token"] == pytest.approx(1.0)
    assert summary["experts/entropy_share"] == pytest.approx(1.0)
    assert not any(key.startswith("heads") for key in summary)
    assert torch.equal(total.reference()[0].mlp, torch.tensor([0.75, 0, 0.25]))
    assert meter.total(lambda flat: flat).routers == {}, "the next step begins with nothing"


def python(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_command_trains_with_overrides_and_ends_with_its_exit_code(toys, tmp_path) -> None:
    file = toys.write(tmp_path / "run")
    command = ("-m", "moe.cli", "train", file)
    done = python(*command, "train.steps=2", "optimizer.lr=1e-4", toys.validation)
    assert (done.returncode, done.stderr) == (0, "")
    assert "on 1 rank(s) of cpu, float32: steps 0 to 2" in done.stdout
    assert toy_run.metrics(tmp_path / "run")[0]["lr"] < 1e-4
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["train"]["steps"], written["optimizer"]["lr"]) == (2, 1e-4)
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json").is_file()
    again = python(*command, "train.stepz=3", "optimizer.lr=0")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"error: {file}: 2 problem(s)\n  ")
    assert "Did you mean `steps`?" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks(toys, tmp_path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    file = toys.write(tmp_path / "run")
    done = python(*torchrun, "-m", "moe.train", file, "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 rank(s) of cpu") == 1, "rank 0 alone speaks"
    pieces = sorted(p.name for p in (tmp_path / "run/checkpoints/step-2").glob("rank-*"))
    assert pieces == ["rank-00000.safetensors", "rank-00001.safetensors"]
    toy_run.run(toys.config(tmp_path / "alone", "train.steps=2"))
    for name in ("loss", "grad_norm"):
        alone, two = (
            toy_run.column(toy_run.metrics(tmp_path / out), name) for out in ("alone", "run")
        )
        assert torch.allclose(two, alone, rtol=1e-5)


def test_json_of_a_run_that_diverged_has_null_and_says_why(tmp_path):
    """There is no NaN in JSON; the numbers of others are as they were."""
    reporter = Reporter(tmp_path, "{}", 0, 9)
    reporter.validation(1, math.nan)
    reporter.validation(2, 4.5)
    reporter.evaluation(2, {"t/acc": {"value": None, "error": None, "why": "nan"}})
    reporter.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert found[:2] == [
        {"step": 1, "validation_loss": None, "why": "nan"},
        {"step": 2, "validation_loss": 4.5},
    ]
    with pytest.raises(ValueError, match="JSON"):  # negative control: what is not caught before
        json.dumps(math.nan, allow_nan=False)
