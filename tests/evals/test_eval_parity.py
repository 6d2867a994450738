"""Our adapter beside the harness's own `hf` model, and the harness's own command line with ours."""

import contextlib
import functools
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import toy_run
import toy_tasks
from invoke import moe
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from moe.errors import UserError
from moe.evals import lm_eval as command
from moe.evals.adapter import MoeLM, alone
from moe.evals.harness import load
from moe.evals.run import find_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return toy_tasks.write(tmp_path_factory.mktemp("suite") / "own")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A dense LLaMA, a mixture, and the mixture exported as a Mixtral."""
    root = tmp_path_factory.mktemp("models")
    tiny.dense_model().save_pretrained(root / "llama")
    tiny.tokenizer().save_pretrained(root / "llama")
    routed = toy_run.make(root, None, [tiny.MOE] * 3).model
    done = moe("export", routed, "--to", "mixtral", "--out", root / "mixtral")
    assert done.code == 0, done.err
    return {"llama": root / "llama", "routed": routed, "mixtral": root / "mixtral"}


def said(lm: Any, task: str, suite: Path) -> tuple[dict[str, Any], list[Any]]:
    """Scores and answers of one task."""
    loaded = load([task], find_tasks([task], suite.parent, None))
    result = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=10)
    assert result is not None
    samples = sorted(result["samples"][task], key=lambda s: s["doc_id"])
    return result["results"][task], [s["resps"] for s in samples]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_harness_own_model_says_the_same(name, batch_size, models, suite) -> None:
    """To the last bit: likelihoods of choices, of whole texts, and what is generated."""
    folder = models[name]
    theirs = HFLM(pretrained=str(folder), batch_size=batch_size, device="cpu")
    ours = MoeLM(folder, batch_size)
    for task in toy_tasks.PLAIN:
        assert said(ours, task, suite) == said(theirs, task, suite), task


def test_an_export_says_what_its_mixture_said(models, suite) -> None:
    for task in toy_tasks.TASKS:
        mixture, exported = (said(MoeLM(models[n]), task, suite) for n in ("routed", "mixtral"))
        for name, value in mixture[0].items():
            if isinstance(value, float):
                assert exported[0][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_another_model_says_something_else(models, suite, tmp_path) -> None:
    """Negative control: one expert's rows are turned around."""
    other = Path(shutil.copytree(models["mixtral"], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(n for n in sorted(weights) if ".experts." in n)
    weights[name] = weights[name].flip(-1).contiguous()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    theirs = HFLM(pretrained=str(other), device="cpu")
    assert said(MoeLM(models["mixtral"]), "toy_text", suite) != said(theirs, "toy_text", suite)


def line(*words: object) -> tuple[int, str, str]:
    """Exit code and what `python -m moe.evals.lm_eval` prints."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["lm_eval", *map(str, words)]),
        mock.patch("lm_eval.utils.setup_logging"),
        mock.patch.dict("os.environ"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            command.call()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_the_harness_command_line_knows_our_models(models, suite, tmp_path) -> None:
    """A second time all comes from the cache; the scores are those of `moe eval`."""
    tasks = ("--tasks", ",".join(toy_tasks.TASKS), "--include_path", suite.parent)
    given = f"pretrained={models['routed']},cache={tmp_path / 'cache'}"
    words = ("run", "--model", "moe", "--model_args", given, *tasks, "--batch_size", 3)
    code, printed, _ = line(*words, "--output_path", tmp_path / "first")
    assert code == 0 and "toy_choice" in printed
    few = functools.partial(TaskManager, include_defaults=False)  # it has been through all once
    with (
        mock.patch("lm_eval.tasks.TaskManager", few),
        mock.patch("moe.evals.adapter.HFLM._model_call", side_effect=AssertionError),
    ):
        assert line(*words, "--output_path", tmp_path / "second")[:2] == (0, printed)
    (file,) = (tmp_path / "first").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    options = ("--suite", suite, "--batch-size", 3, "--out", tmp_path / "ours")
    done = moe("eval", models["routed"], *options)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "ours" / "results.json").read_text())["rows"]
    assert len(rows) == len(toy_tasks.METRICS)
    for row in rows:
        metric, _, rest = row["metric"].partition(" (")
        assert theirs[row["task"]][f"{metric},{rest[:-1] or 'none'}"] == row["values"][0]


def test_what_the_command_line_refuses(models, suite, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("use_cache: x\nmodel: moe\ntasks: [toy_text]\n")
    few = functools.partial(TaskManager, include_defaults=False)
    words = ("run", "--model", "moe", "--tasks", "toy_text")
    with (
        mock.patch("lm_eval.tasks.TaskManager", few),
        mock.patch("moe.evals.lm_eval.TaskManager", few),
        mock.patch("moe.evals.lm_eval.HarnessCLI.execute", side_effect=AssertionError),
    ):
        for pickled in (
            (*words, "--use_cache", "x"),
            (*words, "--use_cach", "x"),  # argparse takes what is not ambiguous
            (*words, "--cache_requests", "true"),
            ("run", "--config", config),
        ):
            code, _, err = line(*pickled)
            assert code == 2 and "cache" in err and "own caches hold pickles" in err, pickled
        code, _, err = line(*words[:3], "--tasks", "toy_text", "--log_samples")
        assert code == 2 and "--output_path" in err, "the harness's own refusals are one line too"
    with (
        mock.patch("lm_eval.tasks.TaskManager", few),
        mock.patch("moe.evals.lm_eval.TaskManager", few),
    ):
        tasks = ("--include_path", suite.parent, "--tasks")
        code, _, err = line(*words[:3], *tasks, "toy_texd")
        assert code == 2 and err.startswith("error: task 'toy_texd' does not exist. Closest: toy_t")
        code, _, err = line(*words[:3], *tasks, "toy_text")
        assert code == 2 and "needs a folder: --model_args pretrained=DIR" in err
        (suite.parent / "rows.json").rename(suite.parent / "gone.json")
        try:
            given = ("--model_args", f"pretrained={models['llama']}")
            code, _, err = line(*words[:3], *given, *tasks, "toy_text")
        finally:
            (suite.parent / "gone.json").rename(suite.parent / "rows.json")
        assert code == 2 and "toy_text" in err and "could not be read" in err
    with mock.patch.object(command.CommandLineLM, "ranks", alone(), create=True):
        for given, message in [
            ({"pretrained": "none"}, "none is not a folder"),
            ({"pretrained": str(models["llama"]), "peft": "x"}, "peft=x: --model moe has none"),
            ({"pretrained": str(models["llama"]), "expert": "x"}, "expert=x is not a number"),
            ({"pretrained": str(models["llama"]), "max_length": "x"}, "max_length=x is not a"),
            ({"pretrained": str(models["llama"]), "batch_size": "auto:4"}, "'auto:4' is neither"),
        ]:
            with pytest.raises(UserError, match=message):
                command.CommandLineLM.create_from_arg_obj(given)


@pytest.mark.full
def test_tasks_are_listed_and_validated(suite) -> None:
    """The harness's other commands."""
    words = ("validate", "--tasks", "toy_text", "--include_path", suite.parent)
    assert "All tasks found and valid" in line(*words)[1]
    code, printed, _ = line("ls", "groups", "--include_path", suite.parent)
    assert code == 0 and "mmlu" in printed
