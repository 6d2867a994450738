"""What a tuning cannot mean is refused in one line, and what it does beyond its words is said."""

import json
import shutil

import mixtures
import pytest
import tiny
import torch
import traces
from invoke import moe
from safetensors.torch import load_file, save_file

from moe.errors import UserError
from moe.hf.loading import identity
from moe.tune.families import sites
from moe.tune.intervene import tuned, watching
from moe.tune.legality import problems
from moe.tune.plot import dose_curve
from moe.tune.tuning import Edit, Tuning


def tuning_of(semantics, **actions):
    """`e3="off"`: of expert 3 in the first layer that has any."""
    edits = [Edit(layer=1, expert=int(name[1:]), action=a) for name, a in actions.items()]
    return Tuning(semantics=semantics, experts=edits)


def share_on(model, tuning, expert):
    """Of tokens that have an expert of layer 1 among their choices."""
    found = sites(model)
    seen = []

    def see(number, indices, weights, chosen):
        if found[number].layer == 1:
            seen.append((indices == expert).any(-1).float().mean().item())

    with torch.no_grad(), tuned(model, tuning), watching(model, found, see):
        model(tiny.tokens(4, 32))
    return seen[0]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_what_is_forced_is_on_or_refused(name):
    model = mixtures.build(name)
    site = next(s for s in sites(model) if s.layer == 1)
    size = site.experts // site.groups
    apart = {f"e{group * size}": "force" for group in range(site.top_groups + 1)}
    with pytest.raises(UserError, match=f"experts of {len(apart)} groups are forced"):
        tuning_of("pre_select", **apart).check(sites(model))
    alone = {"e0": "force", **{f"e{e}": "off" for e in range(1, size)}}
    with pytest.raises(UserError, match="its score says nothing"):
        tuning_of("pre_select", **alone).check(sites(model))
    # as many as there are groups to choose from, or one more of a group left: on for every token
    for group in range(site.top_groups):
        legal = {f"e{g * size}": "force" for g in range(site.top_groups)}
        assert share_on(model, tuning_of("pre_select", **legal), group * size) == 1.0
    assert share_on(model, tuning_of("pre_topk", **apart), site.top_groups * size) == 1.0
    assert share_on(model, None, 0) < 1.0


def test_all_of_a_tokens_experts_off_is_said_and_leaves_it_nothing():
    model = mixtures.build("mixtral")
    found = sites(model)
    site = next(s for s in found if s.layer == 1)
    some = tuning_of("post_renorm", **{f"e{e}": "off" for e in range(site.top_k)})
    (said,) = some.cautions(found)
    assert f"as many experts are off as a token has ({site.top_k})" in said
    assert tuning_of("post_renorm", e0="off").cautions(found) == []
    assert tuning_of("pre_topk", e0="off", e1="off").cautions(found) == []
    totals = []

    def see(number, indices, weights, chosen):
        if found[number].layer == 1:
            totals.append(weights.sum(-1))

    with torch.no_grad(), tuned(model, some), watching(model, found, see):
        model(tiny.tokens(8, 64))
    nothing = totals[0] == 0
    assert 0 < nothing.float().mean() < 1
    assert torch.allclose(totals[0][~nothing], torch.ones(()), atol=1e-5)


BAD = {
    "negative gain renormalised": (
        Tuning(semantics="post_renorm", experts=[Edit(layer=0, expert=0, action="gain:-2")]),
        "cannot be renormalised",
    ),
    "expert -1": (Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=-1)]), "expert=-1"),
    "an action that is none": (
        Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=0, action="on")]),
        "action='on' is unknown",
    ),
    "nan": (
        Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=0, action="gain:nan")]),
        "action='gain:nan' is unknown",
    ),
    "semantics": (
        Tuning(semantics="post_renom", experts=[Edit(layer=0, expert=0)]),
        "semantics='post_renom' is unknown",
    ),
    "too large": (
        Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=0, action="gain:1e5")]),
        "use a number between",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_in_python_is_refused_as_in_a_file(case):
    tuning, expected = BAD[case]
    with pytest.raises(UserError, match=expected):
        tuning.check(sites(mixtures.build("moe")))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scale": 10**400}, "must be between 0 and 1"),
        ({"method": {"ids": 5}}, "method.ids is not an object of lists"),
        ({"method": {"ids": {"ranked": 5}}}, "method.ids is not an object of lists"),
    ],
)
def test_odd_values_in_a_file_are_a_line(change, expected):
    body = {"semantics": "post_zero", "experts": [{"layer": 0, "expert": 0}], **change}
    assert any(expected in text for text in problems(body))
    assert problems({**body, "scale": 0.5, "method": {}}) == []


def test_a_block_that_does_without_its_router_is_found():
    model = mixtures.build("mixtral")
    block = model.model.layers[1].mlp
    inside = block.forward

    def without(x):  # as a kernel would that reads the router's weight itself
        weights, indices = (x.flatten(0, 1) @ block.gate.weight.T).softmax(-1).topk(2)
        return block.experts(x.flatten(0, 1), indices, weights).view_as(x)

    block.forward = without
    with (
        pytest.raises(UserError, match="was never called while its block ran"),
        torch.no_grad(),
        tuned(model, tuning_of("post_zero", e0="off")),
    ):
        model(tiny.tokens(1, 8))
    block.forward = inside
    with torch.no_grad(), tuned(model, tuning_of("post_zero", e0="off")):
        model(tiny.tokens(1, 8))


def test_weights_written_after_the_receipt_are_another_model(tmp_path):
    dense, folder = tmp_path / "dense", tmp_path / "model"
    tiny.dense_model().save_pretrained(dense)
    made = moe("upcycle", "copy", "--source", dense, "--num-experts", 2, "--top-k", 1, "--out",
               folder, "--no-verify")  # fmt: skip
    assert made.code == 0, made.err
    before = identity(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert identity(tmp_path / "copy")["weights"] == before["weights"]
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors[first] = tensors[first] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert identity(folder)["weights"] != before["weights"]


def test_labels_that_look_like_formulas_stand_in_pictures(tmp_path):
    path = tmp_path / "trace.npz"
    counts = [[5, 1], [4, 2], [6, 0], [1, 5], [2, 4], [0, 6]]
    trace = traces.small(counts, [6] * 6, [1, 1, 1, 0, 0, 0])
    for row in trace.rows:
        row["label"] = "$x_$" if row["label"] == "BAD" else r"$\frac{$|b"
    trace.write(path)
    result = moe("tune", "rank", path, "--target", "$x_$", "--out", tmp_path / "t.json", "--top", 1,
                 "--heatmap", tmp_path / "h.png", "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads(result.out)["experts"][0]["expert"] == 0
    points = [
        {"kind": kind, "experts": 1, "scale": 1.0, "seed": None, "label": label, "value": 1.0}
        for kind in ("plain", "tuned")
        for label in ("$x_$", r"$\frac{$")
    ]
    dose_curve(points, tmp_path / "dose.png", "share of $x_$", "1 expert off")
    assert (tmp_path / "dose.png").stat().st_size > 1000
