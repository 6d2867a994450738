"""The four semantics: how far they differ, what none of them moves, and that no trace is left."""

from typing import Any

import mixtures
import pytest
import tiny
import torch
from invoke import moe

from moe.errors import UserError
from moe.hf.loading import load_model
from moe.tune.families import sites
from moe.tune.intervene import tuned, watching
from moe.tune.legality import SEMANTICS
from moe.tune.tuning import Edit, Tuning

RENORMALISING = ("post_renorm", "pre_topk", "pre_select")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def everywhere(
    model: Any, semantics: Any, actions: tuple[str, ...], experts: tuple[int, ...] = (1, 2, 5)
) -> Tuning:
    """The same actions in every layer."""
    edits = [
        Edit(layer=site.layer, part=site.part, expert=expert, action=action)
        for site in sites(model)
        for expert, action in zip(experts, actions, strict=False)
    ]
    return Tuning(semantics=semantics, experts=edits)


@torch.no_grad()
def logits_of(model: Any, tuning: Tuning | None = None, scale: float | None = None) -> torch.Tensor:
    with tuned(model, tuning, scale):
        return model(tiny.tokens(2, 24)).logits


def dense(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Weights [T, 256] of a DeepSeek-V3 router's output."""
    _, weights, chosen = output
    return torch.zeros(len(chosen), 256).scatter(1, chosen, weights)


@pytest.fixture(scope="module")
def router_like_r1() -> dict[str, Any]:
    """256 experts in 8 groups, 4 of which a token may choose its 8 from; the 3 hottest are off."""
    model = mixtures.build(
        "deepseek_v3", hidden_size=64, n_routed_experts=256, num_experts_per_tok=8, n_group=8,
        topk_group=4, num_hidden_layers=1, first_k_dense_replace=0,
    )  # fmt: skip
    layer = model.model.layers[0].mlp
    layer.shared_experts.down_proj.weight.data.zero_()
    layer.gate.e_score_correction_bias.mul_(0.5)
    x = (torch.randn(1, 1024, 64) + 0.5 * torch.randn(64)) / 2
    with torch.no_grad():
        plain = layer(x)[0]
        chosen = layer.gate(x)[2]
        hottest = chosen.flatten().bincount(minlength=256).argsort(descending=True)[:3].tolist()
        found: dict[str, Any] = {"plain": plain, "weights": dense(layer.gate(x))}
        found["hit"] = (chosen[..., None] == torch.tensor(hottest)).any(-1).any(-1)
        for semantics in SEMANTICS:
            edits = [Edit(layer=0, expert=expert) for expert in hottest]
            with tuned(model, Tuning(semantics=semantics, experts=edits)):
                found[semantics] = layer(x)[0]
                found[semantics, "weights"] = dense(layer.gate(x))
    return found


@pytest.mark.parametrize("one", SEMANTICS)
def test_four_semantics_are_four_interventions(one, router_like_r1):
    """Where a token had chosen what is off; other tokens have no part in what comes afterwards."""
    found, hit = router_like_r1, router_like_r1["hit"]
    assert 0.3 < hit.float().mean() < 0.9
    assert relative(found[one][hit], found["plain"][hit]) > 0.1
    for other in SEMANTICS:
        if other != one:
            assert relative(found[one][hit], found[other][hit]) > 0.05, other
    rest = relative(found[one][~hit], found["plain"][~hit])
    if one == "pre_select":
        assert 1e-3 < rest < 0.2
    else:
        assert torch.equal(found[one, "weights"][~hit], found["weights"][~hit])
        assert rest < 1e-6  # a kernel adds up in another order where an expert has other tokens


def test_replacing_moves_more_than_leaving_out_and_sums_are_kept(router_like_r1):
    found, hit = router_like_r1, router_like_r1["hit"]
    moved = {s: relative(found[s][hit], found["plain"][hit]) for s in SEMANTICS}
    assert moved["post_zero"] < moved["post_renorm"] < moved["pre_topk"] < moved["pre_select"]
    for semantics in RENORMALISING:
        assert (found[semantics, "weights"].sum(-1) - 2.5).abs().max() < 1e-5
    assert (found["post_zero", "weights"].sum(-1)[hit] < 2.45).all()


def test_softmax_before_the_choice_is_one_thing_only_where_weights_are_renormalised():
    for name, same in (("olmoe", True), ("moe", True), ("olmoe raw", False), ("moe raw", False)):
        model = mixtures.build(name)
        one, two = (
            logits_of(model, everywhere(model, semantics, ("off", "off")))
            for semantics in ("pre_topk", "pre_select")
        )
        difference = relative(one, two)
        assert difference < 1e-5 if same else difference > 0.05, name


@pytest.mark.parametrize("name", ["moe biased groups", "moh", "uoe attention", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(name, fails):
    model = mixtures.build(name)
    before = logits_of(model)
    semantics = "pre_topk" if name != "moh" else "post_renorm"
    tuning = everywhere(model, semantics, ("off",))

    def trace() -> list[Any]:
        return [
            (dict(module._forward_hooks), dict(module._forward_pre_hooks), sorted(vars(module)))
            for module in model.modules()
        ]

    clean = trace()
    try:
        with tuned(model, tuning), watching(model, sites(model), lambda *seen: None):
            assert trace() != clean
            inside = logits_of(model)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert relative(inside, before) > 1e-3
    assert trace() == clean
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model, tuning), inside)
    assert torch.equal(logits_of(model, tuning, 0.0), before)


@pytest.mark.parametrize("name", ["moe", "mixtral", "moh"])
def test_a_second_tuning_is_refused_and_the_first_goes_on(name):
    model = mixtures.build(name)
    tuning = everywhere(model, "post_zero", ("off",))
    before, alone = logits_of(model), logits_of(model, tuning)
    with tuned(model, tuning):
        with pytest.raises(UserError, match="another tuning is at work"), tuned(model, tuning):
            pass
        with torch.no_grad():
            assert torch.equal(model(tiny.tokens(2, 24)).logits, alone)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("name", ["moe", "olmoe"])
def test_eyes_see_the_tuned_choice_from_either_side(name):
    """Opened before the tuning, or in it; and without it they see another."""
    model = mixtures.build(name)
    found, tuning = sites(model), everywhere(model, "pre_topk", ("off", "off"))
    counts: dict[str, torch.Tensor] = {}

    def look(key: str) -> Any:
        counts[key] = torch.zeros(len(found), 8)

        def see(number: int, indices: Any, weights: Any, chosen: Any) -> None:
            counts[key][number] += indices.flatten().bincount(minlength=8)

        return watching(model, found, see)

    ids = tiny.tokens(2, 24)
    with torch.no_grad():
        with look("plain"):
            model(ids)
        with tuned(model, tuning), look("inside"):
            model(ids)
        with look("outside"), tuned(model, tuning):
            model(ids)
    assert torch.equal(counts["inside"], counts["outside"])
    assert (counts["inside"][:, [1, 2]] == 0).all() and (counts["plain"][:, [1, 2]] > 0).any()


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[str, Any]:
    """Mixtures of equal experts: one that `moe upcycle copy` has made, and a Mixtral."""
    root = tmp_path_factory.mktemp("copies")
    tiny.dense_model("llama").save_pretrained(root / "dense")
    made = moe("upcycle", "copy", "--num-experts", 8, "--top-k", 3, "--router-init", "normal:0.5",
               "--source", root / "dense", "--out", root / "copies", "--no-verify")  # fmt: skip
    assert made.code == 0, made.err
    mixtral = mixtures.build("mixtral")
    with torch.no_grad():
        for layer in mixtral.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    return {"upcycled": load_model(root / "copies").float(), "mixtral": mixtral}


@pytest.mark.parametrize("name", ["upcycled", "mixtral"])
def test_where_experts_are_equal_what_renormalises_changes_nothing(name, copies):
    model = copies[name]
    before = logits_of(model)
    for semantics in RENORMALISING:
        some: tuple[str, ...] = ("off", "gain:3", "gain:0.2")
        if semantics != "post_renorm":
            some = ("off", "force", "bias:-2")
        assert relative(logits_of(model, everywhere(model, semantics, some)), before) < 1e-6
    # negative control: what does not renormalise does
    assert relative(logits_of(model, everywhere(model, "post_zero", ("off",))), before) > 1e-3


@pytest.mark.parametrize("name", ["upcycled", "mixtral"])
def test_and_yet_the_rates_of_two_kinds_of_text_differ(name, copies):
    """A random router sends different text elsewhere: such a score alone proves nothing."""
    model, rates = copies[name], []
    found = sites(model)
    for first in (3, 50):
        counts = torch.zeros(len(found), 8)

        def see(number: int, indices: Any, weights: Any, chosen: Any, to: Any = counts) -> None:
            to[number] += indices.flatten().bincount(minlength=8)

        with torch.no_grad(), watching(model, found, see):
            model(torch.randint(first, first + 40, (4, 64)))
        rates.append(counts / 256)
    assert (rates[1] - rates[0]).abs().max() > 0.05
