"""`loads.jsonl`: what each router did, exact, small however large the run, and resumable."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import toy_run

from moe.model import RoutingLoad
from moe.train.loads import LoadLog, StepLoads


def load(counts: list[float]) -> RoutingLoad:
    tokens = torch.tensor(sum(counts) / 2)
    one = torch.tensor(1.0)
    entropy = 0.25 * math.log(len(counts)) * tokens
    return RoutingLoad(torch.tensor(counts), torch.tensor(counts), entropy, tokens, one, one)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "loads.jsonl").read_text().splitlines()]


def test_a_layer_in_numbers():
    loads = StepLoads({(0, "mlp"): load([60.0, 20.0, 0.0, 0.0]), (2, "mlp"): load([8.0] * 4)}, 3)
    uneven, even = loads.layers("mlp").values()
    spread = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert uneven == {"max_over_mean": 3.0, "dead_share": 0.5, "entropy_share": 0.25,
                      "load_entropy": round(spread, 4), "load": [300, 100, 0, 0]}  # fmt: skip
    assert even["load"] == [100] * 4 and even["load_entropy"] == 1.0
    assert list(loads.layers("mlp")) == [0, 2] and loads.layers("attention") == {}
    assert loads.summary()["experts/load_entropy"] == pytest.approx((spread + 1) / 2)
    json.dumps(loads.layers("mlp"), allow_nan=False)


def test_a_router_that_counted_nothing_is_no_obstacle():
    found = StepLoads({(0, "mlp"): load([0.0, 0.0])}, 1).layers("mlp")[0]
    assert (found["load"], found["dead_share"]) == ([0, 0], 1.0)
    json.dumps(found, allow_nan=False)


def test_tokens_that_none_of_the_parts_got_are_no_obstacle():
    """A budget may have no head on."""
    none = load([4.0, 4.0])._replace(counts=torch.zeros(2))
    summary = StepLoads({(0, "attention"): none}, 1).summary()
    assert all(math.isfinite(value) for value in summary.values())
    assert summary["heads/max_over_mean"] == 0 and summary["heads/dead_share"] == 1
    assert summary["heads/per_token"] == 0


def test_one_transfer_brings_the_same_numbers():
    dropped = load([1.0, 2.0])._replace(dropped=torch.tensor(3.0))
    loads = StepLoads({(0, "attention"): load([1.0, 2.0, 3.0]), (1, "mlp"): dropped}, 2)
    here = loads.cpu()
    for key, router in loads.routers.items():
        for name, value in router._asdict().items():
            other = getattr(here.routers[key], name)
            assert (value is None and other is None) or torch.equal(value, other), name
    assert StepLoads({}, 2).cpu().routers == {}


@pytest.mark.parametrize(
    ("layers", "units", "steps", "every"),
    [(58, 256, 100_000, 10), (58, 256, 100_000, 1), (2, 4, 1000, 1), (61, 384, 20_000, 100)],
)
def test_the_file_stays_small_and_holds_the_last_step(tmp_path, layers, units, steps, every):
    counts = torch.rand(units).exp().tolist()
    routers = {(i, "mlp"): load(counts) for i in range(layers)}
    loads = StepLoads(routers, layers)
    log = LoadLog(tmp_path, 0, steps)
    written = {"experts": loads.layers("mlp")}
    for step in range(every, steps + 1, every):
        if log.due(step, loads):
            log.write(step, written)
    log.close()
    assert (tmp_path / "loads.jsonl").stat().st_size < 20e6
    found = [line["step"] for line in lines(tmp_path)]
    assert found[-1] == steps and len(found) == len(set(found)) >= min(steps // every, 100)
    gaps = {b - a for a, b in itertools.pairwise(found[:-1])}
    assert len(gaps) <= 2 and max(gaps) - min(gaps) <= every, "evenly"


def test_an_interrupted_run_takes_the_samples_of_one_that_was_not(toys, tmp_path):
    whole, two = tmp_path / "whole", tmp_path / "two"
    options = ("schedule.kind=constant", "checkpoint.every=2")
    toy_run.run(toys.config(whole, "train.steps=6", *options))
    toy_run.run(toys.config(two, "train.steps=4", *options))
    with (two / "loads.jsonl").open("a") as file:
        file.write('{"step": 7, "cut')
    toy_run.run(toys.config(two, "train.steps=6", *options))
    assert lines(two) == lines(whole)
    assert [line["step"] for line in lines(whole)] == [1, 2, 3, 4, 5, 6]
    metrics = toy_run.metrics(whole)[-1]
    for noun, layers in (("heads", ["0", "1"]), ("experts", ["0", "2"])):
        found = lines(whole)[-1][noun]
        assert list(found) == layers
        worst = max(layer["max_over_mean"] for layer in found.values())
        assert worst == pytest.approx(metrics[f"{noun}/max_over_mean"], abs=1e-4)
        assert all(abs(sum(x["load"]) / len(x["load"]) - 100) < 1 for x in found.values())
