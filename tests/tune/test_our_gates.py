"""Every semantics and action on heads, attention experts and unions, against plain numbers."""

from typing import Any

import by_hand
import mixtures
import pytest
import tiny
import torch

from moe.errors import UserError
from moe.tune.families import sites
from moe.tune.intervene import tuned, watching
from moe.tune.legality import SEMANTICS
from moe.tune.tuning import Edit, Tuning

AFTER = [("off", "gain:0.25"), ("gain:3", "off")]
BEFORE = [("off", "bias:-0.4"), ("bias:0.3", "force")]
NAMES = [name for name in mixtures.OURS if not name.startswith("moe")]


def actions_of(name: str, semantics: str) -> list[tuple[str, ...]]:
    """What has a meaning there."""
    if semantics.startswith("post_"):
        return AFTER
    if name in ("uoe sequence", "uoe expert_choice") or (
        name.startswith("bam") and semantics == "pre_topk"
    ):
        return []
    if name.startswith("bam"):
        return [("off", "bias:0.4")]
    if name in ("moh kv_group", "calibrated groups", "uoe attention", "uoe biased"):
        return [("off",), ("bias:-4",), ("force",)]
    return BEFORE


CASES = [
    (name, semantics, actions, scale)
    for name in NAMES
    for semantics in SEMANTICS
    for actions in actions_of(name, semantics)
    for scale in (1.0, 0.5)
]


class Gates:
    """What every router got, and what its layer went on with, densely."""

    def __init__(self, model: Any) -> None:
        self.model, self.found = model, sites(model)
        self.given: dict[int, tuple[Any, ...]] = {}
        self.forced: dict[int, Any] = {}
        self.gates: dict[int, torch.Tensor] = {}

    def see(self, number: int, indices: Any, weights: Any, chosen: Any) -> None:
        on = torch.ones_like(weights) if chosen is None else chosen.to(weights)
        dense = torch.zeros(len(indices), self.found[number].experts, dtype=torch.float64)
        self.gates[number] = dense.scatter(1, indices, (weights * on).double())

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        handles = []
        for number, site in enumerate(self.found):

            def hook(module: Any, args: Any, kwargs: Any, number: int = number) -> None:
                self.given[number], self.forced[number] = args, kwargs.get("forced_T")

            router = self.model.get_submodule(site.module)
            handles.append(router.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad(), watching(self.model, self.found, self.see):
            logits = self.model(ids).logits
        for handle in handles:
            handle.remove()
        return logits


def expected(
    gates: Gates, number: int, name: str, semantics: str, actions: dict[int, str], scale: float
) -> torch.Tensor:
    """The gates of one site by hand: [T, units]."""
    router = gates.model.get_submodule(gates.found[number].module)
    given = semantics, actions, scale
    spec: dict[str, Any] = next(iter(mixtures.OURS[name].values()))
    x = gates.given[number][0].double()
    if name.startswith("moh"):
        queries = gates.given[number][1].double()
        per_unit = 3 if name == "moh kv_group" else 1
        queries = queries.reshape(len(queries), -1, per_unit * queries.shape[-1])
        return torch.tensor([by_hand.norm_gate(row, spec, *given) for row in queries.tolist()])
    if name == "two_stage":
        parts = {
            key: (x @ getattr(router, key).weight.double().T).tolist()
            for key in ("routed", "shared", "mix")
        }
        rows = [{key: parts[key][i] for key in parts} for i in range(len(x))]
        return torch.tensor([by_hand.two_stage_gate(row, spec, *given) for row in rows])
    if name.startswith("calibrated"):
        total = gates.found[number].experts
        scores = (x @ router.weight.double().T + router.bias.double()).tolist()
        rows = [by_hand.calibrated_gate(row, spec, *given, total) for row in scores]
        return torch.tensor(rows)
    if name == "uoe sequence":  # one choice for all tokens of a sequence, of their mean
        x = x.mean(1, keepdim=True).expand_as(x)
    logits = (x @ router.weight.double().T).flatten(0, -2)
    if getattr(router, "bias", None) is not None:
        logits = logits + router.bias.double()
    logits = logits.tolist()
    if name.startswith("bam"):
        return torch.tensor([by_hand.soft_gate(row, *given) for row in logits])
    if name == "uoe expert_choice":
        return best_tokens(torch.tensor(logits).view(*x.shape[:2], -1), spec, *given)
    bias = router.selection_bias.tolist() if name == "uoe threshold" else None
    every = gates.forced[number]
    every = [False] * len(logits) if every is None else every.tolist()
    return torch.tensor(
        [
            by_hand.union_weights(r, spec, bias, e, *given)
            for r, e in zip(logits, every, strict=True)
        ]
    )


def best_tokens(
    logits: torch.Tensor,
    spec: dict[str, Any],
    semantics: str,
    actions: dict[int, str],
    scale: float,
) -> torch.Tensor:
    """Each expert takes its share of a sequence's tokens, those that score it highest."""
    rows = [[0.0] * logits.shape[2] for _ in range(logits.shape[0] * logits.shape[1])]
    length = logits.shape[1]
    quota = -(-spec["top_k"] * length // spec["num_experts"])
    for sequence, part in enumerate(logits.tolist()):
        shares = [by_hand.softmax(row) for row in part]
        for expert in range(logits.shape[2]):
            column = {t: shares[t][expert] for t in range(length)}
            for token in by_hand.best(column, quota):
                rows[sequence * length + token][expert] = 1.0
    return torch.tensor([by_hand.gained(row, semantics, actions, scale) for row in rows])


def chosen_units(gates: Gates, number: int, actions: tuple[str, ...]) -> dict[int, str]:
    """The units that are on most, and for a force the one that is on least; none that always is."""
    site = gates.found[number]
    order = gates.gates[number].abs().sum(0).argsort(descending=True).tolist()
    order = [unit for unit in order if unit not in site.always]
    if actions[-1] == "force":
        order[len(actions) - 1] = order[-1]
    return dict(zip(order, actions, strict=False))


@pytest.fixture(scope="module")
def plain() -> Any:
    """Models with their gates as they are, made once."""
    made: dict[str, Gates] = {}

    def get(name: str) -> Gates:
        if name not in made:
            made[name] = Gates(mixtures.build(name))
            made[name].run(tiny.tokens(2, 24))
        return made[name]

    return get


@pytest.mark.parametrize(("name", "semantics", "actions", "scale"), CASES)
def test_gates_are_those_computed_by_hand(name, semantics, actions, scale, plain):
    before = plain(name)
    per_site = [chosen_units(before, n, actions) for n in range(len(before.found))]
    edits = [
        Edit(layer=site.layer, part=site.part, expert=unit, action=action)
        for site, chosen in zip(before.found, per_site, strict=True)
        for unit, action in chosen.items()
    ]
    gates = Gates(before.model)
    with tuned(before.model, Tuning(semantics=semantics, experts=edits), scale):
        gates.run(tiny.tokens(2, 24))
    differ = 0
    for number, chosen in enumerate(per_site):
        wanted = expected(gates, number, name, semantics, chosen, scale)
        error = (gates.gates[number] - wanted).norm() / wanted.norm()
        assert error < 1e-6
        untouched = expected(gates, number, name, "", {}, 1.0)
        differ += int(((wanted - untouched).abs() > 1e-3).any(1).sum())
    if name == "moh kv_group" and scale < 1 and actions in (("off",), ("force",)):
        return  # two norms over their deviation are √2 apart, and log 2 is less
    assert differ > 2, "hardly a token feels this"


@pytest.mark.parametrize("name", NAMES)
def test_other_gates_are_told_apart(name, plain):
    """Negative control: a hand that gains what the router does not."""
    gates = plain(name)
    unit = chosen_units(gates, 0, ("off",))
    right, wrong = (
        expected(gates, 0, name, *given) for given in (("", {}, 1.0), ("post_zero", unit, 1.0))
    )
    assert (gates.gates[0] - right).norm() < 1e-6 * right.norm()
    assert (gates.gates[0] - wrong).norm() > 0.05 * wrong.norm()


@pytest.mark.parametrize(
    ("name", "semantics", "edit", "reason"),
    [
        ("moh", "pre_topk", {"expert": 0}, "on for every token"),
        ("bam shared", "pre_topk", {"expert": 0}, "there is no top-k"),
        ("bam expert", "pre_select", {"expert": 0, "action": "force"}, "on already"),
        ("uoe sequence", "pre_topk", {"part": "mlp", "expert": 0}, "token by token"),
        ("two_stage", "pre_topk", {"expert": 9}, "0 to 8"),
        ("moh kv_group", "pre_select", {"expert": 0, "action": "gain:2"}, "a gain on weights"),
    ],
)
def test_what_has_no_meaning_is_refused(name, semantics, edit, reason, plain):
    tuning = Tuning(
        semantics=semantics, experts=[Edit(**{"layer": 0, "part": "attention", **edit})]
    )
    with pytest.raises(UserError, match=reason), tuned(plain(name).model, tuning):
        pass


@pytest.mark.parametrize("name", ["calibrated threshold", "uoe budget"])
@pytest.mark.parametrize("action", ["off", "force"])
def test_where_no_number_is_fixed_any_may_be_off_or_forced(name, action, plain):
    """Of all routed units at once; with a fixed number that is refused."""
    gates = plain(name)
    edits = [
        Edit(layer=site.layer, part=site.part, expert=unit, action=action)
        for site in gates.found
        for unit in range(site.experts)
        if unit not in site.always
    ]
    tuning = Tuning(semantics="pre_select", experts=edits)
    tuned_gates = Gates(gates.model)
    with tuned(gates.model, tuning):
        tuned_gates.run(tiny.tokens(2, 24))
    for number, site in enumerate(gates.found):
        expected = torch.zeros(site.experts, dtype=torch.bool)
        expected[list(site.always)] = True
        assert torch.equal(tuned_gates.gates[number] > 0, (expected | (action == "force")).expand(
            48, -1))  # fmt: skip
    if name == "uoe budget":
        fixed = plain("uoe").model
        with pytest.raises(UserError, match="8 experts"), tuned(fixed, tuning):
            pass
