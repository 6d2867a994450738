"""One optimiser step has the gradient of the whole global batch, however it is cut up."""

import pytest
import tiny
import torch
import toy_run
from torch import Tensor
from torch.nn import functional as F

from moe.model import LayerLoad
from moe.train import loop
from moe.upcycle.source import Source

# several thousand additions in another order, in float32
TIGHT = 2e-5


@pytest.fixture(scope="module")
def additive(toys, tmp_path_factory) -> toy_run.Toys:
    """The same model with every balance loss in scope `global`, which adds up exactly, and
    coefficients large enough to matter.
    """
    folder = tmp_path_factory.mktemp("additive") / "model"
    scope = {"balance_scope": "global", "balance_coef": 0.5}
    attention, mlp = (
        [part if part["kind"] == "dense" else {**part, **scope} for part in parts]
        for parts in (toy_run.ATTENTION, toy_run.MLP)
    )
    tiny.routed_model(tiny.dense_model(), attention, mlp).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return toy_run.Toys(folder, toys.data)


def reference() -> list[LayerLoad]:
    """A load such as a step before might have had."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((6, 3), (6, None), (None, 4))
    return [LayerLoad(*(n and torch.rand(n, generator=generator) for n in pair)) for pair in sizes]


def step(toys: toy_run.Toys, out, *overrides: str) -> toy_run.Step:
    with toy_run.opened(toys.config(out, *overrides)) as (run, take):
        run.reference = reference()
        return take()


@pytest.fixture(scope="module")
def plain(additive, tmp_path_factory) -> dict[str, Tensor]:
    """Gradients of plain torch, all sequences in one pass: mean over labels plus routers' loss."""
    config = additive.config(tmp_path_factory.mktemp("plain") / "run")
    with toy_run.opened(config) as (run, _):
        samples = [run.dataset[index] for index in range(8)]
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    model = loop.load_model(Source.open(additive.model)).train()
    output = model(
        batch["tokens"],
        position_ids=batch["position_ids"],
        use_cache=False,
        reference_load=reference(),
    )
    counted = batch["loss_mask"] > 0
    assert 0.5 < counted.float().mean() < 0.99, "the data must have masked labels"
    loss = F.cross_entropy(output.logits[counted].double(), batch["labels"][counted])
    (loss + output.router_loss).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def error(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest Frobenius error of any gradient, relative to that gradient."""
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).norm() / right[n].norm()) for n in left)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize("checkpointing", ["none", "experts", "full"])
def test_accumulated_gradient_is_that_of_one_big_batch(
    additive, plain, tmp_path, micro_batch_size, checkpointing
) -> None:
    found = step(
        additive,
        tmp_path / "run",
        f"train.micro_batch_size={micro_batch_size}",
        f"train.activation_checkpointing={checkpointing}",
    )
    assert len(found.inputs) == 8 // micro_batch_size
    assert error(found.gradients, plain) < TIGHT
    norm = torch.stack([g.double().square().sum() for g in plain.values()]).sum().sqrt()
    assert found.norm == pytest.approx(float(norm), rel=TIGHT)


def test_micro_batches_weigh_by_their_labels(additive, plain, tmp_path, monkeypatch) -> None:
    """And the negative control: a mean per micro-batch is another gradient and another loss."""
    masks = []
    losses = loop.token_losses

    def spied(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        masks.append(batch["loss_mask"].sum())
        return losses(logits, batch)

    monkeypatch.setattr(loop, "token_losses", spied)
    right = step(additive, tmp_path / "right", "train.micro_batch_size=1")
    assert len(set(map(float, masks))) > 2, "the micro-batches must have unequal numbers of labels"
    assert error(right.gradients, plain) < TIGHT
    average = torch.stack(masks).mean()
    monkeypatch.setattr(
        loop, "token_losses", lambda l, b: losses(l, b) * average / b["loss_mask"].sum()
    )
    wrong = step(additive, tmp_path / "wrong", "train.micro_batch_size=1")
    assert error(wrong.gradients, plain) > 100 * TIGHT
    assert wrong.loss != pytest.approx(right.loss, rel=TIGHT)


def test_routers_loss_of_scope_micro_does_not_add_up(toys, tmp_path) -> None:
    """Negative control: with the wrong scope the same comparison sees the cut."""
    small = step(toys, tmp_path / "small", "train.micro_batch_size=1")
    large = step(toys, tmp_path / "large", "train.micro_batch_size=8")
    assert error(small.gradients, large.gradients) > TIGHT
    assert small.loss == pytest.approx(large.loss, rel=1e-6), "only the routers' loss differs"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_count_no_token_twice(toys, tmp_path, dtype) -> None:
    both = {
        kind: step(
            toys,
            tmp_path / kind,
            f"train.activation_checkpointing={kind}",
            f"train.dtype={dtype}",
        )
        for kind in ("none", "full")
    }
    for (layer, part), load in both["full"].loads.routers.items():
        other = both["none"].loads.routers[layer, part]
        assert torch.equal(load.counts, other.counts)
        assert load.tokens == 8 * toy_run.SEQUENCE
        chosen = {(0, "attention"): 3, (1, "attention"): 3, (0, "mlp"): 1, (2, "mlp"): 2}
        assert load.counts.sum() == chosen[layer, part] * load.tokens
    assert both["full"].loss == both["none"].loss
    assert error(both["full"].gradients, both["none"].gradients) < 1e-6


def test_step_is_clipped_to_the_norm_asked_for(toys, tmp_path) -> None:
    """SGD-like check on the moments: Adam's first one is (1 - β₁) times the clipped gradient."""
    with toy_run.opened(toys.config(tmp_path / "run", "train.clip=0.25")) as (run, take):
        found = take()
        first = {e.name: e.tensor for e in run.engine.state() if e.kind == "exp_avg"}
    assert found.norm > 1
    clipped = {n: g * 0.25 / found.norm for n, g in found.gradients.items()}
    assert error({n: m / 0.1 for n, m in first.items()}, clipped) < TIGHT
    assert error({n: m / 0.1 for n, m in first.items()}, found.gradients) > 0.5


def test_gradients_in_bfloat16_are_near_those_in_float32(toys, tmp_path) -> None:
    exact = step(toys, tmp_path / "exact")
    found = step(toys, tmp_path / "narrow", "train.dtype=bfloat16")
    assert all(g.dtype == torch.float32 for g in found.gradients.values())
    assert found.loss == pytest.approx(exact.loss, rel=5e-3)
    cosines = {
        n: float(F.cosine_similarity(g.flatten(), exact.gradients[n].flatten(), dim=0))
        for n, g in found.gradients.items()
    }
    assert min(cosines.values()) > 0.9, min(cosines, key=cosines.__getitem__)
    assert found.loss != exact.loss, "nothing was computed in bfloat16"
