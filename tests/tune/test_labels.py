"""Labels of prompts: by field, by rules, by a judge held against lm-eval's own multiple choice."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke import moe
from lm_eval.api.instance import Instance
from recordings import folder_of, prompts, write_lines

from moe.errors import UserError
from moe.evals.adapter import MoeLM
from moe.tune import judge
from moe.tune import prompts as prompt_files
from moe.tune.labels import Field, Judge, Rules, read
from moe.tune.trace import Trace

RULES = """
on: response
default: ANSWERED
labels:
  REFUSED: ['(?i)i (can|will) ?not', sorry]
  ASKED: ['\\?$', sorry]
"""
ANSWERS = ["I cannot.", "sorry?", "Why?", "42", None]


def written(path: Path, text: Any) -> str:
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


def fields(*values: Any, name: str = "label") -> list[Any]:
    rows = [{"prompt": "x", **({} if v is None else {name: v})} for v in values]
    return [prompt_files.prompt_of(n, row) for n, row in enumerate(rows, start=1)]


def test_the_field_label_is_read_where_there_is_one():
    assert read(None).label(fields("a", None, 3), [None] * 3) == ["a", None, "3"]
    source = read("field:tone")
    given = fields("a", True, name="tone")
    source.check(given)
    assert source == Field("tone", asked=True) and source.label(given, []) == ["a", "True"]
    with pytest.raises(UserError, match="no prompt has a field"):
        source.check(fields("a"))
    with pytest.raises(UserError, match="lines 1, 2: label is not a string"):
        read(None).check(fields([1], {}, "a"))


def test_the_first_rule_that_is_found_wins(tmp_path):
    source = read(written(tmp_path / "r.yaml", RULES))
    assert source.needs_response
    found = source.label(prompts(["p"] * 5), ANSWERS)
    assert found == ["REFUSED", "REFUSED", "ASKED", "ANSWERED", None]


def test_another_order_of_the_rules_is_noticed(tmp_path):
    """Negative control: `sorry?` is under both labels."""
    body = yaml.safe_load(RULES)
    body["labels"] = dict(reversed(body["labels"].items()))
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    assert read(str(path)).label(prompts(["p"] * 5), ANSWERS)[1] == "ASKED"


def test_rules_on_prompts_need_no_response(tmp_path):
    source = read(written(tmp_path / "r.yaml", {"on": "prompt", "labels": {"CODE": ["def "]}}))
    assert isinstance(source, Rules) and not source.needs_response
    assert source.label(prompts(["def f", "f"]), [None, "def "]) == ["CODE", None]


BAD = {
    "keys": ({"labels": {"A": ["a"]}, "defualt": "", "x": 1}, ["defualt is not", "x is not a key"]),
    "kinds": (
        {"on": "answer", "default": 3, "labels": {True: ["a"], "B": "b", "C": ["(", 3], "D": []}},
        [
            "on='answer' is unknown",
            "default=3",
            "True is not a string",
            "B: not a list of expressions",
            "C: '(' is not a regular expression",
            "C: 3 is not a string",
            "D: not a list",
        ],
    ),
    "none": ({"default": "A"}, ["labels is not a table"]),
    "text": ("just words", ["has no keys"]),
    "broken": ("labels: {A: [", ["is not YAML"]),
    "judge": (
        {"doc_to_choice": ["a", "a"], "doc_to_text": "{{ prompt", "rules": 1, "model": "nowhere"},
        ["rules is not a key", "all different", "is not a template", "nowhere is not a folder"],
    ),
    "judge's kinds": (
        {"doc_to_choice": ["a", False], "target_delimiter": 3},
        ["model=None", "doc_to_text=None", "target_delimiter=3", "not a list of strings"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_all_that_is_wrong_in_a_file_is_said(case, tmp_path):
    body, said = BAD[case]
    path = written(tmp_path / "l.yaml", body)
    with pytest.raises(UserError) as error:
        read(path)
    for text in said:
        assert text in str(error.value), error.value
    assert len(str(error.value).split("\n")) == len(said)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folder_of("moe", tmp_path_factory.mktemp("judges") / "judge", seed=3)


PAIRS = [
    ("Is it so?", " yes"),
    ("Is it so?", " no, never"),
    ("Text with a space after it ", "no"),
    ("x", " maybe"),
    ("A longer text that is not like the others at all", " yes"),
    ("", "yes"),
]


def test_likelihoods_are_those_of_lm_eval(model):
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(PAIRS)]
    expected = [v for v, _ in MoeLM(model).loglikelihood(requests, disable_tqdm=True)]
    assert judge.likelihoods(model, PAIRS) == pytest.approx(expected, rel=1e-5)


def test_a_judge_without_the_first_token_is_noticed(model, monkeypatch):
    """Negative control."""
    whole = judge._encode
    monkeypatch.setattr(
        judge, "_encode", lambda t, *pair: (lambda a, b: (a, b[1:]))(*whole(t, *pair))
    )
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(PAIRS)]
    expected = [v for v, _ in MoeLM(model).loglikelihood(requests, disable_tqdm=True)]
    assert judge.likelihoods(model, PAIRS) != pytest.approx(expected, rel=1e-2)


def test_a_text_longer_than_the_judge_loses_its_beginning_as_in_lm_eval(model, capsys):
    pairs = [("ab" * 300, " yes"), ("short", " yes")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    expected = [v for v, _ in MoeLM(model).loglikelihood(requests, disable_tqdm=True)]
    assert judge.likelihoods(model, pairs) == pytest.approx(expected, rel=1e-5)
    assert "1 of 2 texts are longer than its 512 positions" in capsys.readouterr().err


def test_a_judge_sees_prompt_response_and_fields_and_nothing_else(tmp_path, model):
    text = "{{ topic }}: {{ prompt }} / {{ response }} ="
    body = {"model": str(model), "doc_to_text": text, "doc_to_choice": ["yes", "no"]}
    source = read(written(tmp_path / "j.yaml", body))
    assert isinstance(source, Judge) and source.needs_response
    rows = fields("sea", name="topic")
    assert source.render(rows[0], "R") == "sea: x / R ="
    with pytest.raises(UserError, match="lines 1, 2: no field 'topic'"):
        source.check(fields("a", "b"))
    escape = {**body, "doc_to_text": "{{ prompt.__class__.__mro__ }}"}
    with pytest.raises(UserError, match="unsafe"):
        read(written(tmp_path / "e.yaml", escape)).render(rows[0], "R")


def test_the_command_takes_a_judge(tmp_path, model):
    body = {
        "model": str(model),
        "doc_to_text": "{{prompt}}{{response}}",
        "doc_to_choice": ["0", "x"],
    }
    path = written(tmp_path / "j.yaml", body)
    rows = [{"prompt": text, "response": "r"} for text in ("a", "bcd", "ef")]
    file, out = write_lines(tmp_path / "p.jsonl", rows), tmp_path / "t.npz"
    command = ("tune", "record", model, "--prompts", file, "--out", out, "--labels", path)
    result = moe(*command)
    assert result.code == 0, result.err
    trace = Trace.read(out)
    requests = [
        Instance("loglikelihood", {}, (row["prompt"] + "r", f" {choice}"), 0)
        for row in rows
        for choice in ("0", "x")
    ]
    values = [v for v, _ in MoeLM(model).loglikelihood(requests, disable_tqdm=True)]
    best = ["0" if a > b else "x" for a, b in zip(values[::2], values[1::2], strict=True)]
    assert trace.labels == best
    assert trace.settings["labels"]["kind"] == "judge"


def test_rules_need_responses(tmp_path, model):
    file = write_lines(
        tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "response": "sorry"}]
    )
    rules, out = written(tmp_path / "r.yaml", RULES), tmp_path / "t.npz"
    command = ("tune", "record", model, "--prompts", file, "--out", out, "--labels", rules)
    result = moe(*command)
    assert result.code == 2 and "line 1: no `response`. Give --generate N" in result.err
    assert moe(*command, "--generate", 4).code == 0
    trace = Trace.read(out)
    assert trace.labels[1] == "REFUSED" and trace.labels[0] is not None
    assert trace.tokens.tolist() == [1, 1]
