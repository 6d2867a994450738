"""The pieces of a calibration against what they mean, computed at once and by hand."""

import calibrating
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from moe.errors import UserError
from moe.model import RoutedLlamaForCausalLM
from moe.upcycle.calibrate.budget import choose
from moe.upcycle.calibrate.contributions import (
    Units,
    contributions,
    importance,
    metrics,
    share_of,
)
from moe.upcycle.calibrate.fisher import measure_gradients
from moe.upcycle.calibrate.fitting import warn
from moe.upcycle.calibrate.journal import Journal, LayerFit
from moe.upcycle.calibrate.neurons import order_neurons
from moe.upcycle.calibrate.parts import Part
from moe.upcycle.calibrate.ranks import Alone
from moe.upcycle.calibrate.ridge import REFIT_PENALTY, ROUTER_PENALTY, Moments, Refit, with_one
from moe.upcycle.calibrate.stream import Model
from moe.upcycle.source import Source

CPU = torch.device("cpu")


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def direct_ridge(x, y, penalty):
    """Least squares in float64 with the penalty as rows of its own."""
    rows = (penalty * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    zeros = torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)
    return torch.linalg.lstsq(torch.cat([x, rows]), torch.cat([y, zeros])).solution


def seen_at_once(folder, windows):
    """{(layer, part): (normed inputs, inputs of the output projection, stream's norm)} of all
    tokens, by hooks on transformers' own class.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = {}

    def keep(name):
        return lambda module, inputs: kept.setdefault(name, []).append(inputs[0][0])

    for i, layer in enumerate(model.model.layers):
        for module, name in (
            (layer.self_attn.q_proj, (i, "attention", "x")),
            (layer.self_attn.o_proj, (i, "attention", "z")),
            (layer.input_layernorm, (i, "attention", "r")),
            (layer.mlp.gate_proj, (i, "mlp", "x")),
            (layer.mlp.down_proj, (i, "mlp", "z")),
            (layer.post_attention_layernorm, (i, "mlp", "r")),
        ):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return {name: torch.cat(tensors).double() for name, tensors in kept.items()}, model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_walk_by_layers_finds_what_all_activations_at_once_do(family, tmp_path):
    """Contributions, routers and mean worth of heads and of slices, for every family."""
    folder = calibrating.source(tmp_path / "model", family)
    file = calibrating.text(tmp_path / "text.txt")
    heads = Part(name="attention", units=9, keep=7, measure="norm")
    slices = Part(name="mlp", units=4, keep=3, measure="norm", order=lambda layer: range(64))
    run = calibrating.calibration(folder, file, tmp_path / "journal", heads, slices)
    found = run.fit()
    windows = calibrating.windows(folder, file)
    assert [len(w) for w in windows] == [512, 512, 476]
    seen, model = seen_at_once(folder, windows)
    for index, layer in enumerate(model.model.layers):
        for part, weight in (
            (heads, layer.self_attn.o_proj.weight),
            (slices, layer.mlp.down_proj.weight),
        ):
            x, z, stream = (seen[index, part.name, what] for what in "xzr")
            pieces = zip(z.chunk(part.units, 1), weight.double().chunk(part.units, 1), strict=True)
            worth = torch.stack([(a @ w.T).norm(dim=1) for a, w in pieces], 1)
            worth = worth / stream.norm(dim=1, keepdim=True)
            fit = found[part.name, index]
            assert relative(fit.mean, worth.mean(0)) < 1e-4
            solution = direct_ridge(with_one(x), worth, ROUTER_PENALTY)
            assert relative(fit.solution, solution) < 1e-3
            predicted = with_one(x) @ solution
            assert relative(fit.scores, predicted) < 1e-4
            error = (predicted - worth).square().sum() / (worth - worth.mean(0)).square().sum()
            assert fit.explained.item() == pytest.approx(1 - error.item(), abs=1e-4)
    assert run.journal.noted("perplexity") == pytest.approx(97, rel=0.2)


def by_hand(model, windows, names):
    """Second moments of the summed loss's gradient at modules' outputs, by autograd."""
    sums, count = {}, 0
    for ids in windows:
        outputs = {}

        def keep(name, outputs=outputs):
            def hook(module, inputs, found):
                outputs[name] = found[0] if isinstance(found, tuple) else found
                outputs[name].retain_grad()

            return hook

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        logits = model(ids[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        for name, output in outputs.items():
            gradient = output.grad[0].double()
            sums[name] = sums.get(name, 0) + gradient.T @ gradient
        count += len(ids) - 1
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in sums.items()}


@pytest.mark.parametrize("block", ["sequential", "parallel"])
def test_gradients_are_those_of_autograd_through_the_whole_model(block, tmp_path):
    model = tiny.routed_model(tiny.dense_model("qwen3"), block=block)
    folder = calibrating.write(tmp_path / "model", model)
    windows = [w[:60] for w in calibrating.windows(folder, calibrating.text(tmp_path / "t.txt"))]
    journal = Journal(tmp_path / "journal")
    given = Model(Source.open(folder), CPU), windows, range(3), ["attention", "mlp"]
    perplexity = measure_gradients(*given, journal, Alone(), calibrating.quiet())
    model = RoutedLlamaForCausalLM.from_pretrained(folder)
    names = {("attention", i): f"model.layers.{i}.self_attn" for i in range(3)} | {
        ("mlp", i): f"model.layers.{i}.mlp" for i in range(3)
    }
    wanted = by_hand(model, windows, names.values())
    for (part, layer), name in names.items():
        assert relative(journal.fisher(part, layer), wanted[name]) < 1e-4, name
    other = wanted[names["mlp", 0]]  # negative control: another layer's is far away
    assert relative(journal.fisher("mlp", 1), other) > 0.1
    loss = torch.cat([
        torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="none")
        for w in windows
    ])  # fmt: skip
    assert perplexity == pytest.approx(loss.mean().exp().item(), rel=1e-5)


def test_gates_have_no_gradient_of_their_own(tmp_path):
    """Of an attention that is routed already, gradients are those between its jumps."""
    dense = tiny.dense_model()
    attention = {"kind": "moh", "router": "qnorm", "shared_heads": [0], "top_k": 4}
    folder = calibrating.write(tmp_path / "model", tiny.routed_model(dense, attention))
    windows = [calibrating.windows(folder, calibrating.text(tmp_path / "t.txt"))[0][:50]]
    journal = Journal(tmp_path / "journal")
    given = Model(Source.open(folder), CPU), windows, [0], ["mlp"]
    measure_gradients(*given, journal, Alone(), calibrating.quiet())
    model = RoutedLlamaForCausalLM.from_pretrained(folder)
    names = ["model.layers.0.mlp"]
    trained = by_hand(model, windows, names)[names[0]]
    from moe.model import router

    through = router.straight_through
    router.straight_through = lambda mask, probability: mask
    try:
        wanted = by_hand(model, windows, names)[names[0]]
    finally:
        router.straight_through = through
    assert relative(journal.fisher("mlp", 0), wanted) < 1e-4
    assert relative(trained, wanted) > 1e-2  # negative control


def test_what_a_unit_is_worth_is_the_norm_or_the_curvature_of_what_it_adds():
    torch.manual_seed(0)
    weight, z = torch.randn(12, 10), torch.randn(40, 10)
    root = torch.randn(12, 12)
    order = torch.tensor([9, 0, 4, 2, 8, 1, 3, 5, 6, 7])
    units = Units.of_order(order, 2, 4)
    for fisher in (None, root @ root.T):
        found = contributions(z, units, metrics(weight, units, fisher))
        for place, unit in enumerate(order[2:].view(4, 2).tolist()):
            added = z[:, unit] @ weight[:, unit].T
            square = (added @ (torch.eye(12) if fisher is None else fisher) * added).sum(1)
            assert relative(found[:, place], square.sqrt()) < 1e-5
        one = importance(weight, fisher)
        metric = torch.eye(12) if fisher is None else fisher
        assert relative(one, (weight.T @ metric @ weight).diagonal().sqrt()) < 1e-5
    on = units.spread(torch.tensor([[1.0, 0, 0, 1]]), 10)[0]
    assert on.nonzero().flatten().tolist() == sorted([9, 0, 4, 2, 6, 7])


def test_a_refit_is_the_least_squares_pulled_towards_what_was():
    torch.manual_seed(0)
    z, weight = torch.randn(300, 3) @ torch.randn(3, 10), torch.randn(6, 10)
    on = (torch.rand(300, 10) > 0.3).float()
    sums = Refit.empty(10, CPU)
    for first in range(0, 300, 100):
        sums.add(z[first : first + 100], on[first : first + 100])
    found = sums.solve(weight, Alone())
    gated, w = (z * on).double(), weight.double().T
    amount = (REFIT_PENALTY * gated.square().sum(0).mean()).sqrt()
    left = torch.cat([gated, amount * torch.eye(10, dtype=torch.float64)])
    right = torch.cat([z.double() @ w, amount * w])
    assert relative(found.T, torch.linalg.lstsq(left, right).solution) < 1e-5
    before = (gated @ w - z.double() @ w).norm()
    assert (gated @ found.T - z.double() @ w).norm() < 0.9 * before
    untouched = Refit.empty(10, CPU)
    untouched.add(z, torch.zeros_like(on))  # nothing on: nothing to learn from
    assert torch.equal(untouched.solve(weight, Alone()), weight.double())


def test_shuffled_worth_cannot_be_predicted():
    """Negative control of R²: what is linear is explained, in another order it is not."""
    torch.manual_seed(0)
    x = torch.randn(2000, 20)
    y = x @ torch.randn(20, 5) + 3
    explained = []
    for values in (y, y[torch.randperm(2000)]):
        moments = Moments.empty(20, 5, CPU)
        moments.add(x, values)
        explained.append(moments.explained(moments.solve(True)))
    assert explained[0] > 0.99 and abs(explained[1]) < 0.05
    without = Moments.empty(20, 5, CPU)
    without.add(x, y)
    solution = without.solve(False)
    assert not solution[-1].any() and without.explained(solution) < explained[0]


def test_neurons_that_are_active_together_go_together_after_those_that_always_are():
    torch.manual_seed(0)
    kinds = torch.cat([torch.zeros(4), 1 + torch.randperm(32) % 2]).long()  # the first: always
    active = torch.rand(3, 900) < torch.tensor([[2.0], [0.3], [0.3]])  # when a kind is
    activations = active.float()[kinds].T * (1 + 0.1 * torch.rand(900, 36))
    given = [activations[:400], activations[400:]], [0, 400], torch.ones(36), 4, 2
    order = order_neurons(*given, "key", Alone()).tolist()
    assert order[:4] == [0, 1, 2, 3] and sorted(order) == list(range(36))
    assert {len(set(kinds[order[a:b]].tolist())) for a, b in ((4, 20), (20, 36))} == {1}
    assert order_neurons(*given, "key", Alone()).tolist() == order
    shuffled = [  # negative control: each is active when it likes
        torch.stack([column[torch.randperm(len(column))] for column in tokens.T], 1)
        for tokens in given[0]
    ]
    alone = order_neurons(shuffled, *given[1:], "key", Alone()).tolist()
    assert len(set(kinds[alone[4:20]].tolist())) == 2


def fit_of(scores, mean=None):
    """A layer whose inputs are its scores."""
    units = scores.shape[1]
    solution = torch.cat([torch.eye(units), torch.zeros(1, units)]).double()
    mean = scores.mean(0).double() if mean is None else torch.tensor(mean).double()
    empty = torch.empty(0, dtype=torch.long)
    one = torch.tensor(1.0)
    return LayerFit(solution, scores, scores[::4], mean, one, empty, torch.tensor(0.0))


def test_one_threshold_keeps_the_mean_where_it_is_worth_most():
    torch.manual_seed(0)
    fits = {0: fit_of(torch.rand(200, 6)), 3: fit_of(2 * torch.rand(200, 6))}
    part = Part(name="attention", units=6, keep=4)
    choices, threshold = choose(fits, part, torch.float32)
    for layer, fit in fits.items():
        on = choices[layer].on(fit.scores, 6)
        assert torch.equal(on, (fit.scores >= threshold).float())
        assert choices[layer].mean == pytest.approx(on.sum(1).mean().item())
        scores = fit.scores @ choices[layer].weight.T + choices[layer].bias
        assert scores.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    means = [choices[layer].mean for layer in fits]
    assert sum(means) / 2 == pytest.approx(4, abs=1e-3) and means[0] < means[1] - 1


def test_a_number_for_each_layer_is_spent_where_it_is_worth_most():
    torch.manual_seed(0)
    fits = {0: fit_of(torch.rand(200, 6)), 1: fit_of(3 * torch.rand(200, 6))}
    part = Part(name="attention", units=6, keep=4, budget="layer", shared=1)
    choices, _ = choose(fits, part, torch.float32)
    counts = [choices[layer].top_k + 1 for layer in fits]
    assert sum(counts) == 8 and counts[0] < counts[1]
    best = {layer: fit.mean.argmax().item() for layer, fit in fits.items()}
    assert {layer: choice.shared for layer, choice in choices.items()} == {
        layer: (unit,) for layer, unit in best.items()
    }


def test_a_dead_head_is_never_shared_and_chosen_last():
    torch.manual_seed(0)
    scores = torch.rand(100, 4)
    scores[:, 2] = 0.5  # as an intercept alone might say
    fits = {0: fit_of(scores, [0.5, 0.4, 0.0, 0.3])}
    part = Part(name="attention", units=4, keep=3, budget="topk", shared=1)
    choices, _ = choose(fits, part, torch.float32)
    choice = choices[0]
    assert choice.dead == (2,) and choice.shared == (0,) and choice.routed == (1, 2, 3)
    assert not choice.weight[1].any()
    assert choice.bias[1] < (scores @ choice.weight.T + choice.bias)[:, [0, 2]].min()
    assert not choice.on(scores, 4)[:, 2].any()
    with pytest.raises(UserError, match=r"layer 0: 3 of 4 heads add anything.*4 are to be shared"):
        choose(
            fits, Part(name="attention", units=4, keep=4, budget="topk", shared=4), torch.float32
        )


@pytest.mark.parametrize("budget", ["threshold", "layer"])
def test_a_dead_head_is_below_the_living_of_all_layers(budget):
    """Layer 0's scores are all far above layer 1's, and half of its heads add nothing."""
    torch.manual_seed(0)
    high, low = 100 + 0.1 * torch.rand(200, 4), torch.rand(200, 4)
    fits = {0: fit_of(high, [0.0, 0.0, 0.5, 0.4]), 1: fit_of(low, [0.3] * 4)}
    part = Part(name="attention", units=4, keep=2, budget=budget)
    choices, _ = choose(fits, part, torch.float32)
    on = {layer: choices[layer].on(fit.scores, 4) for layer, fit in fits.items()}
    assert not on[0][:, :2].any() and on[0][:, 2:].all()
    assert on[1].sum(1).mean().item() == pytest.approx(2, abs=0.02)


def test_a_budget_that_dead_heads_leave_unspent_turns_the_living_on(capsys):
    torch.manual_seed(0)
    fits = {0: fit_of(torch.zeros(200, 4), [0.0] * 4), 1: fit_of(torch.rand(200, 4), [0.3] * 4)}
    part = Part(name="attention", units=4, keep=3, budget="threshold")
    choices, _ = choose(fits, part, torch.float32)
    assert [choices[layer].on(fits[layer].scores, 4).mean().item() for layer in fits] == [0, 1]
    assert [choices[layer].mean for layer in fits] == [0, 4]
    warn([part], {"attention": choices})
    said = capsys.readouterr().err
    assert "layer 0: heads 0, 1, 2, 3 add nothing" in said
    assert "2 of 4 heads are on per token on average, not 3" in said
    with pytest.raises(UserError, match="no heads add anything"):
        choose({0: fits[0]}, part, torch.float32)


def test_shared_heads_may_be_all_that_live():
    fits = {0: fit_of(torch.rand(50, 3), [0.5, 0.0, 0.0])}
    part = Part(name="attention", units=3, keep=2, budget="topk", shared=1)
    choice = choose(fits, part, torch.float32)[0][0]
    assert choice.shared == (0,) and choice.on(torch.rand(4, 3), 3).sum(1).tolist() == [2] * 4


def test_a_token_without_a_residual_stream_is_worth_nothing():
    worth, norm = torch.rand(3, 2) + 1, torch.tensor([[2.0], [0.0], [4.0]])
    found = share_of(worth, norm)
    assert torch.equal(found[1], torch.zeros(2)) and torch.equal(found[0], worth[0] / 2)


def test_even_weights_are_even_to_a_percent():
    torch.manual_seed(0)
    fits = {0: fit_of(torch.randn(300, 6), [1.0] * 6)}
    part = Part(name="mlp", units=6, keep=4, budget="topk", intercept=False, spread=0.01)
    choice = choose(fits, part, torch.float32)[0][0]
    best = (fits[0].scores @ choice.weight.T).topk(4, dim=1)
    weights = best.values.softmax(1) * 4
    assert 0.004 < (weights - 1).abs().max() < 0.01
    assert torch.equal(best.indices.sort().values, fits[0].scores.topk(4).indices.sort().values)
