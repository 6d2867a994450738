"""What `moe eval` makes of data and lengths that do not fit: a line each before any work; and what
it says of groups, suites and numbers that are none, on toys of which a letter is a token.
"""

import json
import math
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import toy_run
import yaml
from invoke import moe
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from moe.errors import UserError
from moe.evals.adapter import MoeLM
from moe.evals.run import ROOT
from moe.evals.tasks import loaders
from moe.hf.loading import load_model, load_tokenizer

POSITIONS = 96
PARADIGMS = {"causative": 8, "wh_island": 24, "npi_present_1": 8, "anaphor_number_agreement": 12}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`dense` and `other`, of few positions."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("dense", "other")):
        model = tiny.dense_model("llama", seed=seed, max_position_embeddings=POSITIONS)
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def data(tmp_path) -> Path:
    """Sound data of every kind, to be spoilt."""
    folder, draw = tmp_path / "data", random.Random(0)
    for name in ("text", "blimp", "piqa", "gsm8k", "wikitext2"):
        (folder / name).mkdir(parents=True)

    def letters() -> str:
        return "".join(draw.choices(tiny.LETTERS[:62], k=9))

    def lines(path: str, *rows: dict[str, Any]) -> None:
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, count in PARADIGMS.items():
        pairs = [{"sentence_good": letters(), "sentence_bad": letters()} for _ in range(count)]
        lines(f"blimp/{name}.jsonl", *pairs)
    lines("piqa/valid.jsonl", *[{"goal": "g", "sol1": "yes", "sol2": letters()} for _ in range(3)])
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n0\n")
    for split in ("train", "test"):
        lines(f"gsm8k/{split}.jsonl", *[{"question": "q?", "answer": "a #### 1"}] * 6)
    (folder / "text/a.txt").write_text("Hello text\n")
    (folder / "wikitext2/test.txt").write_text(" = T = \n" + "abcdefghij" * 99 + "\n")
    return folder


@pytest.fixture
def evaluate(models, data, tmp_path) -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        given = ("--data", data, "--out", tmp_path / "out", *arguments)
        return moe("eval", models / "dense", *given)

    return call


def spoil(path: str, text: str | bytes) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        (data / path).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


LONG = json.dumps({"goal": "g", "sol1": "yes" * POSITIONS, "sol2": "no"})
EMPTY = json.dumps({"goal": "g", "sol1": "", "sol2": "no"})
SOUND = json.dumps({"goal": "g", "sol1": "yes", "sol2": "no"})


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("local_gsm8k", spoil("gsm8k/test.jsonl", ""), "test.jsonl is empty"),
        ("local_gsm8k", spoil("gsm8k/test.jsonl", "{}\n[1]\n"), "line 2 is no object"),
        ("local_gsm8k", spoil("gsm8k/test.jsonl", '{"q":\n'), "line 1 is not JSON"),
        ("local_gsm8k", spoil("gsm8k/test.jsonl", b"\xff\n"), "line 1 is not JSON"),
        ("local_piqa", spoil("piqa/valid-labels.lst", "0\n7\n1\n"), "label 2 is '7'"),
        ("local_piqa", spoil("piqa/valid-labels.lst", "0\n1\nx\n"), "lst: label 3 is 'x'"),
        ("local_piqa", spoil("piqa/valid.jsonl", "\n".join([EMPTY, SOUND, SOUND])), "empty answer"),
        ("local_piqa", spoil("piqa/valid.jsonl", "\n".join([SOUND, SOUND, LONG])),
         "an answer of item 3 has 289 tokens, and"),
        ("local_gsm8k", lambda _: None, f"generates up to 256 tokens, and .* has {POSITIONS} pos"),
        ("local_perplexity", lambda data: (data / "text/b").mkdir() or spoil("text/b/b.md", "b")(
            data), "text/a.txt lies beside folders, which are domains \\(b\\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_line(task, change, message, evaluate, data, tmp_path):
    change(data)
    result = evaluate("--tasks", task)
    assert result.code == 2 and not (tmp_path / "out").exists(), result
    (line,) = [x for x in result.err.splitlines() if x.startswith("error: ")]
    assert re.search(message, line), line


def test_an_answer_of_no_token_has_no_likelihood(evaluate, data, tmp_path):
    """A space and nothing is a token, which the harness scores."""
    spoil("piqa/valid.jsonl", "\n".join([SOUND, EMPTY, SOUND]))(data)
    assert evaluate("--tasks", "local_piqa").code == 0
    own = {"include": str(ROOT / "tasks" / "piqa.yaml"), "task": "bare", "target_delimiter": ""}
    (tmp_path / "own").mkdir()
    (tmp_path / "own/bare.yaml").write_text(yaml.safe_dump(own))
    given = ("--tasks", "bare", "--include-path", tmp_path / "own", "--out", tmp_path / "none")
    result = evaluate(*given)
    assert result.code == 2 and "bare: an answer of item 2 is empty" in result.err


def test_an_item_that_is_not_asked_does_not_matter(evaluate, data):
    spoil("piqa/valid.jsonl", "\n".join([SOUND, SOUND, LONG]))(data)
    assert evaluate("--tasks", "local_piqa", "--limit", 2).code == 0


def test_a_generation_fits_where_the_harness_says_it_does(models):
    """By one token, under either name; one more the harness's own model refuses too."""
    folder = models / "dense"
    theirs = HFLM(pretrained=load_model(folder), tokenizer=load_tokenizer(folder), backend="causal")
    question = "abcdefghi" * 20

    def ask(lm: Any, **options: Any) -> list[str]:
        return lm.generate_until([Instance("generate_until", {}, (question, options), 0)], True)

    for key in ("max_gen_toks", "max_new_tokens"):
        given = {"until": ["zz"], key: POSITIONS - 1}
        assert ask(MoeLM(folder), **given) == ask(theirs, **given)
    with pytest.raises(AssertionError, match="must be less than"):
        ask(theirs, until=["zz"], max_gen_toks=POSITIONS)


def test_a_training_run_is_refused_at_its_start_and_leaves_no_folder(data, tmp_path):
    suite = tmp_path / "s.yaml"
    entry = {"name": "g", "task": "local_gsm8k", "metric": "exact_match,strict-match"}
    suite.write_text(yaml.safe_dump({"about": "x", "entries": [entry]}))
    toys = toy_run.make(tmp_path / "toy", max_position_embeddings=POSITIONS)
    options = (f"eval.suite={suite}", f"eval.data={data}", "eval.every=2")
    with pytest.raises(UserError, match="generates up to 256 tokens"):
        toy_run.run(toys.config(tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="generates up to 256 tokens"):
        toy_run.run(toys.config(tmp_path / "run", *options))
    assert (tmp_path / "run").exists(), "what was there before stays"


def test_lines_end_where_json_lines_do(tmp_path):
    """Texts hold other separators of lines, and any letters, whatever the locale."""
    text = "one\u2028two\x85three\x1cfour\u2029 wörld"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_bytes(f"{line}\r\n\n{line}\n".encode())
    found = loaders.text(data=str(tmp_path))["test"]["page"]
    assert found == [text, text] and len(line.splitlines()) > 1, "the control"


def test_hidden_and_empty_folders_are_no_domains(evaluate, data, tmp_path):
    (data / "text/a.txt").unlink()
    for name in (".git", "empty", "b"):
        (data / "text" / name).mkdir()
    spoil("text/.git/notes.md", "c")(data)
    spoil("text/b/b.txt", "b c d")(data)
    assert evaluate("--tasks", "local_perplexity").code == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"local_perplexity_b"}


def test_a_word_too_unlikely_for_a_float_does_not_end_an_evaluation(evaluate, tmp_path):
    result = evaluate("--tasks", "local_wikitext2")
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    found = {row["metric"]: row["values"][0] for row in rows}
    assert found["word_perplexity"] == sys.float_info.max
    assert 1 < found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    assert "| 1.798e+308 |" in result.out


@pytest.mark.slow
def test_a_task_file_that_is_no_yaml_is_named(evaluate, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/bad.yaml").write_text("task: my\n: :\n")
    result = evaluate("--tasks", "my", "--include-path", tmp_path / "own")
    assert result.code == 2 and "task 'my' does not exist" in result.err
    assert f"{tmp_path}/own/bad.yaml is not a task: " in result.err


def test_differences_of_groups_suites_and_averages_are_paired(evaluate, models, tmp_path):
    """By hand, from the answers to each item; in the table, and on the page of the report."""
    tasks = [f"local_blimp_{name}" for name in PARADIGMS]
    group = {"group": "both", "task": tasks[:2], "aggregate_metric_list": [
        {"metric": "acc", "weight_by_size": True}]}  # fmt: skip
    entries = [{"name": "grouped", "task": "both", "metric": "acc"},
               {"name": "even", "task": tasks[2:], "metric": "acc"}]  # fmt: skip
    average = [{"name": "average"}]
    suite = {"about": "Pairs.", "entries": entries, "averages": average, "percent": True}
    (tmp_path / "own").mkdir()
    (tmp_path / "own/both.yaml").write_text(yaml.safe_dump(group))
    (tmp_path / "own/s.yaml").write_text(yaml.safe_dump(suite))
    given = ("--suite", tmp_path / "own/s.yaml", "--baseline", models / "other")
    result = evaluate(*given)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out/results.json").read_text())
    rows = {row["task"]: row["differences"][0] for row in report["rows"]}
    sizes, (few, many, *others) = (8, 24), [rows[task] for task in tasks]
    assert rows["both"]["value"] == pytest.approx((8 * few["value"] + 24 * many["value"]) / 32)
    weighted = [n / 32 * d["error"] for n, d in zip(sizes, (few, many), strict=True)]
    assert rows["both"]["error"] == pytest.approx(math.hypot(*weighted))
    assert 0 < rows["both"]["p"] <= 1
    found = {row["name"]: row for row in report["suite"]["rows"]}
    even = found["even (local)"]["differences"][0]
    assert even["error"] == pytest.approx(50 * math.hypot(*(d["error"] for d in others)))
    assert found["grouped"]["differences"][0]["p"] == rows["both"]["p"]
    mean = found["average"]["differences"][0]
    grouped = found["grouped"]["differences"][0]
    assert grouped["error"] == pytest.approx(100 * rows["both"]["error"])
    assert mean["error"] == pytest.approx(math.hypot(grouped["error"], even["error"]) / 2)
    assert mean["value"] == pytest.approx((grouped["value"] + even["value"]) / 2)
    assert 0 < mean["p"] <= 1
    assert "dense - other" in result.out.splitlines()[2]
    page = tmp_path / "r.html"
    assert moe("report", tmp_path / "out", "--out", page).code == 0
    said = page.read_text()
    assert all(f'data-task="{name}"' in said for name in ("average", "even (local)", "both"))
