"""A run learns, reports, freezes what it was told to, and stops before it does damage."""

import contextlib
import json
import math
import re
import shutil
from unittest import mock

import pytest
import tiny
import torch
import toy_run
from safetensors.torch import load_file, save_file

from moe.checkpoint import store
from moe.errors import Corrupt, MoeError, UserError
from moe.train import loop

LEARN = ("train.steps=25", "optimizer.lr=1e-2", "schedule.warmup_steps=3", "checkpoint.every=25")


def fell(losses: torch.Tensor) -> bool:
    """Whether the last losses are well below the first ones."""
    return bool(losses[-3:].mean() < 0.7 * losses[:3].mean())


def test_loss_falls_on_data_that_can_be_learnt(toys, tmp_path) -> None:
    out = tmp_path / "run"
    toy_run.run(toys.config(out, *LEARN, toys.validation, "eval.every=10"))
    losses = toy_run.column(toy_run.metrics(out), "loss")
    assert fell(losses)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validation = [(v["step"], v["validation_loss"]) for v in lines if "validation_loss" in v]
    assert [step for step, _ in validation] == [10, 20, 25]
    assert validation[0][1] > validation[2][1]
    assert validation[2][1] == pytest.approx(float(losses[-3:].mean()), rel=0.2)


def test_loss_does_not_fall_without_learning(toys, tmp_path) -> None:
    """Negative control."""
    out = tmp_path / "run"
    toy_run.run(toys.config(out, *LEARN[:1], "optimizer.lr=1e-12"))
    assert not fell(toy_run.column(toy_run.metrics(out), "loss"))


KINDS = ("parameter", "buffer")
BIAS = "model.layers.2.mlp.router.selection_bias"


def changed(toys, out, step: int) -> set[str]:
    """Names of the parameters and buffers that a run has changed."""
    after = toy_run.checkpoint(out, step)
    before = load_file(toys.model / "model.safetensors")
    stored = {k.split("/", 1)[1]: v for k, v in after.items() if k.split("/")[0] in KINDS}
    assert stored.keys() >= before.keys()
    return set(toy_run.differing({n: stored[n] for n in before}, before))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("['*.router.*']", ".router."),
        ("['*.experts.*', '*.router.weight']", "(.experts.|.router.weight)"),
        ("['*']", ""),
    ],
)
def test_only_the_parameters_named_are_trained(toys, tmp_path, patterns, expected) -> None:
    out = tmp_path / "run"
    toy_run.run(toys.config(out, "train.steps=2", f"train.trainable={patterns}"))
    names = set(load_file(toys.model / "model.safetensors"))
    wanted = {n for n in names if re.search(expected, n)}
    assert len(wanted) >= 4
    assert changed(toys, out, 2) == wanted | {BIAS}
    moments = {k.split("/", 1)[1] for k in toy_run.checkpoint(out, 2) if k.startswith("exp_avg/")}
    assert moments == wanted - {BIAS}


def test_a_pattern_that_matches_nothing_is_refused(toys, tmp_path) -> None:
    config = toys.config(tmp_path / "run", "train.trainable=['*.router.*', '*.expert.*']")
    with pytest.raises(UserError, match=r"'\*\.expert\.\*' matches none of the \d+ parameters"):
        toy_run.run(config)
    assert not store.steps(tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_selection_bias_moves_against_the_load_and_has_no_gradient(toys, tmp_path) -> None:
    with toy_run.opened(toys.config(tmp_path / "run", "train.selection_bias_rate=0.1")) as (
        run,
        take,
    ):
        (bias,) = run.biases
        assert not bias.any()
        found = take()
        counts = found.loads.routers[2, "mlp"].counts
        assert torch.equal(bias, 0.1 * torch.sign(counts.mean() - counts))
        assert bias.any()
        assert BIAS not in found.gradients
        assert (BIAS, "buffer") in {(e.name, e.kind) for e in run.engine.state()}
        assert BIAS not in {e.name for e in run.engine.state() if e.kind != "buffer"}
    with toy_run.opened(toys.config(tmp_path / "still", "train.selection_bias_rate=0")) as (
        run,
        take,
    ):
        take()
        assert not run.biases[0].any(), "nothing else may move it"


def test_scope_global_works_on_the_load_of_the_step_before(toys, tmp_path) -> None:
    with toy_run.opened(toys.config(tmp_path / "run", "train.micro_batch_size=1")) as (_, take):
        first, second = take(), take()
    assert all(given["reference_load"] is None for given in first.inputs)
    load = first.loads.routers[2, "mlp"]
    fraction = load.counts / (8 * toy_run.SEQUENCE)
    for given in second.inputs:
        assert torch.equal(given["reference_load"][2].mlp, fraction)
    now = second.loads.routers[2, "mlp"]
    mean = now.probability / now.tokens

    def balance(reference: torch.Tensor) -> float:
        return float(4 / 2 * mean @ reference)

    assert float(now.balance) == pytest.approx(balance(fraction), rel=1e-5)
    assert float(now.balance) != pytest.approx(balance(now.counts / now.tokens), rel=1e-5)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_run_of_steps_that_are_not_finite_stops_with_nothing_updated(
    toys, tmp_path, broken
) -> None:
    out = tmp_path / "run"
    toy_run.run(toys.config(out, "train.steps=2", "checkpoint.every=1"))
    config = toys.config(out, "train.steps=6", "guard.consecutive=2")
    with toy_run.opened(config) as (run, take):
        assert run.step == 2
        before = {(e.kind, e.name): e.tensor.clone() for e in run.engine.state()}
        backward, losses = run.engine.backward, loop.token_losses

        def poison(loss: torch.Tensor, last: bool) -> None:
            backward(loss, last)
            run.engine.model.lm_head.weight.grad[3, 3] = float("inf")

        with contextlib.ExitStack() as stack:
            if broken == "gradient":
                stack.enter_context(mock.patch.object(run.engine, "backward", poison))
            else:  # the gradient stays finite
                infinite = mock.patch.object(loop, "token_losses", lambda *a: losses(*a) + math.inf)
                stack.enter_context(infinite)
            assert take().loads is None
            stopped = r"step 3: samples 0 to 7; step 4: samples 8 to 15. Nothing was .*step-2"
            with pytest.raises(MoeError, match=stopped) as error:
                take()
        assert error.value.exit_code == 1
        after = {(e.kind, e.name): e.tensor for e in run.engine.state()}
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert run.step == 4 and run.engine.updates == 2
        take()
        assert any(not torch.equal(before[key], after[key]) for key in before), "the control"


def test_dense_folder_trains_with_nothing_routed(toys, tmp_path) -> None:
    folder = tmp_path / "dense"
    tiny.dense_model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    dense = toy_run.Toys(folder, toys.data)
    printed = toy_run.run(dense.config(tmp_path / "run", "train.steps=2"))
    assert len(toy_run.metrics(tmp_path / "run")) == 2
    assert "experts" not in printed
    assert "lm_head.weight" not in changed(dense, tmp_path / "run", 2), "tied: stored once"


def damage(folder, kind: str) -> None:
    weights = folder / "model.safetensors"
    match kind:
        case "config":
            (folder / "config.json").unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickled":
            weights.rename(folder / "pytorch_model.bin")
        case "lacking":
            tensors = load_file(weights)
            del tensors["model.layers.0.mlp.router.weight"]
            save_file(tensors, weights, {"format": "pt"})
        case "infinite":
            tensors = load_file(weights)
            tensors["model.norm.weight"][0] = math.inf
            save_file(tensors, weights, {"format": "pt"})
        case "foreign":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("config", UserError, "has no config.json"),
        ("truncated", Corrupt, r"model\.safetensors: truncated inside"),
        ("pickled", UserError, "pickled weights"),
        ("lacking", UserError, r"lacks 1 tensors such as model\.layers\.0\.mlp\.router\.weight"),
        ("infinite", Corrupt, r"model\.norm\.weight holds values that are not finite"),
        ("foreign", UserError, "gpt2"),
    ],
)
def test_model_that_cannot_be_trained_is_refused(toys, tmp_path, kind, error, message) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toys.model, folder)
    damage(folder, kind)
    with pytest.raises(error, match=message):
        toy_run.run(toy_run.Toys(folder, toys.data).config(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_missing_data_and_a_used_folder_are_refused(toys, tmp_path) -> None:
    out = tmp_path / "run"
    gone = toy_run.Toys(toys.model, tmp_path / "gone")
    with pytest.raises(UserError, match="gone is not prepared data"):
        toy_run.run(gone.config(out))
    assert not out.exists()
    toy_run.run(toys.config(out, "train.steps=1", "train.resume=never"))
    with pytest.raises(UserError, match=r"holds checkpoints and train\.resume=never"):
        toy_run.run(toys.config(out, "train.steps=1", "train.resume=never"))
    with pytest.raises(UserError, match="replicate=2 × shard=-1 is not the 1 ranks"):
        toy_run.run(toys.config(tmp_path / "other", "parallel.replicate=2"))
    assert not (tmp_path / "other").exists()
