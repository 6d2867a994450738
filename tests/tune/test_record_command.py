"""`moe tune record`: the file it writes, bad input, and a process killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recordings
from invoke import moe
from recordings import folder_of, write_lines

from moe.errors import Corrupt
from moe.tune import record as module
from moe.tune.record import Partial
from moe.tune.trace import Trace
from moe.tune.tuning import Edit, Tuning

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folder_of("moe", tmp_path_factory.mktemp("models") / "moe")


ROWS = [
    {"prompt": "What is it?", "label": "asks"},
    {"messages": [{"role": "user", "content": "Tell me."}], "label": "tells", "topic": 3},
    {"prompt": "Say more", "response": "I will."},
]


def record(model: Path, file: Path, out: Path, *options: object):
    return moe("tune", "record", model, "--prompts", file, "--out", out, *options)


def test_the_command_writes_a_trace(model, tmp_path):
    file, out = write_lines(tmp_path / "p.jsonl", ROWS), tmp_path / "new" / "t.npz"
    result = record(model, file, out, "--tokens", "all", "--generate", 5, "--json")
    assert result.code == 0, result.err
    report, trace = json.loads(result.out), Trace.read(out)
    assert report["labels"] == {"asks": 1, "tells": 1} and report["unlabelled"] == 1
    assert trace.labels == ["asks", "tells", None]
    assert [row["prompt"] for row in trace.rows] == ["What is it?", "user: Tell me.", "Say more"]
    assert trace.rows[2]["response"] == "I will." and len(trace.rows[0]["response"]) <= 5
    assert trace.tokens[1] == len("[user]Tell me.[assistant]") + len(trace.rows[1]["response"])
    assert len({row["id"] for row in trace.rows}) == 3
    settings = trace.settings
    assert settings["family"] == "routed_llama" and settings["tokens"] == "all"
    assert settings["generation"] == {"max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    assert settings["model"]["name"] == "moe" and "torch" in settings["versions"]
    assert os.listdir(out.parent) == ["t.npz"]
    plain = record(model, file, tmp_path / "u.npz")
    assert "3 prompts, " in plain.out and "labels: asks 1, tells 1" in plain.out


def test_chat_wraps_prompts_and_repeats_are_noted(model, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", [{"prompt": "hi"}, {"prompt": "ho"}, {"prompt": "hi"}])
    result = record(model, file, tmp_path / "t.npz", "--chat", "--limit", 3)
    assert result.code == 0 and "line 3: a prompt that an earlier line has too" in result.err
    trace = Trace.read(tmp_path / "t.npz")
    assert trace.tokens.tolist() == [len("[user]hi[assistant]")] * 3
    assert trace.rows[0]["id"] == trace.rows[2]["id"]


def test_a_tuning_of_another_model_is_refused(model, tmp_path):
    path, file = tmp_path / "tuning.json", write_lines(tmp_path / "p.jsonl", ROWS)
    tuning = Tuning(
        semantics="post_zero", experts=[Edit(layer=0, expert=1)],
        model={"name": "that", "config": "1", "weights": "2"},
    )  # fmt: skip
    tuning.write(path)
    result = record(model, file, tmp_path / "t.npz", "--tuning", path)
    assert result.code == 2 and "this tuning was made for that" in result.err
    result = record(model, file, tmp_path / "t.npz", "--tuning", path, "--other-model")
    assert result.code == 0, result.err
    trace = Trace.read(tmp_path / "t.npz")
    assert not trace.mass[:, 1].any() and trace.settings["tuning"] and trace.settings["scale"] == 1


LONG = [{"prompt": "a" * 600}, {"prompt": "b"}, {"prompt": "c" * 513}]
MESSAGE = [{"messages": [{"role": "user", "text": "x"}]}]
BAD: dict[str, tuple[list, list, list[str]]] = {
    "not JSON": ([], ["--limit", 9], ["line 2 is not JSON", "line 3: no `prompt`"]),
    "empty": ([{"prompt": ""}, {"prompt": 3}], [], ["line 1: the prompt is empty", "2: prompt=3"]),
    "no rows": ([], [], ["has no prompts"]),
    "long": (LONG, [], ["lines 1, 3: longer than the model's 512 positions", "1: 600"]),
    "room": ([{"prompt": "a" * 510}], ["--generate", 3], ["line 1: longer than the model's 512"]),
    "messages": (MESSAGE, [], ["line 1: messages is not a list of objects"]),
    "surrogate": ([{"prompt": "a\ud800"}], [], ["line 1: half of a surrogate pair"]),
    "both": ([{"prompt": "a", "messages": []}], [], ["line 1: both `prompt` and `messages`"]),
    "responses": (ROWS, ["--tokens", "generated"], ["lines 1, 2: no `response`", "--generate N"]),
    "scale": (ROWS, ["--scale", 0.5], ["give --tuning too"]),
    "no field": (ROWS, ["--labels", "field:tone"], ["no prompt has a field of that name"]),
    "a list": ([{"prompt": "a", "label": ["b"]}], [], ["line 1: label is not a string"]),
    "no file": (ROWS, ["--labels", "rulez.yaml"], ["neither field:NAME nor a file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_line(case, model, tmp_path):
    rows, options, said = BAD[case]
    file = write_lines(tmp_path / "p.jsonl", rows)
    if case == "not JSON":
        file.write_text('{"prompt": "a"}\n{"prompt": \n{"text": "b"}\n')
    result = record(model, file, tmp_path / "t.npz", *options)
    assert result.code == 2 and not list(tmp_path.glob("t.npz*"))
    for text in said:
        assert text in result.err, result.err
    assert result.err.count("\n") == len(result.err.splitlines()) <= 2


def test_all_that_is_wrong_is_said_at_once(model, tmp_path):
    (tmp_path / "t.npz").write_text("")
    rules = tmp_path / "rules.yaml"
    rules.write_text("labels: {A: ['(']}")
    result = record(
        model, tmp_path / "none.jsonl", tmp_path / "t.npz", "--labels", rules, "--scale", 2
    )
    assert result.code == 2
    for text in ("t.npz exists", "none.jsonl", "not a regular expression", "--scale 2"):
        assert text in result.err


def test_a_model_without_a_tokenizer_or_without_routers(tmp_path):
    folder = tmp_path / "m"
    recordings.model("moe").save_pretrained(folder)
    file = write_lines(tmp_path / "p.jsonl", ROWS)
    result = record(folder, file, tmp_path / "t.npz")
    assert result.code == 2 and "has no tokenizer that can be read" in result.err
    result = record(tmp_path / "nowhere", file, tmp_path / "t.npz")
    assert result.code == 2 and "nowhere is not a folder" in result.err
    recordings.tiny.dense_model().save_pretrained(tmp_path / "dense")
    recordings.tokenizer().save_pretrained(tmp_path / "dense")
    result = record(tmp_path / "dense", file, tmp_path / "t.npz")
    assert result.code == 2 and "this llama has no router: is it dense?" in result.err


def test_a_folder_with_other_settings_is_refused(model, tmp_path):
    file, out = write_lines(tmp_path / "p.jsonl", ROWS), tmp_path / "t.npz"
    partial = Partial(tmp_path / "t.npz.partial", {"tokens": "last"})
    partial.add(module.Batch(np.array([0]), *(np.zeros((1, 2)),) * 2, np.zeros(1), [None]))
    result = record(model, file, out)
    assert result.code == 2 and 'tokens was "last", now "prompt"' in result.err
    (tmp_path / "t.npz.partial" / "settings.json").write_text("{")
    assert record(model, file, out).code == 3
    with pytest.raises(Corrupt, match="Remove it"):
        Partial(tmp_path / "t.npz.partial", {}).read()


SLOW = """
import sys, time
from moe.tune import record
add = record.Partial.add
def slow(self, batch):
    add(self, batch)
    time.sleep(0.3)
record.Partial.add = slow
from moe.cli import main
main()
"""


@pytest.mark.slow
def test_a_killed_recording_goes_on_to_the_same_trace(model, tmp_path):
    rows = [{"prompt": f"{'ab' * (n % 7)} {n}", "label": str(n % 2)} for n in range(24)]
    file, out = write_lines(tmp_path / "p.jsonl", rows), tmp_path / "t.npz"
    options = ["--tokens", "all", "--generate", 6, "--temperature", 1, "--batch-size", 3]
    whole = record(model, file, tmp_path / "whole.npz", *options)
    assert whole.code == 0, whole.err
    words = ["tune", "record", model, "--prompts", file, "--out", out, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)], env=environment, stderr=subprocess.PIPE
    )
    partial = tmp_path / "t.npz.partial"
    while len(list(partial.glob("batch-*.npz"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    kept = len(list(partial.glob("batch-*.npz")))
    assert 3 <= kept < 8
    assert record(model, file, out, *options, "--seed", 1).code == 2
    again = record(model, file, out, *options)
    assert again.code == 0 and f"{3 * kept} of 24 prompts are there, going on" in again.err
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes() and not partial.exists()
