"""The whole routed MLP against every peer that is here: `make gpu`'s section `layer`."""

import contextlib
import functools
import json
import signal
from collections.abc import Iterator
from typing import Any

import torch
from gpu_peers import PEERS, Maker
from report import Goal
from torch import Tensor

LEAST = {"ScatterMoE": 1.6, "Liger": 1.4, "SonicMoE": 0.85, "transformers grouped_mm": 1.8}
LIMIT_S = 40  # for a side at a shape, with what it compiles


def gradients(run: Any, x: Tensor, weights: Tensor, leaves: list[Tensor], dy: Tensor) -> list:
    y = run(x, weights)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves, weights], dy)]


def layer(bench: Any) -> tuple[str, list[dict[str, Any]], list[Goal], list[str]]:
    """Forward and backward of the whole layer against every peer that is here.

    What is known is kept after every shape, and taken up again where a run was cut off.
    """
    known = taken_up(bench)
    late: set[str] = set()  # sides that took too long once are not asked again
    for shape in bench.shapes:
        if str(shape) in known:
            continue
        known[str(shape)] = of_shape(bench, shape, late)
        beside = bench.partial.with_suffix(".new")
        beside.write_text(json.dumps([bench.identity, known]))
        beside.rename(bench.partial)
        if not bench.toy:
            torch.cuda.empty_cache()
    bench.partial.unlink()
    rows = [row for found, _ in known.values() for row in found]
    notes = [note for _, found in known.values() for note in found]
    goals = [
        Goal(
            f"{row['shape'].split(':')[0]}: ours over {row['side']}",
            row["ours faster by"],
            "≥",
            least,
        )
        for row in rows
        for peer, least in LEAST.items()
        if row["side"] == peer and row["ms"]
    ]
    for shape in () if bench.toy else bench.shapes:
        (ours,) = (r for r in rows if r["shape"] == str(shape) and r["side"] == "ours")
        least = 2 * (shape.hidden + 2 * shape.k * shape.inner)  # x and h, two bytes each
        kept = ours["kept B/token"] / least
        goals.append(Goal(f"{shape.name}: kept, of x and h", kept, "≤", 1.05))
        if shape.name in "ABC":
            goals.append(Goal(f"{shape.name}: of the roof", ours["of roof"], "≥", 0.6))
    return "Routed MLP, forward and backward, bf16", rows, goals, list(dict.fromkeys(notes))


def of_shape(bench: Any, shape: Any, late: set[str]) -> list[Any]:
    """Every side's row at a shape, and what there is to note; `late` grows by sides that were."""
    rows, notes = [], []
    given = bench.inputs(shape, bench.dtype)
    expected = None
    for name, make in PEERS.items():
        row: dict[str, Any] = {"shape": str(shape), "side": name}
        row |= {"peak MB": 0.0, "kept B/token": 0.0, "state": "ran", "ms": 0.0}
        try:
            if name in late:
                raise TimeoutError("was late at a shape before")
            with limited(LIMIT_S):
                row["peak MB"], row["kept B/token"], seconds, y = side(bench, make, given)
            expected = y if expected is None else expected
            difference = ((y - expected).float().norm() / expected.float().norm()).item()
            if not difference < 0.03:
                raise ValueError(f"computes something else: {difference:.2g} away from ours")
            row["ms"] = 1e3 * seconds
        except (Exception, SystemExit) as error:  # a peer's failure is a result, not ours
            if name == "ours":
                raise
            row["state"] = type(error).__name__
            if isinstance(error, TimeoutError):
                late.add(name)
            notes.append(f"{shape.name}, {name}: {type(error).__name__}: {str(error)[:160]}")
        ms = row["ms"]
        row["TFLOP/s"] = ms and 3 * shape.flops / ms / 1e9
        row["of roof"] = row["TFLOP/s"] * 1e12 / bench.roof
        rows.append(row)
        print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
    for row in rows:
        row["ours faster by"] = row["ms"] and row["ms"] / (rows[0]["ms"] or 1)
    return [rows, notes]


def taken_up(bench: Any) -> dict[str, Any]:
    """What a run that was cut off found with the same code and peers; nothing else counts."""
    try:
        identity, known = json.loads(bench.partial.read_text())
    except (OSError, ValueError):
        return {}
    return known if identity == bench.identity else {}


def side(bench: Any, make: Maker, given: dict[str, Tensor]) -> tuple[float, float, float, Tensor]:
    """Peak MB of a step, bytes kept per token, seconds of a step, and what comes out."""
    run, leaves = make(given["w1"], given["w2"], given["indices"])
    x, weights = given["x"].clone().requires_grad_(), given["weights"].clone().requires_grad_()
    call = functools.partial(gradients, run, x, weights, leaves, given["dy"])
    y = call()[0]
    found = memory(bench, call, run, x, weights, leaves)
    return *found, bench.seconds(call, 10), y


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside when it takes longer: some peers tune for minutes."""

    def late(*unused: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def memory(
    bench: Any, call: Any, run: Any, x: Tensor, weights: Tensor, leaves: list[Tensor]
) -> tuple[float, float]:
    """Peak MB of a step above its inputs; bytes kept for backward per token, inputs apart."""
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (
            kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t
        ),
        lambda t: t,
    ):
        run(x, weights)
    for known in leaves:
        kept.pop(known.untyped_storage().data_ptr(), None)
    peak = 0.0
    if not bench.toy:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return peak, sum(kept.values()) / len(x)
