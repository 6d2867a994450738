"""Evaluations that were killed go on; answers are of one model; what cannot be answered is said."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import toy_run
import toy_tasks
from invoke import moe

from moe.errors import Corrupt, UserError
from moe.evals.answers import Answers, digest, strangers
from moe.evals.command import ANSWERS
from moe.evals.rounds import Rounds

CHAT = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{{ 'a' }}"


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return toy_tasks.write(tmp_path_factory.mktemp("suite") / "own")


@pytest.fixture(scope="module")
def straight(toys, suite, tmp_path_factory) -> dict[str, Any]:
    """The report of an evaluation that nothing has disturbed."""
    return report(toys.model, suite, tmp_path_factory.mktemp("straight") / "out")


def report(model: Path, suite: Path, out: Path, *options: object) -> dict[str, Any]:
    done = moe("eval", model, "--suite", suite, "--batch-size", 2, "--out", out, *options)
    assert done.code == 0, done.err
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "results.md"]
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_numbers(toys, suite, straight, tmp_path) -> None:
    """Killed with SIGKILL when some answers are kept; batches are answered once in all."""
    out = tmp_path / "out"
    words = ["eval", toys.model, "--suite", suite, "--batch-size", 2, "--out", out]
    slow = (
        "import time\nfrom moe.evals.rounds import Rounds\nfrom moe.cli import main\n"
        "share = Rounds._share\n"
        "def slowly(*given):\n    share(*given)\n    time.sleep(0.3)\n"
        "Rounds._share = slowly\nmain()\n"
    )
    with subprocess.Popen([sys.executable, "-c", slow, *map(str, words)]) as process:
        deadline = time.monotonic() + 90
        while kept(out) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = kept(out)
    assert 3 <= before < 12 and not (out / "results.json").exists()
    other = moe(*words[:1], copied(toys.model, tmp_path / "other"), *words[2:])
    assert other.code == 2 and "another model than" in other.err, other.err
    computed = []
    answer = Rounds._share

    def counted(self: Rounds, mine: Any, known: Any) -> None:
        computed.append(mine)
        answer(self, mine, known)

    with mock.patch.object(Rounds, "_share", counted):
        again = report(toys.model, suite, out)
    assert again["results"] == straight["results"] and again["rows"] == straight["rows"]
    assert len(computed) == straight_batches(toys, suite, tmp_path) - before


def straight_batches(toys: toy_run.Toys, suite: Path, folder: Path) -> int:
    """How many batches the evaluation has in all, as kept by one that ends."""
    cache = folder / "cache"
    report(toys.model, suite, folder / "counted", "--cache", cache)
    return rows(next(cache.glob("*.sqlite")))


def kept(out: Path) -> int:
    files = list((out / ANSWERS).glob("*.sqlite"))
    return rows(files[0]) if files else 0


def rows(file: Path) -> int:
    with sqlite3.connect(file) as held:
        try:
            return held.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:  # not there yet
            return 0


def copied(model: Path, to: Path) -> Path:
    """The same model but for a weight."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.slow
def test_a_cache_is_of_one_model_and_changes_nothing(toys, suite, straight, tmp_path) -> None:
    cache = tmp_path / "cache"
    other = copied(toys.model, tmp_path / "other")
    first = report(toys.model, suite, tmp_path / "first", "--cache", cache)
    with mock.patch("moe.evals.adapter.HFLM._model_call", side_effect=AssertionError):
        second = report(toys.model, suite, tmp_path / "second", "--cache", cache)
    assert first["results"] == second["results"] == straight["results"]
    fresh = report(other, suite, tmp_path / "fresh")
    cached = report(other, suite, tmp_path / "cached", "--cache", cache)
    assert cached["results"] == fresh["results"] != first["results"]
    assert len(list(cache.glob("*.sqlite"))) == 2
    # one answer changed on disk: that is what comes out, so it is read
    file = next(p for p in cache.glob("*.sqlite") if rows(p))
    with sqlite3.connect(file) as held:
        held.execute("UPDATE answers SET found = 'oops'")
    for model in (toys.model, other):
        words = ("--suite", suite, "--batch-size", 2, "--cache", cache)
        result = moe("eval", model, *words, "--out", tmp_path / "none")
        if result.code:
            assert result.code == 3 and f"{file} is damaged" in result.err
            break
    else:
        raise AssertionError("a damaged cache was believed")


def test_answers_come_back_as_they_were(tmp_path) -> None:
    values = [[-1.0 / 3, True], "text\n", 0.1 + 0.2]
    one = Answers(tmp_path, {"model": 1})
    assert one.get(["a"]) == {} and not list(tmp_path.iterdir())
    one.put({"a": values})
    one.close()
    assert Answers(tmp_path, {"model": 1}).get(["a", "b"]) == {"a": values}
    assert Answers(tmp_path, {"model": 2}).get(["a"]) == {}
    file = tmp_path / f"{digest({'model': 1})}.sqlite"
    assert strangers(tmp_path, [{"model": 1}]) == [] and strangers(tmp_path, []) == [file]
    file.rename(tmp_path / f"{digest({'model': 2})}.sqlite")
    with pytest.raises(UserError, match="answers of another model"):
        Answers(tmp_path, {"model": 2})
    file.write_bytes(b"no database, but long enough to be looked at" * 50)
    with pytest.raises(Corrupt, match="is damaged"):
        Answers(tmp_path, {"model": 1}).get(["a"])


@pytest.mark.slow
def test_chat_templates_make_the_prompts(toys, suite, tmp_path) -> None:
    """Few-shot turns, the system's words, and a template, against prompts written by hand."""
    model = Path(shutil.copytree(toys.model, tmp_path / "model"))
    words = ("--tasks", "toy_say", "--include-path", suite.parent)
    flag = "--apply-chat-template"
    refused = moe("eval", model, *words, flag, "--out", tmp_path / "none")
    assert refused.code == 2 and "has no chat template: put the model's" in refused.err
    (model / "chat_template.jinja").write_text(CHAT)
    asked: list[str] = []
    say = "moe.evals.adapter.HFLM.generate_until"

    def listen(lm: Any, requests: list[Any], *_: Any) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return [""] * len(requests)

    with mock.patch(say, listen):
        system = ("--system-instruction", "be kind")
        done = moe("eval", model, *words, flag, *system, "--out", tmp_path / "chat")
        assert done.code == 0, done.err
    items = [json.loads(line) for line in (suite.parent / "rows.json").read_text().splitlines()]
    assert sorted(asked) == sorted(f"sbe kindu{item['q']}a" for item in items)
    (model / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none here') }}{% endif %}"
    )
    refused = moe("eval", model, *words, flag, *system, "--out", tmp_path / "none")
    assert refused.code == 2 and "takes no system message (none here)" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "many"), "neither a number from 1 on nor auto"),
        (("--system-instruction", "x"), "go with --apply-chat-template"),
        (("--no-fewshot-as-multiturn",), "go with --apply-chat-template"),
        (("--expert-parallel", 2), "does not divide both the 1 ranks and the experts"),
        (("--cache", __file__), "is not a folder"),
        (("--suite", "none.yaml"), "suite none.yaml: there is none"),
        pytest.param(  # the harness looks through all its tasks
            ("--tasks", "hellaswag"),
            "Rowan___hellaswag from its ~/.cache/huggingface/datasets into",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_requests_are_refused(arguments, message, toys, suite, tmp_path) -> None:
    own = ("--suite", suite) if "--tasks" not in arguments and "--suite" not in arguments else ()
    result = moe("eval", toys.model, *own, *arguments, "--out", tmp_path / "out")
    assert result.code == 2 and message in result.err, result.err
    assert not (tmp_path / "out").exists()


def test_a_lost_rank_sends_nobody_to_a_checkpoint(toys, suite, tmp_path) -> None:
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with (
        mock.patch.dict("os.environ", WORLD_SIZE="2", RANK="0"),
        mock.patch("moe.parallel.world.distributed.init_process_group"),
        mock.patch("moe.evals.command._evaluate", side_effect=lost),
    ):
        result = moe("eval", toys.model, "--suite", suite, "--out", tmp_path / "out")
    assert result.code == 1 and "another of the 2 ranks is gone" in result.err, result.err
    assert "the same command again, and it goes on from what has been answered" in result.err
    assert "checkpoint" not in result.err and "parallel.timeout" not in result.err


def test_every_file_that_is_missing_is_named_at_once(toys, tmp_path) -> None:
    tasks = ("--tasks", "local_piqa,local_gsm8k,local_wikitext2", "--data", tmp_path)
    with mock.patch("moe.evals.run.MoeLM", side_effect=AssertionError):
        result = moe("eval", toys.model, *tasks, "--out", tmp_path / "out")
    files = ("piqa/valid.jsonl", "piqa/valid-labels.lst", "gsm8k/train.jsonl", "gsm8k/test.jsonl",
             "wikitext2/test.txt")  # fmt: skip
    lines = result.err.splitlines()
    assert result.code == 2 and len(lines) == len(files), result.err
    for line, file in zip(lines, files, strict=True):
        assert f"put {file} into the folder given by --data" in line


def test_what_looks_ahead_is_refused_before_anything_is_asked(toys, suite, tmp_path) -> None:
    """Likelihoods and generation alike, each with the tasks that need it."""
    model = Path(shutil.copytree(toys.model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    uoe = {"kind": "uoe", "num_experts": 4, "top_k": 2, "mode": "expert_choice"}
    config["mlp"] = [uoe] * 3
    (model / "config.json").write_text(json.dumps(config))
    result = moe("eval", model, "--suite", suite, "--out", tmp_path / "out")
    assert result.code == 2 and not (tmp_path / "out").exists(), result.err
    scores, generates = result.err.splitlines()
    assert "toy_choice, toy_text, toy_windows score texts" in scores and "not causal" in scores
    assert "toy_say need generation" in generates and "expert_choice" in generates
