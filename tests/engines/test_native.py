"""The native engine: AdamW on the gradient it was given, in the precision it promises."""

import contextlib
from collections.abc import Iterator

import pytest
import tiny
import torch
import toy_run
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moe.config import RunConfig, parse
from moe.engines import build, recompute
from moe.engines.base import Engine
from moe.errors import UserError
from moe.kernels.route import naive
from moe.parallel.world import Ranks, world

LR, ONE = 1e-2, torch.tensor(1.0)
TOKENS = tiny.tokens(4, 16)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with world() as ranks:
        yield ranks


def settings(**sections: dict) -> RunConfig:
    values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}, **sections}
    values["train"] = {"dtype": "float32", **sections.get("train", {})}
    return parse(values, "test")


def engine_of(ranks: Ranks, **sections: dict) -> Engine:
    model = tiny.routed_model(tiny.dense_model(), toy_run.ATTENTION, toy_run.MLP)
    engine = build(model, settings(**sections), ranks)
    engine.train(True)
    return engine


def loss_of(engine: Engine, tokens: Tensor = TOKENS) -> Tensor:
    logits = engine.forward(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def take(engine: Engine, steps: int = 1, scale: Tensor = ONE) -> None:
    for _ in range(steps):
        engine.backward(loss_of(engine), True)
        engine.step(LR, scale)


def tensors(engine: Engine, *kinds: str) -> dict[str, Tensor]:
    return {
        f"{e.kind}/{e.name}": toy_run.whole(e.tensor).clone()
        for e in engine.state()
        if not kinds or e.kind in kinds
    }


def gradients(engine: Engine) -> dict[str, Tensor]:
    named = engine.model.named_parameters()
    return {n: toy_run.whole(p.grad).clone() for n, p in named if p.grad is not None}


def test_first_step_is_adamw_in_closed_form(ranks) -> None:
    engine = engine_of(ranks, optimizer={"weight_decay": 0.3, "eps": 1e-6})
    before = tensors(engine, "parameter")
    engine.backward(loss_of(engine), True)
    grads = {f"parameter/{n}": 0.5 * g for n, g in gradients(engine).items()}
    engine.step(LR, torch.tensor(0.5))
    after = tensors(engine, "parameter")
    assert grads.keys() == before.keys()
    for name, old in before.items():
        grad, decay = grads[name], 0.3 if old.ndim >= 2 else 0.0  # norms and biases do not decay
        expected = old * (1 - LR * decay) - LR * grad / (grad.abs() + 1e-6)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        other = old * (1 - LR * (0.3 - decay)) - LR * grad / (grad.abs() + 1e-6)
        assert not torch.allclose(after[name], other, rtol=1e-5, atol=1e-6), "negative control"
    assert not gradients(engine), "the gradient is dropped"


def test_gradients_add_up_until_the_step(ranks) -> None:
    engine = engine_of(ranks)
    engine.backward(loss_of(engine, TOKENS[:1]) / 2, False)
    engine.backward(loss_of(engine, TOKENS[1:]) / 2, True)
    both = gradients(engine)
    norm = torch.stack([g.square().sum() for g in both.values()]).sum().sqrt()
    torch.testing.assert_close(engine.grad_norm(), norm)
    engine.step(LR, ONE)
    other = engine_of(ranks)
    parts = [loss_of(other, TOKENS[:1]), loss_of(other, TOKENS[1:])]
    other.backward((parts[0] + parts[1]) / 2, True)
    for name, expected in gradients(other).items():
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(other.grad_norm(), 2 * norm), "negative control"


def test_state_names_every_tensor_once_and_moments_come_with_the_first_step(ranks) -> None:
    engine = engine_of(ranks)
    names = [name for name, _ in engine.model.named_parameters()]
    assert "lm_head.weight" not in names, "tied"
    bias = "buffer/model.layers.2.mlp.router.selection_bias"
    assert list(tensors(engine)) == [*(f"parameter/{n}" for n in names), bias]
    assert engine.updates == 0
    take(engine, 2)
    found = [f"{e.kind}/{e.name}" for e in engine.state()]
    assert len(set(found)) == len(found) == 3 * len(names) + 1
    assert engine.updates == 2
    prepared = engine_of(ranks)
    prepared.prepare_moments()
    assert [f"{e.kind}/{e.name}" for e in prepared.state()] == found
    assert not any(t.any() for t in tensors(prepared, "exp_avg", "exp_avg_sq").values())


def restored(ranks: Ranks, source: Engine, *, kinds: tuple[str, ...], updates: int) -> Engine:
    engine = engine_of(ranks)
    engine.prepare_moments()
    state = tensors(source)
    for entry in engine.state():
        if entry.kind in kinds:
            entry.tensor.copy_(state[f"{entry.kind}/{entry.name}"])
    engine.updates = updates
    return engine


KINDS = ("parameter", "buffer", "exp_avg", "exp_avg_sq")


def test_engine_goes_on_from_its_state_to_the_last_bit(ranks) -> None:
    straight, first = engine_of(ranks), engine_of(ranks)
    take(straight, 4)
    take(first, 2)
    second = restored(ranks, first, kinds=KINDS, updates=first.updates)
    take(second, 2)
    assert not toy_run.differing(tensors(second), tensors(straight))
    assert second.updates == 4
    # negative controls: each part of the state matters
    for kinds, updates in ((KINDS[:2], 2), (KINDS[:3], 2), (KINDS[1:], 2), (KINDS, 0)):
        wrong = restored(ranks, first, kinds=kinds, updates=updates)
        take(wrong, 2)
        assert toy_run.differing(tensors(wrong), tensors(straight)), (kinds, updates)


def test_frozen_parameters_have_no_gradient_no_moments_and_do_not_move(ranks) -> None:
    engine = engine_of(ranks, train={"trainable": ["*.layers.2.mlp.experts.*"]})
    before = tensors(engine, "parameter")
    take(engine)
    moved = toy_run.differing(tensors(engine, "parameter"), before)
    expected = [f"model.layers.2.mlp.experts.{n}_proj" for n in ("down", "gate_up")]
    assert moved == [f"parameter/{name}" for name in expected]
    assert sorted(tensors(engine, "exp_avg")) == [f"exp_avg/{name}" for name in expected]
    with pytest.raises(UserError, match=r"'\*\.layers\.9\.\*' matches none of the"):
        engine_of(ranks, train={"trainable": ["*", "*.layers.9.*"]})


def test_recomputation_keeps_the_routers_choices(ranks, monkeypatch) -> None:
    calls = []
    choose = naive.select_top_k

    def counted(scores: Tensor, k: int) -> Tensor:
        calls.append(k)
        return choose(scores, k)

    monkeypatch.setattr(naive, "select_top_k", counted)

    def forget():
        return contextlib.nullcontext(), contextlib.nullcontext()

    counts = {}
    for name, contexts in (("kept", recompute._keep_choices), ("recomputed", forget)):
        monkeypatch.setattr(recompute, "_keep_choices", contexts)
        engine = engine_of(ranks, train={"activation_checkpointing": "full"})
        calls.clear()
        engine.backward(loss_of(engine), True)
        counts[name] = len(calls)
    assert counts == {"kept": 4, "recomputed": 8}, "2 routers of heads, 2 of experts"


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_recomputation_keeps_what_reached_a_threshold(part) -> None:
    """Here everything would fall the other way, and without what is kept it does."""
    model = tiny.routed_model(tiny.dense_model(), tiny.THRESHOLD, tiny.BUDGET)
    router = getattr(model.model.layers[0], part).router
    given = (torch.randn(2, 9, 72), None, None) if part == "mlp" else (
        torch.randn(18, 72), None, None, None)  # fmt: skip

    def on() -> Tensor:
        found = router(*given)
        return found.mask_TE if part == "mlp" else found[0] != 0

    keep, give = recompute._keep_choices()
    with torch.no_grad():
        with keep:
            first = on()
        for parameter in router.parameters():
            parameter.neg_()
        with give:
            assert torch.equal(on(), first)
        assert (on() != first).float().mean() > 0.5


def test_bfloat16_computes_narrow_and_keeps_wide(ranks) -> None:
    engine = engine_of(ranks, train={"dtype": "bfloat16"})
    assert engine.forward(input_ids=TOKENS).logits.dtype == torch.bfloat16
    wide = engine_of(ranks).forward(input_ids=TOKENS).logits
    assert wide.dtype == torch.float32
    take(engine)
    for entry in engine.state():
        assert entry.tensor.dtype == torch.float32, entry.name
        assert isinstance(entry.tensor, DTensor) == (entry.kind != "buffer")
    before = tensors(engine, "parameter")
    engine.backward(loss_of(engine), True)
    engine.step(1e-6, ONE)  # far below bfloat16's resolution of the weights
    assert toy_run.differing(tensors(engine, "parameter"), before) == sorted(before)


def test_the_state_after_a_validation_is_in_float32(ranks) -> None:
    """A forward pass without a backward one leaves FSDP2's root parameters as it computed."""
    engine = engine_of(ranks, train={"dtype": "bfloat16"})
    before = tensors(engine, "parameter")
    with torch.no_grad():
        loss_of(engine)
        name, narrow = next(iter(engine.model.named_parameters()))
        assert narrow.dtype == torch.bfloat16, "else there is nothing to undo"
        assert not toy_run.differing(tensors(engine, "parameter"), before), name


def test_bfloat16_gradients_are_accumulated_in_float32(ranks) -> None:
    engine = engine_of(ranks, train={"dtype": "bfloat16"})
    engine.backward(loss_of(engine), True)
    single = gradients(engine)
    engine.model.zero_grad()
    for index in range(32):
        engine.backward(loss_of(engine), index == 31)
    for name, grad in gradients(engine).items():
        torch.testing.assert_close(grad, 32 * single[name], rtol=1e-5, atol=1e-5, msg=name)
    name, grad = max(single.items(), key=lambda item: item[1].abs().max())
    narrow = torch.zeros_like(grad, dtype=torch.bfloat16)
    for _ in range(32):
        narrow += grad.bfloat16()
    error = (narrow.float() - 32 * grad).norm() / (32 * grad).norm()
    assert error > 1e-4, "negative control: bfloat16 sums would be seen"


def test_evaluation_mode_reaches_the_model(ranks) -> None:
    engine = engine_of(ranks)
    engine.train(False)
    assert not any(m.training for m in engine.model.modules())
    engine.train(True)
    assert all(m.training for m in engine.model.modules())


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_compute_the_same(ranks, dtype) -> None:
    plain = engine_of(ranks, train={"dtype": dtype})
    compiled = engine_of(ranks, train={"dtype": dtype, "compile": True})
    losses = [loss_of(engine) for engine in (plain, compiled)]
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    for engine, loss in zip((plain, compiled), losses, strict=True):
        engine.backward(loss, True)
    torch.testing.assert_close(plain.grad_norm(), compiled.grad_norm(), rtol=5 * tolerance, atol=0)
