"""`moe report`: what it takes and refuses, and that its page holds the numbers of the files."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from invoke import moe
from jinja2 import Environment
from report_folders import (
    loads,
    row,
    score,
    step,
    validation,
    write_lines,
    write_model,
    write_results,
    write_run,
)

from moe.evals.report.inputs import SPEEDS, Run, read_run

LEVELS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)]
BOMB = "a0: &a0 [x]\n" + "".join(LEVELS)  # 9 to the eleventh values
EVIL = "<img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Every element's name and attributes, and the text of each `pre`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found[-1:] and self.found[-1][0] == "pre":
            self.texts.append(data)

    def all(self, name: str) -> list[str]:
        """Values of an attribute, in the order of the page."""
        return [a[name] or "" for _, a in self.found if name in a]


def report(out: Path, *folders: object) -> Elements:
    result = moe("report", *folders, "--out", out)
    assert result.code == 0, result.err
    return Elements(out.read_text())


@pytest.fixture
def run(tmp_path) -> Path:
    lines = [step(1, 4.5), step(2, 4.25), validation(2, 4.125), step(3, 3.75), validation(3, 4.5)]
    return write_run(tmp_path / "a", lines)


def test_the_verdict_is_the_files_numbers(run, tmp_path):
    events = [{"step": 0, "event": "started"}, {"step": 2, "event": "preempted"},
              {"step": 2, "event": "started"}]  # fmt: skip
    write_lines(run / "events.jsonl", events)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "skipped": "loss is nan", "samples": [1]}) + "\n")
    page = report(tmp_path / "r.html", run)
    assert page.all("data-loss") == ["3.75", "4.5", "4.25", "3.75"], "the last, and each step's"
    assert page.all("data-validation") == ["4.5", "", "4.125", "4.5"]
    assert page.all("data-lowest") == ["4.125"]
    assert page.all("data-tokens")[0] == "768"
    assert page.all("data-speed")[0] == "1000.0"
    for name, value in (("starts", "2"), ("preemptions", "1"), ("skipped", "1")):
        assert page.all(f"data-{name}") == [value], name
    assert "loss is nan" in (tmp_path / "r.html").read_text()
    assert {"losses", "rates"} <= set(page.all("data-figure"))
    assert page.all("data-best") == [""], "there is no checkpoint"


def test_runs_evaluations_and_models_are_recognised_by_what_they_hold(run, tmp_path):
    model = write_model(tmp_path / "model", {"kind": "moe", "num_experts": 4, "top_k": 2})
    dense = write_model(tmp_path / "dense")
    rows = [row("easy", [0.75, 0.5], 0.0625, 1e-11), row("hard", [0.5, 0.4375], 0.0625, 0.04),
            row("few", [1.0, 0.0], 0.0625)]  # fmt: skip
    results = write_results(tmp_path / "eval", rows, [model, dense])
    page = report(tmp_path / "r.html", run, results, model)
    assert page.all("data-evaluation") == ["eval"]
    assert page.all("data-value")[:4] == ["0.75", "0.5", "0.5", "0.4375"]
    assert page.all("data-difference") == ["0.25", "0.0625", "1.0"]
    p, adjusted = (list(map(float, page.all(f"data-{name}"))) for name in ("p", "holm"))
    assert p == [1e-11, 0.04] and adjusted == pytest.approx([2e-11, 0.04])
    said = (tmp_path / "r.html").read_text()
    assert "too few items (3)" in said and "over all 2 comparison(s)" in said
    assert page.all("data-models") == ["2"], "two models: the page says so"
    assert len(page.all("data-mflops")) == 6 + 2, "of each point and each model"
    assert {"quality", "evaluation-0-0"} <= set(page.all("data-figure"))
    mixture, plain = (float(x) for x in page.all("data-mflops")[-2:])
    assert mixture > plain > 0


def test_intervals_and_sizes_are_those_of_the_results(tmp_path):
    """An interval that is named stands before the error's; a model that is gone has its sizes."""
    rows = [row("easy", [0.75, 0.5], 0.0625), row("hard", [0.5, 0.25], None)]
    rows[0]["intervals"] = [[0.6875, 0.875], None]
    results = write_results(tmp_path / "eval", rows, ["gone", "lost"])
    found = json.loads((results / "results.json").read_text())
    sizes = {"total_parameters": 4000, "active_parameters": 1000, "flops_per_token": 7.5e6}
    found["models"][0] |= sizes
    (results / "results.json").write_text(json.dumps(found))
    page = report(tmp_path / "r.html", results)
    lows, highs = (list(map(float, page.all(f"data-{name}"))) for name in ("low", "high"))
    assert lows[0] == 0.6875 and highs[0] == 0.875
    assert lows[1:] == pytest.approx([0.5 - 1.959964 * 0.0625])
    assert highs[1:] == pytest.approx([0.5 + 1.959964 * 0.0625])
    assert page.all("data-mflops") == ["7.5"] * 3, "two points and a model"
    assert page.all("data-active") == ["1000"] * 3
    said = (tmp_path / "r.html").read_text()
    assert "lost is not here" in said and "gone is not here" not in said
    for wrong in (
        {"total_parameters": "many"},
        {"flops_per_token": 0},
        {"active_parameters": 1e999},
    ):
        found["models"][0] |= sizes | wrong
        (results / "results.json").write_text(json.dumps(found))
        assert moe("report", results, "--out", tmp_path / "none.html").code == 3
    found["models"][0] |= sizes
    for wrong in ([0.5], [0.9, 0.1], ["a", "b"], 3):
        found["rows"][0]["intervals"] = [wrong, None]
        (results / "results.json").write_text(json.dumps(found))
        assert moe("report", results, "--out", tmp_path / "none.html").code == 3


def test_evaluation_during_training_is_drawn_and_counts_as_quality(tmp_path):
    model = write_model(tmp_path / "model")
    lines = [step(1, 4.0), score(1, piqa__acc=(0.5, 0.02)), step(2, 3.0),
             score(2, piqa__acc=(0.75, 0.02), text__bits_per_byte=(1.25, None))]  # fmt: skip
    lines[-1]["evaluation"]["piqa/acc"]["interval"] = [0.5, 0.875]
    run = write_run(tmp_path / "a", lines, model=str(model))
    known = read_run(run, "a").scores
    assert known["piqa/acc"][0][2] == pytest.approx((0.5 - 0.0392, 0.5 + 0.0392), abs=1e-4)
    assert known["piqa/acc"][1][2] == (0.5, 0.875) and known["text/bits_per_byte"][0][2] is None
    page = report(tmp_path / "r.html", run)
    assert {"scores", "quality"} <= set(page.all("data-figure"))
    assert page.all("data-value") == ["3.0", "0.75", "1.25"]


def test_means_of_a_suite_stand_beside_its_tasks_once(tmp_path):
    """Averages and entries of several tasks; an entry that is one task's row is there already."""
    results = write_results(tmp_path / "eval", [row("easy", [0.75, 0.5], 0.1, 0.01)], ["x", "y"])
    found = json.loads((results / "results.json").read_text())
    entry = {**row("", [75.0, 50.0], 1.0, 0.02), "name": "all", "tasks": 2}
    del entry["task"]
    found["suite"] = {"percent": True, "rows": [{**entry, "name": "easy", "tasks": 1}, entry]}
    (results / "results.json").write_text(json.dumps(found))
    page = report(tmp_path / "r.html", results)
    assert page.all("data-task") == ["easy", "all"] and page.all("data-metric")[-1] == "acc (%)"
    assert page.all("data-holm") == ["0.02", "0.02"]


def test_a_run_that_diverged_is_reported(tmp_path):
    """Null, as it is written, and NaN, as it was: gaps, never the best, and no bare NaN."""
    lines = [
        step(1, 4.5),
        {"step": 1, "validation_loss": None, "why": "nan"},
        step(2, 4.0),
        validation(2, 4.25),
        validation(3, float("nan")),
        {"step": 1, "evaluation": {"t/bits": {"value": 2.5, "error": None}}},
        {"step": 3, "evaluation": {"t/bits": {"value": None, "error": None, "why": "inf"}}},
    ]
    run = write_run(tmp_path / "a", lines, model=str(write_model(tmp_path / "model")))
    result = moe("report", run, "--out", tmp_path / "r.html", "--json")
    assert result.code == 0, result.err
    (found,) = json.loads(result.out, parse_constant=pytest.fail)["runs"]
    assert (found["lowest"], found["lowest_step"]) == (4.25, 2)
    assert (found["validation"], found["validation_step"]) == (None, 3)
    notes = ["validation loss is nan at step 1 and at 1 more", "t/bits is inf at step 3"]
    assert found["notes"] == notes and all(f"note: a: {n}" in result.err for n in notes)
    page = Elements((tmp_path / "r.html").read_text())
    assert {"losses", "scores"} <= set(page.all("data-figure"))
    assert "nan" not in page.all("data-validation") + page.all("data-lowest")
    known = Run(run, "a", validations=[(1, math.nan), (2, 4.25)], checkpoints=[1, 2])
    assert known.best == (2, 4.25)
    known.validations = [(1, math.nan)]
    assert known.best == (2, None), "the newest, where none has a number"
    known.validations.append((2, math.inf))
    assert known.best is None


def test_speed_stands_beside_quality(run, tmp_path):
    numbers = dict.fromkeys(SPEEDS, 2.0) | {"time_to_first_token": 0.5}
    bench = {
        "device": EVIL, "models": [{"path": "mixture"}, {"path": EVIL}], "notes": ["no parent."],
        "points": [
            {"batch": 1, "length": 8, "models": [numbers, numbers],
             "ratios": [{name: [0.75, 0.5, 1.0] for name in SPEEDS[:3]}]},
            {"batch": 9, "length": 8, "models": [{"error": EVIL}, numbers], "ratios": [None]},
        ],
    }  # fmt: skip
    folder = tmp_path / "speed"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(bench))
    page = report(tmp_path / "r.html", run, folder)
    assert page.all("data-bench") == ["speed"]
    assert page.all("data-time-to-first-token") == ["0.5"] * 3
    said = (tmp_path / "r.html").read_text()
    assert said.count("× 0.75") == 3 and "speed: no parent." in said
    assert "img" not in {tag for tag, _ in page.found}
    for wrong in (
        {"models": 3},
        {"points": [{}]},
        {"points": [{**bench["points"][0], "ratios": []}]},
    ):
        (folder / "bench.json").write_text(json.dumps(bench | wrong))
        result = moe("report", folder, "--out", tmp_path / "none.html")
        assert result.code == 3 and "bench.json is not what `moe bench` writes" in result.err


def test_loads_are_drawn_for_every_part_with_the_dead_named(tmp_path):
    run = write_run(tmp_path / "a", [step(1, 4.0), step(2, 3.0)])
    experts = [[50, 150, 100, 100], [0, 200, 100, 100]]
    write_lines(run / "loads.jsonl", [
        loads(1, experts=[[100] * 4] * 2),
        loads(2, heads=[[100, 100]], experts=experts),
    ])  # fmt: skip
    page = report(tmp_path / "r.html", run)
    assert page.all("data-part") == ["heads", "experts", "heads", "experts"]
    assert page.all("data-dead")[:2] == ["0", "1"]
    assert page.all("data-worst")[:2] == ["1.0", "2.0"]
    assert "1:0" in (tmp_path / "r.html").read_text(), "layer 1, expert 0"
    drawn = {f"{kind}-0-{noun}" for kind in ("units", "balance") for noun in ("heads", "experts")}
    assert drawn <= set(page.all("data-figure"))


def test_configurations_are_beside_each_other_where_they_differ(tmp_path):
    for name, lr in (("a", 0.001), ("b", 0.01)):
        write_run(tmp_path / name, [step(1, 4.0)], optimizer__lr=lr)
    page = report(tmp_path / "r.html", tmp_path / "a", tmp_path / "b")
    assert page.all("data-key") == ["optimizer.lr"]
    assert page.all("data-config") == ["a", "b"]


def test_nothing_from_a_file_becomes_markup(tmp_path):
    lines = [step(1, 4.0), score(1, **{EVIL: (0.5, 0.1)}),
             {"step": 2, "skipped": EVIL, "samples": []}]  # fmt: skip
    run = write_run(
        tmp_path / f"{EVIL}$x^2$", lines, model="</pre><script>x</script>", **{EVIL: EVIL}
    )
    other = write_run(tmp_path / "b", [step(1, 4.0)])
    results = write_results(tmp_path / f"e{EVIL}", [row(EVIL, [0.5, 0.25], 0.1)], [EVIL, "gone"])
    model = write_model(tmp_path / f"m{EVIL}")
    (model / "receipt.json").write_text(json.dumps({
        "steps": [{"recipe": EVIL, "options": {EVIL: EVIL}, "sources": [{"path": EVIL}, 3],
                   "versions": 7, "created": EVIL}],
        "verification": {"status": EVIL, "text": EVIL, "perplexity": 3},
    }))  # fmt: skip
    page = report(tmp_path / "r.html", run, other, results, model)
    tags = {tag for tag, _ in page.found}
    assert "svg" in tags and not tags & {"script", "img"}
    assert EVIL in page.all("data-key")
    assert any("<script>x</script>" in text for text in page.texts), "shown as text"


def test_markup_that_was_not_escaped_would_be_found(run, tmp_path, monkeypatch):
    def unsafe(**given):
        return Environment(**{**given, "autoescape": False})

    monkeypatch.setattr("moe.evals.report.page.Environment", unsafe)
    other = write_run(tmp_path / EVIL, [step(1, 4.0)])
    page = report(tmp_path / "r.html", run, other)
    assert "img" in {tag for tag, _ in page.found}


def test_one_page_that_needs_nothing_else(run, tmp_path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(4, 3.5, grad_norm=1e4)) + "\n")  # a logarithmic axis
    write_lines(run / "loads.jsonl", [loads(n, experts=[[100] * 256] * 58) for n in (1, 2, 3)])
    page = report(tmp_path / "r.html", run)
    for name in ("src", "href", "xlink:href"):
        links = page.all(name)
        assert all(x.startswith(("#", "data:")) for x in links), links
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(text) < 1e6
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    fonts = {float(x) for x in re.findall(r"font: (?:bold )?([\d.]+)px", text)}
    assert fonts and min(fonts) >= 8, "points on paper"


def test_a_line_that_a_kill_or_a_running_run_left_is_no_obstacle(run, tmp_path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    result = moe("report", run, "--out", tmp_path / "r.html")
    assert result.code == 0 and "note: a: the last line of metrics.jsonl is cut short" in result.err
    text = (run / "metrics.jsonl").read_text().replace('"step": 2, "loss"', '"step: 2, "loss"')
    (run / "metrics.jsonl").write_text(text)
    result = moe("report", run, "--out", tmp_path / "again.html")
    assert result.code == 3 and "metrics.jsonl: line 2 is not what a run writes" in result.err
    assert not (tmp_path / "again.html").exists()


def test_a_run_without_metrics_is_refused_alone_and_noted_beside_others(run, tmp_path):
    new = write_run(tmp_path / "new", [])
    result = moe("report", new, "--out", tmp_path / "r.html")
    assert result.code == 2 and "nothing has been logged yet" in result.err
    page = report(tmp_path / "r.html", run, new)
    assert page.all("data-run").count("new") == 2, "a line in the tables, without numbers"
    assert "it has logged no step yet" in (tmp_path / "r.html").read_text()


def test_all_that_is_wrong_with_inputs_is_said_at_once(run, tmp_path):
    (tmp_path / "empty").mkdir()
    given = (tmp_path / "gone", tmp_path / "empty", run, run)
    result = moe("report", *given, "--out", tmp_path / "r.html")
    assert result.code == 2
    assert f"{tmp_path}/gone is no folder" in result.err
    assert f"{tmp_path}/empty is neither a run folder" in result.err
    assert f"{run} is given twice" in result.err
    (tmp_path / "r.html").write_text("mine")
    result = moe("report", run, "--out", tmp_path / "r.html")
    assert result.code == 2 and "exists. Choose another --out" in result.err
    assert (tmp_path / "r.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("config.yaml", BOMB),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n{}\n'),
        ("metrics.jsonl", '{"step": 1, "evaluation": {"a": 3}}\n'),
        ("metrics.jsonl", "[1]\n" + "[" * 100_000 + "\n"),
        ("loads.jsonl", '{"step": 1, "experts": {"0": {"load": [1]}}}\n'),
        ("events.jsonl", "7\n7\n"),
    ],
)
def test_a_damaged_file_is_named(run, tmp_path, name, text):
    (run / name).write_text(text)
    result = moe("report", run, "--out", tmp_path / "r.html")
    assert result.code == 3 and name in result.err, result.err


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("models"),
        lambda found: found["rows"][0]["values"].append(1.0),
        lambda found: found["rows"][0].update(values=["<b>", 1.0]),
        lambda found: found.update(rows=3),
    ],
)
def test_damaged_results_are_named(tmp_path, change):
    folder = write_results(tmp_path / "eval", [row("a", [0.5, 0.25], 0.1)], ["x", "y"])
    found = json.loads((folder / "results.json").read_text())
    change(found)
    (folder / "results.json").write_text(json.dumps(found))
    result = moe("report", folder, "--out", tmp_path / "r.html")
    assert result.code == 3 and "results.json is not what `moe eval` writes" in result.err


def test_json_says_what_the_tables_say(run, tmp_path):
    result = moe("report", run, "--out", tmp_path / "r.html", "--json")
    (found,) = json.loads(result.out)["runs"]
    assert (found["loss"], found["lowest"], found["lowest_step"]) == (3.75, 4.125, 2)
