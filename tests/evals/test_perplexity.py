"""Sliding windows against logits by hand, and the harness's rolling protocol."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from invoke import moe
from lm_eval.api.instance import Instance
from torch.nn import functional as F

from moe.errors import UserError
from moe.evals import perplexity
from moe.evals.adapter import MoeLM

TEXT = "def add(left, right):\n    return left + right\n\n\nclass Router:\n    pass\n"
TEXTS = [TEXT, "A car stopped.", TEXT[::-1] * 2, "x"]
POSITIONS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A dense model, its MoH with MoE, and a model that looks ahead; a letter is a token."""
    root = tmp_path_factory.mktemp("models")
    dense = tiny.dense_model("llama", max_position_embeddings=POSITIONS)
    ahead = {"kind": "uoe", "num_experts": 4, "top_k": 2, "mode": "expert_choice"}
    models = {
        "dense": dense,
        "routed": tiny.routed_model(dense, tiny.MOH, tiny.MOE),
        "ahead": tiny.routed_model(dense, None, ahead),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return {name: root / name for name in models}


def ask(lm: MoeLM, texts: list[str], window: int | None, stride: int | None) -> list[Any]:
    requests = [
        Instance(perplexity.REQUEST, {}, (t, window, stride), i) for i, t in enumerate(texts)
    ]
    return lm.sliding_windows(requests)


@torch.no_grad()
def plain(lm: MoeLM, tokens: list[int], count: int) -> float:
    """Log-likelihood of the last `count` tokens from one forward pass over those before them."""
    logits = lm.model(torch.tensor([tokens[:-1]])).logits[0, -count:]
    chosen = F.log_softmax(logits, -1, dtype=torch.float32)
    return float(chosen.gather(1, torch.tensor(tokens[-count:])[:, None]).sum())


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_what_fits_into_one_window_is_one_forward_pass(name, folders):
    lm = MoeLM(folders[name], batch_size=1)
    assert lm.max_length == POSITIONS
    text = TEXT[:POSITIONS]
    tokens = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert len(tokens) == POSITIONS + 1  # as much as the window holds
    ((found, count),) = ask(lm, [text], None, None)
    assert (found, count) == (plain(lm, tokens, POSITIONS), POSITIONS)
    ((short, _),) = ask(lm, [text], POSITIONS // 2, None)
    assert short != found  # negative control: less is known


@pytest.mark.parametrize("name", ["dense", "routed"])
@pytest.mark.parametrize("window", [24, 7])
def test_with_stride_equal_to_the_window_it_is_the_harnesss_rolling(name, window, folders):
    lm = MoeLM(folders[name], batch_size=1, max_length=window)
    rolling = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(TEXTS)]
    expected = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    found = [value for value, _ in ask(lm, TEXTS, window, window)]
    assert found == pytest.approx(expected, rel=1e-6)
    assert [v for v, _ in ask(lm, TEXTS, window, 3)] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("window", "stride"), [(9, 4), (9, 1), (24, None), (2, 2)])
def test_windows_by_hand(window, stride, folders):
    """Each token once, by a window that ends where its stride does."""
    lm = MoeLM(folders["routed"], batch_size=3)
    step = stride or window // 2
    for text in TEXTS:
        tokens = [lm.prefix_token_id, *lm.tok_encode(text)]
        total, end = 0.0, min(len(tokens) - 1, window)
        first = end
        while True:
            total += plain(lm, tokens[max(0, end - window) : end + 1], first)
            if end == len(tokens) - 1:
                break
            first = min(step, len(tokens) - 1 - end)
            end += first
        ((found, count),) = ask(lm, [text], window, stride)
        assert count == len(tokens) - 1
        assert math.isclose(found, total, rel_tol=1e-5)


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_neither_batch_nor_padding_matters(name, folders, monkeypatch):
    alone = [ask(MoeLM(folders[name], batch_size=1), [t], 9, 4)[0] for t in TEXTS]
    together = [ask(MoeLM(folders[name], batch_size=size), TEXTS, 9, 4) for size in (2, 5, 64)]
    for found in together:
        assert [count for _, count in found] == [count for _, count in alone]
        assert [v for v, _ in found] == pytest.approx([v for v, _ in alone], rel=1e-6)
    # negative control: a model in which rows of a batch see each other
    lm = MoeLM(folders[name], batch_size=5)
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda ids: call(ids) + call(ids).mean(0, keepdim=True))
    mixed = ask(lm, TEXTS, 9, 4)
    assert [v for v, _ in mixed] != pytest.approx([v for v, _ in alone], rel=1e-2)


def test_a_model_in_bfloat16_is_scored_in_float32(folders):
    lm = MoeLM(folders["dense"], batch_size=1)
    lm.model.bfloat16()
    tokens = [lm.prefix_token_id, *lm.tok_encode(TEXT[:POSITIONS])]
    ((found, _),) = ask(lm, [TEXT[:POSITIONS]], None, None)
    assert found == plain(lm, tokens, POSITIONS)
    assert lm.softmax_dtype is None  # as it was, for other tasks
    rolling = [Instance("loglikelihood_rolling", {}, (TEXT[:POSITIONS],), 0)]
    (rounded,) = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert rounded != found and math.isclose(rounded, found, rel_tol=0.02)


def test_texts_that_repeat_themselves_are_scored_at_their_own_places(folders):
    """Windows of the same tokens whose predictions begin elsewhere, in one batch."""
    texts = [("ab" * 12)[:length] for length in range(12, 24)]
    alone = [ask(MoeLM(folders["dense"], batch_size=1), [t], 9, 4)[0] for t in texts]
    lm = MoeLM(folders["dense"], batch_size=64)
    together = ask(lm, texts, 9, 4)
    assert [v for v, _ in together] == pytest.approx([v for v, _ in alone], rel=1e-6)
    lm._exactly = contextlib.nullcontext  # negative control: as the harness would
    assert [v for v, _ in ask(lm, texts, 9, 4)] != pytest.approx([v for v, _ in alone], rel=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [(25, None, "24 positions"), (8, 9, "to the window"), (0, None, "Use 1"), (8, 0, "use 1")],
)
def test_impossible_windows_are_refused(window, stride, message):
    with pytest.raises(UserError, match=message):
        perplexity.sizes(24, window, stride)


def write(folder: Path) -> Path:
    for domain, texts in {"code": TEXTS[:3], "prose": ["A car stopped.", "Tara burnt it."]}.items():
        path = folder / "text" / domain / "held-out.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.mark.slow
def test_the_command_by_hand(folders, tmp_path):
    """Every unit, the domains, windows of --window and --stride, intervals over documents."""
    data, out = write(tmp_path / "data"), tmp_path / "out"
    arguments = ("--tasks", "local_perplexity", "--data", data, "--window", 9, "--stride", 4)
    result = moe(
        "eval", folders["routed"], *arguments, "--baseline", folders["dense"], "--out", out
    )
    assert result.code == 0, result.err
    rows = json.loads((out / "results.json").read_text())["rows"]
    found = {(row["task"], row["metric"]): row for row in rows}
    texts = TEXTS[:3]
    values = {n: ask(MoeLM(folders[n]), texts, 9, 4) for n in ("routed", "dense")}
    units = {
        "token_perplexity": [count for _, count in values["routed"]],
        "word_perplexity": [len(text.split()) for text in texts],
        "byte_perplexity": [len(text.encode()) for text in texts],
    }
    for metric, sizes in units.items():
        row = found["local_perplexity_code", metric]
        for value, name in zip(row["values"], ("routed", "dense"), strict=True):
            loss = -sum(likelihood for likelihood, _ in values[name]) / sum(sizes)
            assert math.isclose(value, math.exp(loss), rel_tol=1e-5)
        for (low, high), value in zip(row["intervals"], row["values"], strict=True):
            assert low < value < high
        assert row["differences"][0]["error"] > 0
        assert row["differences"][0]["why"] == "too few items (3)"
    bits = found["local_perplexity_prose", "bits_per_byte"]
    assert bits["values"][0] == pytest.approx(
        math.log2(found["local_perplexity_prose", "byte_perplexity"]["values"][0])
    )
    for wrong in ((25, 4), (8, 9)):
        options = ("--window", wrong[0], "--stride", wrong[1], "--out", tmp_path / "none")
        refused = moe("eval", folders["dense"], *arguments[:4], *options)
        assert refused.code == 2 and f"{max(wrong)}" in refused.err


def test_what_looks_ahead_has_no_perplexity(folders, tmp_path):
    data = write(tmp_path / "data")
    arguments = ("--tasks", "local_perplexity", "--data", data, "--out", tmp_path / "out")
    result = moe("eval", folders["ahead"], *arguments)
    assert result.code == 2 and "not causal" in result.err and not (tmp_path / "out").exists()


def test_windows_that_no_task_reads_are_refused(folders, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/valid.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c"}\n')
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n")
    arguments = ["--tasks", "local_piqa", "--data", tmp_path, "--out", tmp_path / "out"]
    refused = moe("eval", folders["dense"], *arguments, "--window", 8)
    assert refused.code == 2 and "--window and --stride are for local_perplexity" in refused.err
    assert not (tmp_path / "out").exists()
    assert moe("eval", folders["dense"], *arguments).code == 0, "negative control"
