"""`moe tune rank` as a shell calls it."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import traces
from invoke import moe

from moe.tune.rank import CAUTION
from moe.tune.trace import Trace, hash_trace
from moe.tune.tuning import Tuning


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace of 4 x 8 experts with 3 planted."""
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    trace, truth = traces.planted(4, 8, 2, planted=3)
    trace.write(path)
    return path, trace, truth


def test_a_ranking_becomes_a_tuning_a_table_and_pictures(recorded, tmp_path):
    path, trace, truth = recorded
    out, table = tmp_path / "tuning.json", tmp_path / "all.csv"
    pictures = [tmp_path / "map.png", tmp_path / "map.svg"]
    result = moe(
        "tune", "rank", path, "--target", "BAD", "--out", out, "--top", 3, "--table", table,
        *(argument for picture in pictures for argument in ("--heatmap", picture)),
    )  # fmt: skip
    assert result.code == 0, result.err
    tuning = Tuning.read(out)
    tuning.check(trace.sites)
    tuning.check_model(traces.MODEL)
    assert {(edit.layer, edit.expert) for edit in tuning.experts} == truth
    assert tuning.shape == [[layer, "mlp", 8, 2] for layer in range(3, 7)]
    assert (tuning.semantics, tuning.created_from) == ("post_renorm", hash_trace(path))
    assert tuning.method["prompts"] == {
        "ranked": {"target": 42, "rest": 42}, "held_out": {"target": 18, "rest": 18}
    }  # fmt: skip
    ids = tuning.method["ids"]
    assert sorted(ids["ranked"] + ids["held_out"]) == sorted(row["id"] for row in trace.rows)
    assert CAUTION in tuning.method["notes"] and f"note: {CAUTION}" in result.out
    assert "32 experts were compared: at 95 % some 2 intervals" in result.out
    assert "3 of 3 chosen keep their sign" in result.out
    for edit in tuning.experts:
        row = rf"^ *{edit.layer} +mlp +{edit.expert} +{edit.found['score']:.4g} "
        assert re.search(row, result.out, re.M)
        low, high = edit.found["interval"]
        assert low < edit.found["score"] < high and edit.found["p"] < 0.01
        difference = edit.found["rate_target"] - edit.found["rate_rest"]
        assert difference == pytest.approx(edit.found["score"], abs=1e-5)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 32
    chosen = {(int(r["layer"]), int(r["expert"])) for r in rows if r["chosen"] == "1"}
    assert chosen == truth and all(picture.stat().st_size > 10_000 for picture in pictures)


def test_the_same_seed_writes_the_same_bytes(recorded, tmp_path):
    path, _, _ = recorded
    texts = []
    for number, seed in enumerate((5, 5, 6)):
        out = tmp_path / f"{number}.json"
        assert moe("tune", "rank", path, "--target", "BAD", "--out", out, "--seed", seed).code == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_json_is_one_object_with_what_the_file_has(recorded, tmp_path):
    path, _, _ = recorded
    out = tmp_path / "t.json"
    result = moe(
        "tune", "rank", path, "--target", "BAD", "--out", out, "--top", 2, "--least",
        "--action", "bias:-2", "--semantics", "pre_topk", "--score", "npmi", "--json",
    )  # fmt: skip
    printed, written = json.loads(result.out), json.loads(out.read_text())
    assert printed["experts"] == written["experts"] and printed["method"] == written["method"]
    assert all(edit["found"]["score"] < 0 for edit in written["experts"])
    assert {edit["action"] for edit in written["experts"]} == {"bias:-2"}
    assert written["method"]["least"] and written["semantics"] == "pre_topk"


def altered(trace, kind):
    """A trace with something wrong in it."""
    rows = trace.rows
    if kind == "no labels":
        rows = [row | {"label": None} for row in rows]
    elif kind == "one class":
        rows = [row | {"label": "BAD"} for row in rows]
    elif kind == "few":
        rows = [row | {"label": "BAD" if n == 0 else "GOOD"} for n, row in enumerate(rows)]
    elif kind == "empty":
        return dataclasses.replace(
            trace, rows=[], counts=trace.counts[:0], mass=trace.mass[:0], tokens=trace.tokens[:0]
        )
    elif kind == "no tokens":
        return dataclasses.replace(trace, tokens=np.zeros_like(trace.tokens))
    return dataclasses.replace(trace, rows=rows)


BAD_TRACES = {
    "no labels": r"none of the 120 prompts in the trace has a label\. Record .*--labels",
    "one class": r"every labelled prompt is 'BAD'",
    "few": r"class 'BAD' has 1 different prompts with tokens watched: an interval takes 2\.",
    "empty": r"the trace has 0 prompts",
    "no tokens": r"class 'BAD' has 0 different prompts with tokens watched",
}


@pytest.mark.parametrize("kind", BAD_TRACES)
def test_a_trace_that_cannot_be_ranked_says_why(recorded, tmp_path, kind):
    _, trace, _ = recorded
    path, out = tmp_path / "trace.npz", tmp_path / "t.json"
    altered(trace, kind).write(path)
    result = moe("tune", "rank", path, "--target", "BAD", "--out", out)
    assert result.code == 2 and re.match(rf"error: {BAD_TRACES[kind]}", result.err), result.err
    assert not out.exists()


BAD_OPTIONS = {
    "--target BADD": r"target='BADD' is not a label of the trace\. The closest are 'BAD' \(60 ",
    "--target BAD --vs BAD": r"vs='BAD' is the target itself",
    "--target BAD --vs good": r"vs='good' is not a label of the trace",
    "--target BAD --top 33": r"top=33: only 32 experts were compared",
    "--target BAD --score best": r"score='best' is unknown\. Use one of rate_diff, gate_mass_diff",
    "--target BAD --action stop": r"action='stop' is unknown\. Use off, force",
    "--target BAD --semantics post": r"semantics='post' is unknown\. Use one of post_zero",
    "--target BAD --part head": r"part='head' is unknown\. Use one of mlp, attention",
    "--target BAD --part attention": r"part='attention': the trace has no router there.* in mlp",
    "--target BAD --held-out 1": r"held_out=1\.0 must be from 0 to below 1",
    "--target BAD --held-out 0.99": r"held_out=0\.99: class 'BAD' has 60 .* 1 left to rank by",
    "--target BAD --held-out 0.001": r"held_out=0\.001: class 'BAD' has 60 .* 0 would be held out",
    "--target BAD --action force": r"action 'force': post_renorm acts after the choice\. Use pre_",
    "--target BAD --action gain:2 --semantics pre_topk": r"action 'gain:2': pre_topk acts on the ",
    "--target BAD --action force --semantics pre_topk --top 32":
        r"layer \d mlp: 8 experts are forced, a token has 2 places",
    "--target BAD --heatmap map.pdf": r"--heatmap map\.pdf must end in \.png or \.svg",
    "--target BAD --table nowhere/x.csv": r"nowhere/x\.csv: .*nowhere is not a folder",
}  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_options_that_make_no_sense_say_why(recorded, tmp_path, monkeypatch, options):
    path, _, _ = recorded
    monkeypatch.chdir(tmp_path)
    result = moe("tune", "rank", path, "--out", "t.json", *options.split())
    assert result.code == 2, result
    assert re.match(rf"error: {BAD_OPTIONS[options]}", result.err), result.err
    assert not list(tmp_path.iterdir())


def test_everything_wrong_is_said_at_once(recorded, tmp_path):
    path, _, _ = recorded
    out = tmp_path / "t.json"
    out.write_text("kept")
    result = moe(
        "tune", "rank", path, "--target", "BAD", "--out", out, "--score", "x", "--action", "y",
        "--heatmap", tmp_path / "z.gif",
    )  # fmt: skip
    assert result.code == 2 and len(result.err.splitlines()) == 4
    assert f"{out} exists." in result.err and out.read_text() == "kept"


def test_a_damaged_trace_is_said_to_be_one(recorded, tmp_path):
    path, _, _ = recorded
    damaged, out = tmp_path / "trace.npz", tmp_path / "t.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b""
    damaged.write_bytes(content)
    result = moe("tune", "rank", damaged, "--target", "BAD", "--out", out)
    assert result.code == 3 and "is not a trace" in result.err
    result = moe("tune", "rank", tmp_path / "none.npz", "--target", "BAD", "--out", out)
    assert result.code == 2 and "none.npz is not a file" in result.err
    assert Trace.read(path).rows and not out.exists()
