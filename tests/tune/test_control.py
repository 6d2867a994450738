"""`moe tune control`: what a tuning does is held against the same done to other experts."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke import moe
from planted import plant
from torch.nn import functional as F

from moe.errors import UserError
from moe.tune.families import Site, columns
from moe.tune.legality import emptied
from moe.tune.matched import KINDS, NEAREST, draw
from moe.tune.measure import losses, windows
from moe.tune.prompts import Encoded
from moe.tune.subject import Subject
from moe.tune.tuning import Edit, Tuning, shape_of

RULES = "on: response\ndefault: ANSWERED\nlabels:\n  REFUSED: ['^!']\n"


@pytest.fixture(scope="module")
def behaviour(tmp_path_factory):
    """A folder with a planted model, its prompts, their trace and the tuning ranked from it."""
    folder = tmp_path_factory.mktemp("planted")
    known = plant("routed_llama")
    prompts = known.save(folder / "model")
    (folder / "rules.yaml").write_text(RULES)
    trace, tuning = folder / "trace.npz", folder / "tuning.json"
    made = moe("tune", "record", folder / "model", "--prompts", prompts, "--out", trace)
    assert made.code == 0, made.err
    ranked = moe("tune", "rank", trace, "--target", "refused", "--top", len(known.experts),
                 "--out", tuning, "--held-out", 0.5)  # fmt: skip
    assert ranked.code == 0, ranked.err
    return folder, known


def run(folder, out, *more):
    result = moe(
        "tune", "control", folder / "model", "--tuning", folder / "tuning.json", "--prompts",
        folder / "model" / "prompts.jsonl", "--out", out, "--json", *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.slow
def test_planted_experts_are_found_and_matched_ones_change_nothing(behaviour, tmp_path):
    folder, known = behaviour
    edits = Tuning.read(folder / "tuning.json").experts
    assert {(e.layer, e.expert) for e in edits} == known.experts
    how = ("--measure", "label", "--labels", folder / "rules.yaml", "--target", "REFUSED",
           "--generate", 1, "--seeds", 2)  # fmt: skip
    result = run(folder, tmp_path / "out", *how)
    rows = {row["group"]: row for row in result["groups"]}
    assert rows["refused"]["plain"] >= 0.95 and rows["refused"]["tuned"] <= 0.05
    for kind in KINDS:
        assert min(rows["refused"]["controls"][kind]["values"]) >= 0.9, kind
        assert rows["refused"]["controls"][kind]["smaller"] == 2
    assert rows["answered"]["plain"] == rows["answered"]["tuned"] == 0.0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "larger than that of 6 of 6 control sets" in page and "prove nothing" in page
    assert (tmp_path / "out" / "dose.png").stat().st_size > 10_000


@pytest.mark.slow
def test_other_experts_do_not_pass_for_planted_ones(behaviour, tmp_path):
    """Negative control: a tuning of the experts that matter least."""
    folder, _ = behaviour
    good = Tuning.read(folder / "tuning.json")
    planted = {(e.layer, e.expert) for e in good.experts}
    good.experts = [Edit(layer=e.layer, expert=(e.expert + 1) % 32) for e in good.experts]
    assert not planted & {(e.layer, e.expert) for e in good.experts}
    (tmp_path / "model").symlink_to(folder / "model")
    good.write(tmp_path / "tuning.json")
    how = ("--measure", "label", "--labels", folder / "rules.yaml", "--target", "REFUSED",
           "--generate", 1, "--seeds", 1)  # fmt: skip
    result = run(tmp_path, tmp_path / "out", *how)
    row = next(r for r in result["groups"] if r["group"] == "refused")
    assert row["tuned"] >= 0.9
    assert "cannot be told from none" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_loss_is_perplexity_and_doses_run_from_nothing_to_all(behaviour, tmp_path):
    folder, _ = behaviour
    (tmp_path / "text.txt").write_text("abc " * 200)
    result = run(folder, tmp_path / "out", "--seeds", 1, "--kind", "random", "--text",
                 tmp_path / "text.txt")  # fmt: skip
    assert [row["group"] for row in result["groups"]] == ["refused", "answered", "text: text.txt"]
    assert sum(row["prompts"] for row in result["groups"][:2]) == 32  # half of them ranked
    row = result["groups"][0]
    assert math.isclose(row["change"], math.log(row["tuned"] / row["plain"]), rel_tol=1e-9)
    assert row["interval"][0] <= row["change"] <= row["interval"][1]
    tuned = [c for c in result["conditions"] if c["kind"] == "tuned"]
    assert {len(c["experts"]) for c in tuned} == {1, 2, 4, 5}
    assert {c["scale"] for c in tuned} == {0.25, 0.5, 0.75, 1.0}
    # the plain model's number does not depend on what is compared with it
    again = run(folder, tmp_path / "again", "--seeds", 2, "--kind", "layer_matched")
    assert again["groups"][0]["plain"] == row["plain"]


def site(layer, experts=8, **more):
    fields = {"part": "mlp", "top_k": 2, "kind": "softmax", "module": f"layers.{layer}.mlp.router"}
    return Site(layer=layer, experts=experts, **(fields | more))


FOUND = [site(layer) for layer in range(6)]


def tuning_of(edits, found=FOUND):
    return Tuning(semantics="post_renorm", experts=edits, shape=shape_of(found))


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=9),
    st.sampled_from(KINDS),
    st.integers(0, 99),
)
def test_matched_sets_are_others_of_the_same_number(own, kind, seed):
    edits = [Edit(layer=layer, expert=expert) for layer, expert in sorted(own)]
    rate_C = np.random.default_rng(1).random(columns(FOUND)[-1])
    drawn = draw(kind, tuning_of(edits), FOUND, rate_C, seed)
    places = {(e.layer, e.expert) for e in drawn}
    assert len(places) == len(drawn) == len(own) and not places & own
    assert draw(kind, tuning_of(edits), FOUND, rate_C, seed) == drawn
    if kind == "layer_matched":
        assert sorted(e.layer for e in drawn) == sorted(layer for layer, _ in own)


def test_rate_matched_experts_are_as_busy_and_random_ones_are_not():
    rate_C = np.linspace(0, 1, columns(FOUND)[-1])  # the last layers' experts are the busiest
    busy = tuning_of([Edit(layer=5, expert=e) for e in (6, 7)])
    near = [draw("rate_matched", busy, FOUND, rate_C, seed) for seed in range(20)]
    lowest = min(rate_C[e.layer * 8 + e.expert] for edits in near for e in edits)
    assert lowest >= rate_C[-2 - NEAREST - 2]
    far = [draw("random", busy, FOUND, rate_C, seed) for seed in range(20)]
    assert min(rate_C[e.layer * 8 + e.expert] for edits in far for e in edits) < 0.3


def test_a_set_that_no_router_can_take_is_refused():
    found = [site(0, experts=4)]
    tuning = tuning_of([Edit(layer=0, expert=e) for e in range(3)], found)
    with pytest.raises(UserError, match="no other expert to stand for it"):
        draw("random", tuning, found, np.zeros(4), 0)


def test_shared_heads_stand_for_shared_heads_alone():
    found = [site(n, 9, part="attention", kind="moh", top_k=6, always=(0, 1, 4)) for n in range(3)]
    tuning = tuning_of([Edit(layer=0, expert=1, part="attention"),
                        Edit(layer=1, expert=5, part="attention")], found)  # fmt: skip
    for seed in range(10):
        drawn = draw("random", tuning, found, np.zeros(27), seed)
        assert sorted(e.expert in (0, 1, 4) for e in drawn) == [False, True]


def test_losses_are_those_of_single_prompts():
    model = tiny.routed_model(tiny.dense_model(), mlp=tiny.MOE)
    subject = Subject(folder=None, model=model, tokenizer=None, sites=[], identity={}, tuning=None,
                      scale=1.0)  # fmt: skip
    rows = [Encoded([5, 6, 7, 8], None), Encoded([9, 10], [11, 12, 13]), Encoded([20] * 9, None)]
    nll, counts = losses(subject, rows, batch_size=3)
    assert counts.tolist() == [3, 3, 8]
    for entry, found in zip(rows, nll, strict=True):
        ids = torch.tensor([[*entry.prompt, *(entry.response or ())]])
        with torch.no_grad():
            log_SV = F.log_softmax(model(ids).logits[0].double(), -1)
        start = len(entry.prompt) if entry.response else 1
        hand = -sum(log_SV[n - 1, ids[0, n]].item() for n in range(start, ids.shape[1]))
        assert math.isclose(found, hand, rel_tol=1e-5)


def test_a_text_is_cut_into_whole_windows():
    assert [w.prompt for w in windows(range(11), 4, 100)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(windows(range(1000), 4, 20)) == 5


BAD = {
    "kind": (("--kind", "nearest"), "--kind nearest: use random, rate_matched, layer_matched."),
    "rules": (("--measure", "label"), "--measure label asks what responses are called"),
    "target": (("--target", "refusd"), "no prompt is labelled 'refusd'; there are refused"),
    "text": (("--text", "none.txt"), "--text none.txt does not exist."),
    "tasks": (("--data", "."), "--data and --task-limit go with --tasks."),
    "scale": (("--scale", "2"), "--scale 2 must be between 0 and 1."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(behaviour, tmp_path, case):
    folder, _ = behaviour
    more, expected = BAD[case]
    result = moe("tune", "control", folder / "model", "--tuning", folder / "tuning.json",
                 "--prompts", folder / "model" / "prompts.jsonl", "--out", tmp_path / "o",
                 *more)  # fmt: skip
    assert result.code == 2 and expected in result.err, result.err
    assert not (tmp_path / "o").exists()


def test_prompts_that_ranked_are_left_out_and_none_left_is_an_error(behaviour, tmp_path):
    folder, _ = behaviour
    tuning = Tuning.read(folder / "tuning.json")
    rows = (folder / "model" / "prompts.jsonl").read_text().splitlines()
    seen = tmp_path / "seen.jsonl"
    from moe.tune.prompts import read

    used = set(tuning.method["ids"]["ranked"])
    lines = [p.line - 1 for p in read(folder / "model" / "prompts.jsonl") if p.id in used]
    seen.write_text("\n".join(rows[n] for n in lines) + "\n")
    result = moe("tune", "control", folder / "model", "--tuning", folder / "tuning.json",
                 "--prompts", seen, "--out", tmp_path / "o")  # fmt: skip
    assert result.code == 2 and "were used to rank these experts" in result.err


def test_sets_are_different_and_busy_ones_are_said_to_be(behaviour, tmp_path):
    folder, _ = behaviour
    result = run(folder, tmp_path / "out", "--kind", "rate_matched", "--seeds", 3)
    sets = [c["experts"] for c in result["conditions"] if c["kind"] == "rate_matched"]
    assert len(sets) == 3 and all(a != b for n, a in enumerate(sets) for b in sets[:n])
    rates = [c["rate"] for c in result["conditions"] if len(c["experts"]) == 5]
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"tuned {rates[0]:.3g}" in page and "3 as busy experts" in page


def test_no_set_counts_twice():
    from moe.tune.control import Plan, conditions

    found = [site(0, experts=4)]
    subject = Subject(folder=None, model=None, tokenizer=None, sites=found, identity={},
                      tuning=None, scale=1.0)  # fmt: skip
    tuning = tuning_of([Edit(layer=0, expert=0), Edit(layer=0, expert=1)], found)
    plan = Plan(kinds=("layer_matched",), seeds=20)
    made = conditions(tuning, subject, np.zeros(4), plan)
    assert [c.seed for c in made if c.kind == "layer_matched"] == [0]  # {2, 3} is all there is


MORE_BAD = {
    "a label that no rule has": (("--measure", "label", "--labels", "RULES", "--target", "NONE"),
                                 "no response can be called 'NONE'"),
    "a task that does not exist": (("--tasks", "local_piqq"), "task 'local_piqq' does not exist"),
    "a text that is none": (("--text", "BYTES"), "cannot be read as text"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_BAD)
def test_bad_input_is_found_before_anything_is_measured(behaviour, tmp_path, case):
    folder, _ = behaviour
    more, expected = MORE_BAD[case]
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    names = {"RULES": folder / "rules.yaml", "BYTES": tmp_path / "bytes"}
    result = moe("tune", "control", folder / "model", "--tuning", folder / "tuning.json",
                 "--prompts", folder / "model" / "prompts.jsonl", "--out", tmp_path / "o",
                 *(names.get(word, word) for word in more))  # fmt: skip
    assert result.code == 2 and expected in result.err, result.err
    assert not (tmp_path / "o").exists() and "conditions" not in result.err


def test_controls_do_not_switch_whole_layers_off():
    found = [site(layer, experts=4) for layer in range(6)]
    tuning = tuning_of([Edit(layer=layer, expert=0) for layer in range(5)], found)
    assert emptied(tuning, found) == []
    for seed in range(40):
        drawn = draw("random", tuning, found, np.zeros(24), seed)
        places = [e.layer for e in drawn]
        assert max(places.count(layer) for layer in places) == 1  # two are all that a token has
    both = tuning_of([Edit(layer=0, expert=0), Edit(layer=0, expert=1)], found)
    assert emptied(both, found) == found[:1]
    sets = [draw("random", both, found, np.zeros(24), seed) for seed in range(40)]
    assert any(a.layer == b.layer for a, b in sets)  # where the tuning does, they may
