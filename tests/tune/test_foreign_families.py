"""Every semantics and action on routers of experts, ours and theirs, against plain numbers."""

from typing import Any

import by_hand
import mixtures
import pytest
import tiny
import torch
from by_hand import Rule
from torch.nn import functional as F

from moe.errors import UserError
from moe.tune.families import FAMILIES, Site, sites
from moe.tune.intervene import tuned, watching
from moe.tune.legality import SEMANTICS
from moe.tune.tuning import Edit, Tuning

OURS = [name for name in mixtures.OURS if name.startswith("moe")]
# per semantics, what is done to the four experts that most tokens chose
ACTIONS = {
    "post_zero": [("off", "gain:0.25"), ("gain:-0.5", "off", "gain:3")],
    "post_renorm": [("off", "gain:0.25"), ("off", "off", "gain:3")],
    "pre_topk": [("off", "off"), ("off", "bias:0.4", "bias:-0.3", "force")],
    "pre_select": [("off", "off"), ("off", "bias:0.4", "bias:-0.3", "force")],
}
CASES = [(s, a, d) for s in SEMANTICS for a in ACTIONS[s] for d in (1.0, 0.5)]


def rule_of(name: str, router: Any, family: str) -> Rule:
    """The published rule of a router, read off its config."""
    if family == "routed_llama":
        spec = mixtures.OURS[name]["mlp"]
        bias = router.selection_bias.tolist() if spec.get("selection_bias") else None
        return Rule(
            score=spec.get("score", "softmax"), top_k=spec["top_k"], bias=bias,
            renormalise=spec.get("renormalise", True), scale=spec.get("weight_scale", 1.0),
            groups=spec.get("num_groups", 1), top_groups=spec.get("top_groups", 1),
        )  # fmt: skip
    own = {**mixtures.SIZES, **mixtures.NATIVE[name][1]}
    top_k = own["num_experts_per_tok"]
    if family in ("granitemoe", "granitemoeshared", "gpt_oss"):
        return Rule(score="chosen", top_k=top_k)
    factor = own.get("routed_scaling_factor", 1.0)
    groups = {"groups": own.get("n_group", 1), "top_groups": own.get("topk_group", 1)}
    if family == "deepseek_v2":
        return Rule(score="softmax", top_k=top_k, renormalise=False, scale=factor, best=1, **groups)
    if family in ("deepseek_v3", "glm4_moe"):
        if name == "deepseek_v3 raw":
            factor = 2.5  # DeepSeek-V3's own
        return Rule(
            score="sigmoid", top_k=top_k, renormalise=own.get("norm_topk_prob", True),
            scale=factor, bias=router.e_score_correction_bias.tolist(), **groups,
        )  # fmt: skip
    return Rule(score="softmax", top_k=top_k, renormalise=own.get("norm_topk_prob", True))


class Seen:
    """What routers and their layers got and gave, in one forward pass."""

    def __init__(self, model: Any, found: list[Site]) -> None:
        self.model, self.found = model, found
        self.weights: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}

    def block(self, number: int) -> Any:
        return self.model.get_submodule(self.found[number].module.rpartition(".")[0])

    def see(self, number: int, indices: Any, weights: Any, chosen: Any) -> None:
        dense = torch.zeros(len(indices), self.found[number].experts, dtype=torch.float64)
        self.weights[number] = dense.scatter(1, indices, weights.double())

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        handles = []
        for number in range(len(self.found)):

            def hook(module: Any, given: Any, made: Any, number: int = number) -> None:
                self.given[number] = given[0]
                self.made[number] = made[0] if isinstance(made, tuple) else made

            handles.append(self.block(number).register_forward_hook(hook))
        with torch.no_grad(), watching(self.model, self.found, self.see):
            logits = self.model(ids).logits
        for handle in handles:
            handle.remove()
        return logits


def expert_outputs(block: Any, x: torch.Tensor, family: str) -> torch.Tensor:
    """What every expert makes of every token, in float64: [T, E, H]."""
    experts = block.experts
    gate_up, down, x = (t.double() for t in (experts.gate_up_proj, experts.down_proj, x))
    if family == "gpt_oss":  # gate and up by turns, clamped; biases; stored [in, out]
        h = torch.einsum("th,ehd->ted", x, gate_up) + experts.gate_up_proj_bias.double()
        gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return torch.einsum("tei,eih->teh", inner, down) + experts.down_proj_bias.double()
    gate, up = torch.einsum("th,edh->ted", x, gate_up).chunk(2, -1)
    return torch.einsum("tei,ehi->teh", F.silu(gate) * up, down)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=[*OURS, *mixtures.NATIVE])
def name(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(name: str) -> Seen:
    """One pass without any tuning."""
    model = mixtures.build(name)
    seen = Seen(model, sites(model))
    seen.run(tiny.tokens(2, 24))
    return seen


@pytest.mark.parametrize(("semantics", "actions", "scale"), CASES)
def test_weights_and_layer_are_those_computed_by_hand(name, plain, semantics, actions, scale):
    model, found = plain.model, plain.found
    family = model.config.model_type
    edits, per_site = [], []
    for number, site in enumerate(found):
        hot = (plain.weights[number] != 0).sum(0).argsort(descending=True).tolist()
        if actions[-1] == "force":
            hot[len(actions) - 1] = hot[-1]  # the one that was on least
        per_site.append(dict(zip(hot, actions, strict=False)))
        edits += [Edit(layer=site.layer, expert=e, action=a) for e, a in per_site[-1].items()]
    tuning = Tuning(semantics=semantics, experts=edits, scale=scale)
    seen = Seen(model, found)
    with tuned(model, tuning):
        seen.run(tiny.tokens(2, 24))
    changed = 0
    for number, site in enumerate(found):
        router = model.get_submodule(site.module)
        x = seen.given[number].flatten(0, -2)
        logits = x.double() @ router.weight.double().T
        if family == "gpt_oss":
            logits = logits + router.bias.double()
        rule = rule_of(name, router, family)
        given = rule, semantics, per_site[number], scale
        expected = torch.tensor(
            [by_hand.weights_of(row, *given) for row in logits.tolist()], dtype=torch.float64
        )
        untouched = torch.tensor(
            [by_hand.weights_of(row, rule, "", {}, 1.0) for row in logits.tolist()],
            dtype=torch.float64,
        )
        changed += int((expected != untouched).any(1).sum())
        assert difference(seen.weights[number], expected) < 1e-6
        block = seen.block(number)
        with torch.no_grad():
            arguments = (None, None) if family == "routed_llama" else ()
            before = block(seen.given[number], *arguments)
            before = (before[0] if isinstance(before, tuple) else before).flatten(0, -2).double()
            outputs = expert_outputs(block, x, family)
        moved = torch.einsum("te,teh->th", expected - untouched, outputs)
        assert difference(seen.made[number].flatten(0, -2).double(), before + moved) < 2e-6
    assert changed > 10, "hardly a token feels this"


def test_hand_and_router_part_where_the_hand_is_wrong(name, plain):
    """Negative control: other weights than the router's are told apart."""
    site, router = plain.found[0], plain.model.get_submodule(plain.found[0].module)
    rule = rule_of(name, router, plain.model.config.model_type)
    logits = plain.given[0].flatten(0, -2).double() @ router.weight.double().T
    if plain.model.config.model_type == "gpt_oss":
        logits = logits + router.bias.double()
    hot = int((plain.weights[0] != 0).sum(0).argmax())
    wrong = [
        by_hand.weights_of(row, rule, "post_zero", {hot: "off"}, 1.0) for row in logits.tolist()
    ]
    assert difference(plain.weights[0], torch.tensor(wrong, dtype=torch.float64)) > 0.05
    assert site.top_k == rule.top_k


def test_every_family_is_here():
    assert {family for family, _ in mixtures.NATIVE.values()} == set(FAMILIES)


def test_a_family_without_an_entry_says_what_it_would_take():
    from transformers import AutoModelForCausalLM, PhimoeConfig

    sizes = {**mixtures.SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(PhimoeConfig(**sizes))
    with pytest.raises(UserError, match=r"family 'phimoe' is not known here.*would need.*Router"):
        sites(model)


def test_a_router_that_was_replaced_is_refused(monkeypatch):
    model = mixtures.build("mixtral")
    found = sites(model)
    tuning = Tuning(semantics="post_zero", experts=[Edit(layer=0, expert=1)])
    with tuned(model, tuning):
        pass
    original = type(model.model.layers[0].mlp.gate).forward

    def other(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, weights, indices = original(self, hidden_states)
        return logits, weights.square(), indices

    monkeypatch.setattr(type(model.model.layers[0].mlp.gate), "forward", other)
    with pytest.raises(UserError, match="does not route as"), tuned(model, tuning):
        pass
    with (
        pytest.raises(UserError, match="does not route as"),
        watching(model, found, lambda *seen: None),
    ):
        pass
