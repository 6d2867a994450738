"""TensorBoard's files, read back as TensorBoard does: groups, layers, texts, hyper-parameters."""

import json
import re
import time
from pathlib import Path

import pytest
import toy_run
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from moe.train.board import LAYOUT, flat
from moe.train.loads import StepLoads
from moe.train.metrics import Reporter


def read(out: Path) -> EventAccumulator:
    board = EventAccumulator(str(out / "tensorboard"), {"tensors": 0, "scalars": 0})
    board.Reload()
    return board


def text(board: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    found = board.Tensors(f"{tag}/text_summary")
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in found]


@pytest.fixture(scope="module")
def trained(toys, tmp_path_factory) -> Path:
    """A run of six steps that was started again after four."""
    out = tmp_path_factory.mktemp("board") / "run"
    for steps in (4, 6):
        options = (f"train.steps={steps}", "eval.every=2", "checkpoint.every=2", toys.validation)
        toy_run.run(toys.config(out, *options))
    return out


def test_scalars_are_in_groups_and_each_step_is_there_once(trained):
    board = read(trained)
    scalars = board.Tags()["scalars"]
    groups = {tag.split("/")[0] for tag in scalars}
    assert groups == {"train", "speed", "validation", "heads", "experts", "heads_by_layer",
                      "experts_by_layer"}  # fmt: skip
    every_step = [tag for tag in scalars if not tag.startswith("validation")]
    for tag in every_step:
        assert [event.step for event in board.Scalars(tag)] == [1, 2, 3, 4, 5, 6], tag
    assert [event.step for event in board.Scalars("validation/loss")] == [2, 4, 6]
    assert {tag for tag in scalars if tag.startswith("speed")} == {"speed/tokens_per_second"}


def test_entropies_are_those_of_the_lines_and_of_each_layer(trained):
    board, lines = read(trained), toy_run.metrics(trained)
    for noun, layers in (("heads", (0, 1)), ("experts", (0, 2))):
        for name in ("entropy_share", "load_entropy"):
            mean = [event.value for event in board.Scalars(f"{noun}/{name}")]
            assert mean == pytest.approx([line[f"{noun}/{name}"] for line in lines], rel=1e-5)
            tags = [f"{noun}_by_layer/{name}_{layer:02}" for layer in layers]
            each = [[event.value for event in board.Scalars(tag)] for tag in tags]
            assert [sum(x) / 2 for x in zip(*each, strict=True)] == pytest.approx(mean, abs=1e-4)
            assert each[0] != each[1]


def test_texts_hold_the_configuration_and_the_model_in_words(trained, toys):
    board = read(trained)
    written = text(board, "config")
    assert [step for step, _ in written] == [0, 4], "what a run went on with is there too"
    resolved = yaml.safe_load(written[-1][1].removeprefix("```yaml\n").removesuffix("```"))
    assert resolved == yaml.safe_load((trained / "config.yaml").read_text())
    assert resolved["train"]["steps"] == 6
    words = text(board, "model")[0][1]
    assert "3 shared + 3 routed of 9" in words and "2 of 4 experts" in words
    assert "parameters" in words and str(toys.model) in words


def test_hyper_parameters_are_one_table_of_this_run(trained):
    contents = read(trained).PluginTagToContent("hparams")
    parsed = {tag: HParamsPluginData.FromString(x) for tag, x in contents.items()}
    session = parsed["_hparams_/session_start_info"].session_start_info.hparams
    assert session["optimizer.lr"].number_value == 1e-3
    assert session["engine"].string_value == "native"
    assert session["train.compile"].string_value == "false"
    metrics = [m.name.tag for m in parsed["_hparams_/experiment"].experiment.metric_infos]
    assert set(metrics) <= set(read(trained).Tags()["scalars"])
    assert "_hparams_/session_end_info" in parsed
    assert [p for p in (trained / "tensorboard").iterdir() if p.is_dir()] == []


def test_the_layout_names_scalars_that_are_there(trained):
    board = read(trained)
    (content,) = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(content.tensor_proto.string_val[0])
    assert [c.title for c in layout.category] == list(LAYOUT)
    charts = {chart.title: list(chart.multiline.tag) for c in layout.category for chart in c.chart}
    assert charts["training and validation"] == ["train/loss", "validation/loss"]
    scalars = board.Tags()["scalars"]
    for title, tags in charts.items():
        shown = [tag for tag in scalars if any(re.fullmatch(pattern, tag) for pattern in tags)]
        assert shown or "FLOPs" in title, title


def tags_of(folder: Path) -> list[str]:
    """The tag of every summary in every file, as they were written."""
    found = []
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            found += [value.tag for value in event.summary.value]
    return found


def test_starting_again_purges_what_comes_again_and_repeats_nothing(tmp_path):
    for first, last in ((0, 5), (3, 6), (3, 6)):
        reporter = Reporter(tmp_path, "seed: 1\n", first, 6)
        for step in range(first + 1, last + 1):
            line = {"step": step, "loss": first + step / 8, "grad_norm": 1.0, "lr": 1.0}
            reporter.report({**line, "tokens_per_second": 1.0}, StepLoads({}, 1))
        reporter.close()
        time.sleep(1.0)  # files are read in the order of the second that their names hold
    events = read(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [
        (1, 0.125), (2, 0.25), (3, 0.375), (4, 3.5), (5, 3.625), (6, 3.75),
    ]  # fmt: skip
    written = tags_of(tmp_path / "tensorboard")
    assert written.count("train/loss") == 5 + 3 + 3, "the control: files hold what was purged"
    for tag in ("_hparams_/experiment", "_hparams_/session_start_info", "custom_scalars__config__"):
        assert written.count(tag) == 1, tag
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("started", s) for s in (0, 3, 3)]


def test_every_value_of_a_configuration_becomes_one_of_the_table():
    assert flat({"a": {"b": None, "c": [1, {"d": 2}]}, "e": True, "f": 0.5, "g": "x"}) == {
        "a.b": "null", "a.c": '[1, {"d": 2}]', "e": "true", "f": 0.5, "g": "x",
    }  # fmt: skip
