"""Compiled runs: what a step computes does not depend on the steps before it, so that a run that
goes on ends in the same bits.
"""

import pytest
import torch
import toy_run

from moe.engines import parameters

pytestmark = pytest.mark.full
OPTIONS = ("train.compile=true", "schedule.kind=constant")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> toy_run.Toys:
    return toy_run.make(tmp_path_factory.mktemp("compiled"), toy_run.ATTENTION, toy_run.MLP)


def lives(toys: toy_run.Toys, out, *ends: int) -> dict[str, torch.Tensor]:
    """The last checkpoint of a run that was ended and started again at these steps."""
    for end in ends:
        torch._dynamo.reset()  # as a new process would begin
        toy_run.run(toys.config(out, *OPTIONS, f"train.steps={end}"))
    return toy_run.checkpoint(out, ends[-1])


def test_a_compiled_run_goes_on_exactly(toys, tmp_path) -> None:
    straight = lives(toys, tmp_path / "a", 6)
    assert toy_run.differing(straight, lives(toys, tmp_path / "b", 6)) == []
    assert toy_run.differing(straight, lives(toys, tmp_path / "c", 1, 6)) == []


def test_shapes_that_are_guessed_from_earlier_steps_do_not(toys, tmp_path, monkeypatch) -> None:
    """Negative control: torch's default, which also gives up after 8 graphs."""

    def guessing(layers: torch.nn.ModuleList) -> None:
        for layer in layers:
            layer.compile()

    monkeypatch.setattr(parameters, "compile_layers", guessing)
    with torch._dynamo.config.patch(recompile_limit=8):
        straight = lives(toys, tmp_path / "a", 6)
        assert toy_run.differing(straight, lives(toys, tmp_path / "c", 1, 6)) != []


def test_every_kind_of_layer_is_compiled(toys, tmp_path, monkeypatch) -> None:
    """No graph is refused for want of room: dynamo would go on uncompiled without a word."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        lives(toys, tmp_path / "a", 5)
        torch._dynamo.config.recompile_limit = 8
        monkeypatch.setattr(
            parameters, "compile_layers", lambda layers: [x.compile() for x in layers]
        )
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            lives(toys, tmp_path / "b", 5)
