"""A calibration that was killed, and one that several processes share: the same result."""

import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path

import calibrating
import pytest
import torch
from harness import run_ranks
from invoke import moe

from moe.errors import Corrupt
from moe.progress import Progress
from moe.upcycle.calibrate.ranks import join, together
from moe.upcycle.calibrate.stream import Model, Stream
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import Source

OPTIONS = ("--calibration-tokens", calibrating.TOKENS, "--no-verify", "--refit")


def arguments(folder: Path, out: Path) -> tuple[object, ...]:
    """The command's, over a model and a text in `folder`."""
    given = ("--source", folder / "model", "--calibrate", folder / "text.txt", "--out", out)
    return ("uoe", "--mlp-experts", 6, "--attention-experts", 3, *given, *OPTIONS)


def convert(folder: Path, out: Path, step: int, log: Path) -> None:
    """In a process of its own: the real command, killed when it has kept the `step`-th thing."""
    from moe.upcycle.calibrate.journal import Journal

    save = Journal._save

    def note(self, name, tensors):
        save(self, name, tensors)
        with log.open("a") as file:
            file.write(f"{name}\n")
        if len(log.read_text().splitlines()) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal._save = note
    torch.set_num_threads(1)
    sys.exit(moe("upcycle", *arguments(folder, out)).code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a text."""
    folder = tmp_path_factory.mktemp("resume")
    calibrating.source(folder / "model")
    calibrating.text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """`start(out, step)`: what was kept, in order, before the end or the kill; the exit code."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["moe.upcycle.command", "invoke", "tiny"])

    def run(out, step=0):
        log = out.with_name("log")
        log.unlink(missing_ok=True)
        process = context.Process(target=convert, args=(folder, out, step, log))
        process.start()
        process.join(120)
        return log.read_text().splitlines() if log.exists() else [], process.exitcode

    return run


def state(out):
    """The bytes of every file but the receipt, which holds times."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "receipt.json"}


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param((2, 8, 15), marks=pytest.mark.slow),
        pytest.param(range(1, 20), marks=pytest.mark.full),
    ],
)
def test_killed_after_anything_kept_it_goes_on_to_the_same_bytes(killed, start, tmp_path):
    whole = tmp_path / "whole"
    steps, code = start(whole)
    # gradients, backwards; perplexity; fits of both parts; projections of both
    assert code == 0 and len(steps) == 3 * 2 + 1 + 3 * 2 + 3 * 2
    for step in killed:
        out = tmp_path / f"out{step}"
        _, code = start(out, step)
        assert code == -signal.SIGKILL and not out.exists()
        partial = out.with_name(out.name + ".partial")
        assert (partial / "calibration").is_dir()
        again, code = start(out)
        assert code == 0 and state(out) == state(whole), step
        kept = step if step >= 7 else 0  # a pass backwards begins again
        assert again == steps[kept:], step
        assert not partial.exists()


@pytest.mark.slow
def test_what_another_request_left_is_not_used(folder, start, tmp_path):
    """Negative control: with another seed, other clusters."""
    out, own = tmp_path / "out", tmp_path / "own"
    start(out, 9)
    result = moe("upcycle", *arguments(folder, out), "--seed", 1)
    assert result.code == 0 and "begun for something else: starting over" in result.err
    assert moe("upcycle", *arguments(folder, own), "--seed", 1).code == 0
    assert state(out) == state(own)
    start(tmp_path / "other")
    assert state(tmp_path / "other") != state(own)


def share(folder: Path, out: Path) -> None:
    """On each rank: the command."""
    calibrating.upcycle(*arguments(folder, out))


@pytest.mark.slow
def test_two_processes_share_a_text(folder, tmp_path, weights):
    """Equal to one up to rounding; both ranks end, one writes."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert moe("upcycle", *arguments(folder, alone)).code == 0
    run_ranks(share, 2, folder, shared)
    step = Receipt.read(shared).steps[-1]["calibration"]
    assert step["ranks"] == 2 and step["tokens"] == calibrating.TOKENS
    one, two = weights(alone), weights(shared)
    for name, tensor in one.items():
        scale = tensor.abs().max().clamp(min=1e-6)
        assert (two[name] - tensor).abs().max() < 1e-3 * scale, name
    records = [Receipt.read(f).steps[-1]["calibration"] for f in (alone, shared)]
    assert records[0]["perplexity"] == pytest.approx(records[1]["perplexity"], rel=1e-4)


def find(damaged: int) -> str:
    """On each rank: what is raised where one's text shows damage."""
    with join() as ranks:

        def run() -> int:
            if ranks.rank == damaged:
                raise Corrupt(f"found by rank {ranks.rank}")
            return ranks.rank

        try:
            return f"all is well on rank {together(ranks, run)}"
        except Corrupt as error:
            return str(error)


def walk(source: Path) -> str:
    """On each rank: a layer whose input is not finite on the second rank alone."""
    with join() as ranks:
        model = Model(Source.open(source), ranks.device)
        stream = Stream(model, [torch.arange(8)], ranks, Progress("walk", 8, "tokens", True))
        if ranks.rank == 1:
            stream.states[0][3] = torch.nan
        with model.layer(0) as layer, pytest.raises(Corrupt) as raised:
            stream.advance(layer, 0, ())
        return str(raised.value)


@pytest.mark.slow
def test_a_layer_that_is_not_finite_for_one_process_is_named_by_all(folder):
    one, two = run_ranks(walk, 2, folder / "model")
    assert one == two and "layer 0 gives values that are not finite" in one


@pytest.mark.slow
def test_what_one_process_finds_all_raise():
    assert run_ranks(find, 2, 1) == ["found by rank 1"] * 2
    assert run_ranks(find, 2, 2) == ["all is well on rank 0", "all is well on rank 1"]
