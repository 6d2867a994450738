"""Text for routers between branches: how much of each label is read, and what is refused."""

import json

import pytest
from planted_branches import NAMES, TOKENS, build, calibration, letters, lines, plant, sources

from moe.errors import UserError
from moe.upcycle.calibrate.labels import of_little, read_labelled
from moe.upcycle.calibrate.parts import Branches
from moe.upcycle.recipes.conversion import config_of
from moe.upcycle.source import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("planted"))


def test_every_label_gets_the_same_share_of_the_tokens(folder):
    ids, labels = calibration(folder, "label")
    assert sum(map(len, ids)) == TOKENS and labels.bincount().tolist() == [TOKENS // 3] * 3


def test_labels_may_be_any_where_losses_are_the_target(folder, tmp_path):
    """They only tell domains apart; a label of its own for each line takes no more text."""
    config = config_of(Source.open(folder / NAMES[0]))
    path = tmp_path / "text.jsonl"
    for labels, count in (("code", "prose", "maths"), TOKENS), ((1, 2, "x"), TOKENS):
        wanted = Branches(("mlp",), 3, "loss")
        given = [folder / name for name in NAMES], lines(path, labels), TOKENS, config
        assert sum(map(len, read_labelled(wanted, *given))) == count and not wanted.labels
    path.write_text(
        "".join(json.dumps({"text": letters(0, i), "label": i}) + "\n" for i in range(50))
    )
    found = read_labelled(Branches(("mlp",), 3, "loss"), *given)
    assert TOKENS - 2 < sum(map(len, found)) < TOKENS + 100


@pytest.fixture
def refused(folder, moe_upcycle, tmp_path):
    """`refused(rows, …)`: what is said about a text of these rows, in one line."""

    def call(rows, *options, recipe="btx"):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ("--calibrate", path, "--calibration-tokens", TOKENS, "--no-verify")
        result = moe_upcycle(recipe, *sources(folder), *options, *given, "--out", tmp_path / "o")
        assert result.code == 2 and not (tmp_path / "o").exists()
        assert not (tmp_path / "o.partial").exists()
        assert len(result.err.strip().splitlines()) == 1, result.err
        return result.err

    return call


def rows(*labels: object) -> list[dict[str, object]]:
    return [
        {"text": letters(i % 3, seed)} | ({} if label is None else {"label": label})
        for seed in range(8)
        for i, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((*NAMES, "dill"), "'dill', which is no source. Use a number from 0 to 2, or apple, birch"),
        ((0, 1, 2, 3), "label 3, which is no source"),
        ((0, 1, True), "True, which is neither a number nor a name"),
        ((0, 1.5, 2), "1.5, which is neither a number nor a name"),
        ((0, 1), "no text for source 2"),
        ((0, 1, None), "line 3 has no label"),
        ((None, 1, 2), "line 2 has a label and the first one has none"),
    ],
)
def test_bad_labels_are_refused(labels, said, refused):
    assert said in refused(rows(*labels))


def test_too_little_text_no_labels_and_options_apart_are_refused(
    refused, folder, moe_upcycle, tmp_path
):
    assert "has no labels" in refused(rows(None), "--target", "label")
    short = [{"text": letters(i, 0, 40), "label": i} for i in range(3)]
    assert "gives 120 tokens" in refused(short)
    assert "unknown to the tokenizer" in refused(
        [{"text": "é" * 600, "label": i} for i in range(3)]
    )
    given = (*sources(folder), "--no-verify", "--out", tmp_path / "out")
    result = moe_upcycle("btx", *given, "--target", "loss")
    assert result.code == 2 and "--target loss is for --router calibrated" in result.err
    result = moe_upcycle("bam", *given, "--router", "calibrated")
    assert result.code == 2 and "need --calibrate FILE" in result.err
    text = ("--calibrate", folder / "labelled.jsonl")
    result = moe_upcycle("btx", *given, "--router", "random", *text)
    assert result.code == 2 and "--calibrate is for" in result.err
    result = moe_upcycle("btx", *given, "--dry-run", *text)
    assert result.code == 0 and "between 3 sources" in result.out, result.err


def test_two_folders_of_one_name_go_by_number(folder, tmp_path):
    """Negative control: by name neither is meant."""
    other = plant(tmp_path / NAMES[0], 1)
    config = config_of(Source.open(other))
    given = [folder / NAMES[0], other], lines(tmp_path / "t.jsonl", (0, 1, 0)), TOKENS, config
    wanted = Branches(("mlp",), 2, None)
    assert read_labelled(wanted, *given) and set(wanted.labels) == {0, 1}
    lines(tmp_path / "t.jsonl", (NAMES[0], 1, 0))
    with pytest.raises(UserError, match=r"no source\. Use a number from 0 to 1\."):
        read_labelled(Branches(("mlp",), 2, None), *given)


def test_a_source_with_next_to_no_text_is_named(folder, moe_upcycle, tmp_path):
    config = config_of(Source.open(folder / NAMES[0]))
    path = tmp_path / "text.jsonl"
    given = [{"text": letters(2, 0)[:40], "label": 2}]
    given += [{"text": letters(i, seed), "label": i} for seed in range(40) for i in (0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    folders = [folder / name for name in NAMES]
    wanted = Branches(("mlp",), 3, None)
    windows = read_labelled(wanted, folders, path, TOKENS, config)
    (said,) = of_little(wanted, folders, path, TOKENS, windows)
    assert f"40 tokens for source 2 ({folders[2]})" in said
    result = moe_upcycle(
        "btx", *sources(folder), "--calibrate", path, "--calibration-tokens", TOKENS, "--dry-run",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0 and f"warning: {said}" in result.err
    lines(path, (0, 1, 2))
    windows = read_labelled(wanted, folders, path, TOKENS, config)
    assert not of_little(wanted, folders, path, TOKENS, windows)
