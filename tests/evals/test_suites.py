"""Suites say what the harness has, print a paper's own numbers, and name files that are missing."""

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import toy_tasks
import yaml
from data import shared
from invoke import moe
from toy_gguf import write_toy_gguf

from moe.errors import UserError
from moe.evals import perplexity, run, suites

SUITES = sorted(path.stem for path in suites.FOLDER.glob("*.yaml"))
MOH14 = {  # the paper's table: name, shots, LLaMA3-8B, its stage-1 dense model, MoH-LLaMA3-8B
    "MMLU": (5, 65.2, 66.2, 65.8),
    "CEVAL": (5, 52.3, None, 61.5),
    "CMMLU": (5, 50.7, 66.0, 64.4),
    "GSM8K": (8, 49.5, 58.6, 56.9),
    "TruthfulQA": (0, 35.4, 41.9, 44.0),
    "HellaSwag": (10, 81.9, 79.4, 80.1),
    "LogiQA": (0, 30.0, 30.4, 30.3),
    "BoolQ": (32, 83.9, 85.1, 84.0),
    "LAMBADA": (0, 75.5, 75.8, 76.4),
    "SciQ": (0, 94.0, 92.2, 92.2),
    "PIQA": (0, 81.0, 79.1, 78.8),
    "WinoGrande": (0, 72.5, 73.0, 72.9),
    "NQ": (32, 31.5, 28.1, 28.3),
    "ARC-C": (25, 59.0, 59.6, 60.1),
    "ARC-E": (0, None, 70.9, 72.5),
}
# what lm-eval 0.4.13 would do by itself, where that is not 0 shots
DEFAULT_SHOTS = {"gsm8k": 5}


@pytest.fixture(scope="module")
def manager(tmp_path_factory) -> suites.Tasks:
    """All of the harness's tasks and ours, those of all suites' domains among them."""
    names = [task for suite in SUITES for task in suites.read(suite).tasks]
    with perplexity.domain_tasks(names, None) as (names, folders):
        yield run.find_tasks(names, None, None, folders)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    write_toy_gguf(root / "toy.gguf", layers=1, hidden=96, heads=6, kv_heads=2, seed=0)
    assert moe("import", root / "toy.gguf", "--out", root / "toy").code == 0
    return root / "toy"


def write(path: Path, *entries: dict, **more: object) -> Path:
    path.write_text(yaml.safe_dump({"about": "Ours.", "entries": list(entries), **more}))
    return path


@pytest.mark.slow  # the harness's tasks are 15,000 files
@pytest.mark.parametrize("name", SUITES)
def test_every_task_exists_with_its_metric_and_known_shots(name, manager):
    suite = suites.read(name)
    manager.suite = suite
    manager.check()
    for entry in suite.entries:
        for task in entry.tasks:
            metrics, shots = suites.declared(manager, task)
            assert entry.key in metrics
            assert shots == DEFAULT_SHOTS.get(task, 0)
        for task in entry.data:
            assert entry.key in suites.declared(manager, task)[0]
            assert suites.declared(manager, task)[1] == suites.declared(manager, entry.tasks[0])[1]
    manager.suite = None


@pytest.mark.slow
def test_a_metric_that_a_task_lacks_is_found_before_anything_runs(manager, tmp_path):
    """Negative control, of a task, of a filter, and of a group that does not add it up."""
    path = write(
        tmp_path / "a.yaml",
        {"name": "a", "task": "boolq", "metric": "acc_norm"},
        {"name": "b", "task": "gsm8k", "metric": "exact_match"},
        {"name": "c", "task": "mmlu", "metric": "acc_norm"},
    )
    manager.suite = suites.read(str(path))
    with pytest.raises(UserError) as error:
        manager.check()
    first, second, third = str(error.value).split("\n")
    assert "boolq has no metric acc_norm. It has acc,none." in first
    assert "gsm8k" in second and "exact_match,strict-match" in second and "mmlu" in third
    manager.suite = None


def test_moh14_is_the_papers_table():
    suite = suites.read("moh14")
    found = {e.name: (e.shots, *e.paper) for e in suite.entries}
    assert found == MOH14
    assert suite.columns == ("LLaMA3-8B", "stage-1 dense", "MoH-LLaMA3-8B")
    for average in suite.averages:
        chosen = [e.paper for e in suite.entries if e.name not in average.without]
        assert len(chosen) == 14
        for printed, column in zip(average.paper, zip(*chosen, strict=True), strict=True):
            if printed is not None:  # the paper rounds the same mean
                assert abs(statistics.mean(column) - printed) <= 0.05 + 1e-9


def test_bams_averages_are_those_of_its_two_tables():
    suite = suites.read("bam")
    for average in suite.averages:
        chosen = [e.paper for e in suite.entries if e.name not in average.without]
        for printed, column in zip(average.paper, zip(*chosen, strict=True), strict=True):
            assert printed is None or abs(statistics.mean(column) - printed) <= 0.011


def test_local_tasks_stand_in_where_all_their_files_are(tmp_path):
    assert suites.read("moh14").tasks == suites.read("moh14", tmp_path).tasks
    shared("piqa/valid.jsonl")
    data = shared("gsm8k/train.jsonl").parents[1]
    found = {e.name: (e.tasks, e.label) for e in suites.read("moh14", data).entries}
    assert found["PIQA"] == (("local_piqa",), "PIQA (local)")
    assert found["GSM8K"] == (("local_gsm8k",), "GSM8K (local)")
    assert found["MMLU"] == (("mmlu",), "MMLU")
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text("{}\n")  # its labels are not there
    assert suites.read("moh14", tmp_path).shots["piqa"] == 0


def test_tasks_of_ones_own_lie_beside_the_suite_or_where_it_says(tmp_path):
    path = toy_tasks.write(tmp_path / "own")
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(path.read_text() + "include: own\n")
    for named in (path, elsewhere):
        suite = suites.read(str(named))
        assert suite.include == path.parent
        run.find_tasks(suite.tasks, suite.include, None, suite=suite)
    assert suites.read("smoke").include is None


@pytest.mark.slow
def test_a_suite_of_ones_own_is_run_averaged_and_printed(toy, tmp_path):
    """Means, errors, the paper's column, the note of a stand-in; and its shots reach the prompt."""
    for file in ("gsm8k/train.jsonl", "blimp/causative.jsonl", "piqa/valid.jsonl"):
        data = shared(file).parents[1]
    part = {"task": ["local_blimp_causative", "local_blimp_npi_present_1"], "metric": "acc"}
    files = ["piqa/valid.jsonl", "piqa/valid-labels.lst"]
    path = write(
        tmp_path / "own.yaml",
        {"name": "two", **part, "paper": [50.5], "hypothesis": "the mean of both."},
        {"name": "PIQA", "task": "piqa", "metric": "acc_norm", "data": {"local_piqa": files}},
        {"name": "sums", "task": "local_gsm8k", "metric": "exact_match,strict-match", "shots": 2},
        averages=[{"name": "all"}, {"name": "some", "without": ["sums"], "paper": [None]}],
        columns=["theirs"], percent=True, limit=4,
    )  # fmt: skip
    out = tmp_path / "out"
    result = moe("eval", toy, "--suite", path, "--data", data, "--out", out)
    assert result.code == 0, result.err
    report = json.loads((out / "results.json").read_text())
    values = {(r["task"], r["metric"]): (r["values"][0], r["errors"][0]) for r in report["rows"]}
    rows = {row["name"]: row for row in report["suite"]["rows"]}
    pair = [values[task, "acc"] for task in part["task"]]
    assert rows["two (local)"]["values"] == [100 * (pair[0][0] + pair[1][0]) / 2]
    assert math.isclose(rows["two (local)"]["errors"][0], 50 * math.hypot(pair[0][1], pair[1][1]))
    assert rows["all"]["differences"] == []
    three = [rows[n]["values"][0] for n in ("two (local)", "PIQA (local)", "sums (local)")]
    assert math.isclose(rows["all"]["values"][0], sum(three) / 3)
    assert math.isclose(rows["some"]["values"][0], sum(three[:2]) / 2)
    assert report["results"][0]["n-shot"]["local_gsm8k"] == 2  # the task's own are 5
    text = (out / "results.md").read_text()
    assert "| paper: theirs |" in text and "| 50.5 " in text and "Ours." in text
    for note in ("two: the mean of both.", "local_piqa, on piqa/valid.jsonl and", "sums 5"):
        assert note in result.out and note in text


@pytest.mark.slow
def test_what_cannot_be_fetched_says_what_to_put_where(toy, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants as hub

    cache = tmp_path / "cache"

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    files = {"local_piqa": ["piqa/valid.jsonl", "piqa/valid-labels.lst"]}
    path = write(
        tmp_path / "own.yaml",
        {"name": "PIQA", "task": "piqa", "metric": "acc", "data": files},
        {"name": "SciQ", "task": "sciq", "metric": "acc"},
    )
    options = ("--suite", path, "--data", tmp_path, "--out", tmp_path / "out")
    result = moe("eval", toy, *options)
    assert result.code == 2 and not (tmp_path / "out").exists()
    first, second = [line for line in result.err.splitlines() if "could not be fetched" in line]
    assert "piqa" in first
    assert "put piqa/valid.jsonl and piqa/valid-labels.lst into the folder of --data" in first
    assert "sciq" in second and "sciq from its" in second and f"into {cache}" in second


@pytest.mark.parametrize(
    ("entry", "more", "message"),
    [
        ({"metrics": "acc"}, {}, "entries.0.metrics: Extra inputs are not permitted"),
        (
            {"metric": "acc", "shots": "many"},
            {},
            "entries.0.shots: Input should be a valid integer",
        ),
        ({"metric": "acc", "paper": [1.0]}, {}, "a has 1 of the paper's values, there are 0"),
        (
            {"metric": "acc"},
            {"averages": [{"name": "all", "without": ["b"]}]},
            "all is without b, which is no entry",
        ),
        ({"metric": "acc", "task": []}, {}, "entries.0.task.*at least 1 item"),
    ],
)
def test_a_suite_that_does_not_add_up_is_refused(entry, more, message, tmp_path):
    path = write(tmp_path / "a.yaml", {"name": "a", "task": "piqa", **entry}, **more)
    with pytest.raises(UserError, match=message):
        suites.read(str(path))


def test_a_suite_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a\.yaml: not YAML \(.*0xff"):
        suites.read(str(tmp_path / "a.yaml"))


def test_a_task_is_asked_with_one_number_of_shots(toy, tmp_path):
    """By name, and by a local task that stands in for another; with the same number it may be
    twice, for two metrics.
    """
    own = toy_tasks.write(tmp_path / "own").parent

    def refusal(first: dict, second: dict) -> str:
        path = write(own / "s.yaml", {"name": "a", **first}, {"name": "b", **second})
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return moe("eval", toy, "--suite", path, "--data", own, "--out", tmp_path / "out").err

    choice = {"task": "toy_choice", "metric": "acc"}
    said = "task toy_choice is asked with 0 shots and with 2: a suite asks a task once"
    assert said in refusal(choice, {**choice, "shots": 2})
    files = {"data": {"toy_choice": ["rows.json"]}}
    stands_in = {"task": "piqa", "metric": "acc", "shots": 2, **files}
    assert said in refusal(choice, stands_in)
    assert not (tmp_path / "out").exists()
    assert "is asked with" not in refusal(choice, {**choice, "metric": "acc_norm"})
    assert (tmp_path / "out" / "results.json").exists()


def test_every_domain_without_text_is_named(toy, tmp_path):
    (tmp_path / "text" / "pretraining").mkdir(parents=True)
    (tmp_path / "text" / "pretraining" / "a.txt").write_text("A car stopped.\n")
    result = moe("eval", toy, "--suite", "bam", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if "--data" in line]
    named = [line.partition("reads text/")[2].partition("/")[0] for line in lines]
    assert named == ["code", "law", "maths"]
