"""A run that was stopped or killed goes on as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run

from moe.checkpoint import folders, pieces, store
from moe.checkpoint.manifest import NAME, Manifest
from moe.engines.native import NativeEngine
from moe.errors import Corrupt, UserError
from moe.train import lock
from moe.train.loop import Run
from moe.upcycle.source import read_header

OPTIONS = ("train.steps=4", "checkpoint.every=2", "schedule.warmup_steps=1")


class Stopped(BaseException):
    """What stands for the scheduler that ends a job."""


def run_until(config: Any, last: int) -> None:
    """Train, and be stopped right after the checkpoint of a step."""
    save = Run.save

    def stop(self: Run) -> None:
        save(self)
        if self.step == last:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(Stopped):
            toy_run.run(config)


def hashes(out: Path, step: int) -> dict[str, str]:
    """Of the bytes of every tensor of a checkpoint."""
    return {
        name: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in toy_run.checkpoint(out, step).items()
    }


def untimed(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in toy_run.metrics(out)
    ]


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory) -> Path:
    """Four steps at one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    toy_run.run(toys.config(out, *OPTIONS))
    return out


def test_stopped_and_resumed_run_ends_in_the_same_bits(toys, straight, tmp_path) -> None:
    out = tmp_path / "run"
    config = toys.config(out, *OPTIONS)
    run_until(config, 2)
    assert store.latest(out).name == "step-2"
    printed = toy_run.run(config)
    assert f"going on from {out}/checkpoints/step-2" in printed
    assert "changed since then" not in printed
    assert "steps 2 to 4" in printed
    found = hashes(out, 4)
    assert found == hashes(straight, 4)
    kinds = {name.split("/")[0] for name in found}
    assert kinds == {"parameter", "buffer", "exp_avg", "exp_avg_sq"}
    assert untimed(out) == untimed(straight)
    assert [line["step"] for line in untimed(out)] == [1, 2, 3, 4]


def test_what_has_changed_since_the_checkpoint_is_said(toys, straight, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    other = ("train.steps=5", "optimizer.lr=0.5", "data.document_boundaries=none")
    printed = toy_run.run(toys.config(out, *OPTIONS, *other))
    for part in ("train.steps 4 -> 5", "optimizer.lr 0.001 -> 0.5", "attention -> none"):
        assert part in printed
    assert printed.count("changed since then") == 3


def no_moments(patch: pytest.MonkeyPatch) -> None:
    """Fresh zeros after the load."""

    def load(self: store.Reader, entries: Any) -> None:
        entries = list(entries)
        right(self, entries)
        for entry in entries:
            if entry.kind.startswith("exp_avg"):
                entry.tensor.zero_()

    right = store.Reader.load
    patch.setattr(store.Reader, "load", load)


def no_updates(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NativeEngine, "updates", property(lambda self: 0, lambda self, value: None))


@pytest.mark.parametrize("wrong", [[], [[[0.5, 0.5], None]] * 3, [[None, None]] * 2])
def test_loads_of_another_model_are_refused(toys, straight, tmp_path, wrong) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    folder = max((out / "checkpoints").glob("step-*"))
    found = Manifest.read(folder)
    (folder / NAME).unlink()
    found.progress = found.progress.model_copy(update={"reference": wrong})
    found.write(folder)
    with pytest.raises(Corrupt, match=r"the checkpoint's loads are of .*, the model has") as error:
        toy_run.run(toys.config(out, *OPTIONS))
    assert "\n" not in str(error.value)


def no_reference(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("moe.train.loop.tensors", lambda *given: None)


def other_samples(patch: pytest.MonkeyPatch) -> None:
    right = Run._resume

    def resume(self: Run) -> int:
        step = right(self)
        self.dataset.shuffle_index = self.dataset.shuffle_index[::-1]
        return step

    patch.setattr(Run, "_resume", resume)


@pytest.mark.parametrize("forget", [no_moments, no_updates, no_reference, other_samples])
def test_a_resume_that_forgets_anything_ends_in_other_bits(
    toys, straight, tmp_path, monkeypatch, forget
) -> None:
    """Negative controls."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step-4")
    forget(monkeypatch)
    toy_run.run(toys.config(out, *OPTIONS))
    assert hashes(out, 4) != hashes(straight, 4)


def test_dropout_goes_on_where_the_generator_stood(toys, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(toys.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    dropping = toy_run.Toys(model, toys.data)
    toy_run.run(dropping.config(tmp_path / "straight", *OPTIONS))
    stopped = dropping.config(tmp_path / "stopped", *OPTIONS)
    run_until(stopped, 2)
    toy_run.run(stopped)
    expected = hashes(tmp_path / "straight", 4)
    assert hashes(tmp_path / "stopped", 4) == expected
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-4")
    with pytest.MonkeyPatch.context() as patch:  # negative control
        patch.setattr(store.Reader, "random_state", lambda *given: None)
        toy_run.run(stopped)
    assert hashes(tmp_path / "stopped", 4) != expected


def test_checkpoint_goes_to_another_folder_by_name_and_more_steps_go_on(
    toys, straight, tmp_path
) -> None:
    out = tmp_path / "run"
    checkpoint = straight / "checkpoints" / "step-2"
    toy_run.run(toys.config(out, *OPTIONS, f"train.resume={checkpoint}"))
    assert hashes(out, 4) == hashes(straight, 4)
    assert [line["step"] for line in toy_run.metrics(out)] == [3, 4]
    named = f"train.resume={checkpoint}"  # the same command again must not start over
    toy_run.run(toys.config(out, *OPTIONS, "train.steps=6", named))
    assert [line["step"] for line in toy_run.metrics(out)] == [3, 4, 5, 6]
    before = hashes(out, 6)
    toy_run.run(toys.config(out, *OPTIONS, "train.steps=6"))
    assert hashes(out, 6) == before, "a run that has ended has nothing to do"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch_size=16", r"trained with train\.global_batch_size=8, not 16"),
        ("train.trainable=['*.experts.*']", r"not in the model.*train\.trainable"),
        ("train.resume=runs/none", r"train\.resume=runs/none is not a checkpoint folder"),
        ("train.resume={out}/checkpoints/step-2", r"step-4 is\. Choose another out to branch off"),
    ],
)
def test_what_cannot_be_resumed_is_refused_and_changes_nothing(
    toys, straight, tmp_path, override, message
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    files = [p for p in out.rglob("*") if p.is_file() and not {"cache", lock.FILE} & {*p.parts}]
    before = {p: p.read_bytes() for p in files}
    with pytest.raises((UserError, Corrupt), match=message):
        toy_run.run(toys.config(out, *OPTIONS, "train.steps=6", override.format(out=out)))
    assert {p: p.read_bytes() for p in before} == before
    toy_run.run(toys.config(out, *OPTIONS, "train.steps=5"))  # negative control
    assert store.latest(out).name == "step-5"


def test_more_parameters_than_the_checkpoint_has_moments_of_are_refused(toys, tmp_path) -> None:
    out = tmp_path / "run"
    toy_run.run(toys.config(out, "train.steps=1", "train.trainable=['*.experts.*']"))
    with pytest.raises(UserError, match=r"not in the checkpoint \['exp_avg/.*train\.trainable"):
        toy_run.run(toys.config(out, "train.steps=2"))


def test_only_the_newest_checkpoints_stay(toys, tmp_path) -> None:
    out = tmp_path / "run"
    options = ("train.steps=5", "checkpoint.every=1", "checkpoint.keep=2")
    toy_run.run(toys.config(out, *options))
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-4", "step-5"]
    toy_run.run(toys.config(out, *options[1:], "train.steps=8", "checkpoint.keep_every=3"))
    names = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    assert names == ["step-6", "step-7", "step-8"]


def test_a_checkpoint_is_safetensors_and_text_and_its_manifest_names_all(
    straight, tmp_path
) -> None:
    folder = straight / "checkpoints" / "step-4"
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    for name, path in files.items():
        if name.endswith(".safetensors"):
            assert read_header(path)
        else:
            assert "\0" not in path.read_text(), "text, so neither pickle nor archive"
    assert set(Manifest.read(folder).files) == set(files) - {"manifest.json"}
    expected = {"config.json", "tokenizer.json", "additional_chat_templates/short.jinja"}
    assert expected <= set(files)
    torch.save({}, tmp_path / "pickle")
    with pytest.raises(UnicodeDecodeError):  # negative control
        (tmp_path / "pickle").read_text()


# Kills in the middle of saving step 4: (what is patched, how it dies).


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


POINTS: dict[str, tuple[Any, str, Callable]] = {
    "before the tensor file": (pieces, "write", die),
    "before the manifest": (Manifest, "write", die),
    "before the rename": (folders, "publish", die),
    "before old ones go": (folders, "retain", die),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_run_goes_on_from_what_was_published(toys, straight, tmp_path, point) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step-4")
    child = os.fork()
    if child == 0:
        try:
            setattr(*POINTS[point])
            toy_run.run(toys.config(out, *OPTIONS))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed"
    published = point == "before old ones go"
    assert store.latest(out).name == ("step-4" if published else "step-2")
    assert store.is_checkpoint(out / "checkpoints" / "step-4.partial") is False
    printed = toy_run.run(toys.config(out, *OPTIONS))
    assert f"going on from {out}/checkpoints/step-{4 if published else 2}" in printed
    assert hashes(out, 4) == hashes(straight, 4)
    assert untimed(out) == untimed(straight), "no step is reported twice"
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["latest", "step-2", "step-4"]


def test_evaluation_loads_whole_checkpoints_only(straight, tmp_path) -> None:
    from moe.hf.loading import load_model

    whole = tmp_path / "step-4"
    shutil.copytree(straight / "checkpoints" / "step-4", whole)
    model = load_model(whole)
    stored = toy_run.checkpoint(straight, 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[f"parameter/{name}"]), name
    partial = whole.rename(tmp_path / "step-4.partial")
    with pytest.raises((UserError, Corrupt)):
        load_model(partial)
    folder = partial.rename(whole)
    (folder / "manifest.json").unlink()
    with pytest.raises((UserError, Corrupt)):
        load_model(folder)
