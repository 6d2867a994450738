"""`moe tune chat`, driven through the standard input of a real process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recordings import folder_of, subject

from moe.errors import UserError
from moe.tune.chat import Session
from moe.tune.generation import Sampling
from moe.tune.tuning import Edit, Tuning

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folder_of("bam", tmp_path_factory.mktemp("models") / "bam")


def session(name: str = "bam", tuning: Tuning | None = None) -> Session:
    scale = 1.0 if tuning is None else tuning.scale
    given = subject(name, tuning=tuning, scale=scale)
    return Session(given, Sampling(max_new_tokens=8), chat=False)


def said(of: Session, *lines: str) -> list[str]:
    """Answers of all lines; an error is one."""
    found = []
    for line in lines:
        try:
            found += list(of.say(line))
        except UserError as error:
            found.append(f"error: {error}")
    return found


@pytest.mark.slow
def test_a_session_through_a_pipe(model, tmp_path):
    lines = [
        "abc",
        "/off 0 1",
        "/off 0 9",
        "/off 1 2 attention",
        "/nonsense",
        "abc",
        "",
        "/scale 0.25",
        "/again",
        f"/save {tmp_path / 'saved.json'}",
        f"/save {tmp_path / 'saved.json'}",
        f"/save {tmp_path / 'no' / 'saved.json'}",
        "/undo",
        "/show",
        "/quit",
        "/help",
    ]
    words = ["tune", "chat", model, "--max-new-tokens", 8]
    result = subprocess.run(
        [sys.executable, "-m", "moe", *map(str, words)],
        check=False, input="\n".join(lines), text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    out = result.stdout
    order = [
        "--- without\n",
        "1 expert off (post_zero), scale 1\n",
        "error: layer 0 mlp expert 9 off: experts there are 0 to 3.",
        "1 expert off, 1 attention part off (post_zero), scale 1\n",
        "error: /nonsense is not a command here.",
        "--- with 1 expert off, 1 attention part off (post_zero), scale 1\n",
        "(post_zero), scale 0.25\n",
        "--- with 1 expert off, 1 attention part off (post_zero), scale 0.25\n",
        f"scale 0.25: {tmp_path / 'saved.json'}\n",
        "saved.json exists. Choose another name.\n",
        "No such file or directory\n",
        "1 expert off, 1 attention part off (post_zero), scale 1\nlayer 0 mlp expert 1 off\n"
        "layer 1 attention expert 2 off\n",
    ]
    place = 0
    for text in order:
        assert text in out[place:], (text, out)
        place = out.index(text, place)
    assert "/semantics NAME" not in out, "nothing is read after /quit"
    assert "Traceback" not in result.stderr
    saved = Tuning.read(tmp_path / "saved.json")
    assert saved.scale == 0.25 and saved.method == {"by": "hand"} and len(saved.experts) == 2
    assert saved.model["name"] == "bam" and saved.shape
    of = session(tuning=saved)
    for text in said(of, "abc"):
        assert text in out


def test_the_tuning_is_at_work_in_the_second_response_alone():
    of = session("moe")
    plain = said(of, "abc")
    said(of, *[f"/gain {g} {layer} {e}" for layer in range(3) for e in (0, 1) for g in (-3,)])
    both = said(of, "/again")
    assert both[0] == plain[0] and "6 experts gain:-3" in both[1]
    assert both[1].split("\n")[1] not in plain[0] and "(the same)" not in both[1]
    said(of, "/scale 0")
    assert said(of, "/again")[1].endswith("(the same)")


def test_changes_are_checked_and_can_be_taken_back():
    of = session("moe")
    assert "Use pre_topk or pre_select" in said(of, "/force 0 1")[0]
    assert of.state.edits == () and of.earlier == []
    assert said(of, "/semantics pre_topk", "/force 0 1", "/force 0 2") == [
        "no tuning",
        "1 expert force (pre_topk), scale 1",
        "2 experts force (pre_topk), scale 1",
    ]
    assert "3 experts are forced, a token has 2 places" in said(of, "/force 0 3")[0]
    assert said(of, "/off 0 2")[0] == "1 expert force, 1 expert off (pre_topk), scale 1"
    assert said(of, "/bias 1.50 1 0")[0].startswith(
        "1 expert force, 1 expert off, 1 expert bias:1.5"
    )
    assert (
        "A gain" in said(of, "/gain 2 1 1")[0] or "a gain on weights" in said(of, "/gain 2 1 1")[0]
    )
    said(of, "/undo", "/undo", "/undo", "/undo", "/undo")
    assert of.state.edits == () and of.state.semantics == "post_zero"
    assert said(of, "/undo") == ["error: there is nothing to take back."]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/", "/ is not a command"),
        ("/off", "usage: /off LAYER EXPERT [attention]"),
        ("/off a 1", "usage: /off"),
        ("/off -1 1", "-1 is not a number from 0 on"),
        ("/off 0 1 head", "what is 'head'?"),
        ("/off 0 1 attention", "no router there"),
        ("/gain x 0 1", "usage: /gain NUMBER LAYER EXPERT"),
        ("/gain nan 0 1", "a number below"),
        ("/scale", "usage: /scale S"),
        ("/scale 2", "must be between 0 and 1"),
        ("/semantics off", "takes one of post_zero, post_renorm, pre_topk, pre_select"),
        ("/again", "there was no prompt yet"),
        ("/save", "/save FILE"),
        ("/save x.json", "there is no tuning to save"),
        ("a" * 600, "longer than the model's 512 positions"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(line, text):
    of = session("moe")
    before = of.state
    (answer,) = said(of, line)
    assert answer.startswith("error: ") and text in answer and "\n" not in answer
    assert of.state == before and of.earlier == []


def test_a_tuning_that_was_given_is_where_it_starts():
    edits = [Edit(layer=0, expert=1, action="gain:0.5", found={"score": 1})]
    given = Tuning(semantics="post_renorm", experts=edits, method={"score": "rate_diff"})
    of = session("moe", given)
    assert said(of, "/show") == [
        "1 expert gain:0.5 (post_renorm), scale 1\nlayer 0 mlp expert 1 gain:0.5"
    ]
    assert of.tuning is not None and of.tuning.method == {"score": "rate_diff"}
    said(of, "/off 1 1")
    assert of.tuning.method == {"by": "hand", "from": {"score": "rate_diff"}}
    assert of.tuning.experts[0].found == {"score": 1}
