"""Finding the tilings of one model's sizes on the GPU at hand, away from any step.

Every candidate of every kernel is compiled by processes beside this one, then timed in turn; the
best of each go into a table of the shipped one's form, for `MOE_KERNELS_TABLE` (tiling.py).

T tokens, H hidden, I inner, E experts, K chosen, N query heads, G KV heads, d head size.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from moe.kernels import device as devices
from moe.kernels.heads import triton as heads
from moe.kernels.route import triton as route
from moe.kernels.route.naive import block_rows
from moe.kernels.routed_mlp import triton as routed_mlp
from moe.kernels.routed_mlp.naive import PLAIN
from moe.kernels.tiling import architecture

Run = Callable[[], Any]
Cut = dict[str, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is tuned for: a routed MLP, and with `heads` gated attention over sequences."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    heads_on: int = 0  # of them per token; all of them where it is 0
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class Timing:
    kernel: str
    rows: int  # the table's key: rows of a tile, or the head size
    cut: Cut
    seconds: float | None  # None where it did not compile, or does not fit
    problem: str = ""


def candidates(kernel: str, rows: int, dtype: str) -> list[Cut]:
    """Tilings worth trying: what the tensor cores like and the registers hold."""
    wide = dtype == "float32"
    blocks = (32, 64) if wide else (64,)

    def cuts(n: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]) -> list[Cut]:
        return [
            {"block_n": width, "block_k": depth, "warps": w, "stages": s}
            for width in n for depth in blocks for w in warps for s in stages
        ]  # fmt: skip

    if kernel.startswith("attend"):
        return _attention(kernel)
    if kernel == "weight_gradient":
        found = cuts((128, 256), (8,), (3, 4))
        found = [cut | {"block_m": m} for cut in found for m in (64, 128, 256)]
        half = {"block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 3}
        found = [c for c in found if c["block_m"] * c["block_n"] <= 2**15]
        return found if wide else [*found, half | {"resident": 2, "registers": 128}]
    warps = (8,) if rows >= 128 else (4, 8) if rows == 64 else (4,)
    if kernel == "up_swiglu":  # twice as wide as it says
        found = cuts((64, 128), warps, (3, 4))
    elif kernel == "down_dgrad":
        found = cuts((64, 128, 256), warps, (3, 4))
        # parts of less than 16 columns are stored in half sectors, at half the speed
        found = [cut | {"parts": 8 if cut["block_n"] > 128 else 4} for cut in found]
    else:
        found = cuts((128, 256), warps, (3, 4))
    two = [
        cut | {"resident": 2} | ({"registers": 128} if cut["warps"] == 8 else {})
        for cut in found
        if cut["block_n"] * (2 if kernel == "up_swiglu" else 1) * rows <= 2**14
    ]
    return found + two


def _attention(kernel: str) -> list[Cut]:
    pairs = [(128, 64), (128, 128), (64, 64), (64, 128)]
    if kernel == "attend_dkv":
        pairs = [(32, 128), (64, 128), (32, 64), (64, 64), (16, 128)]
    return [
        {"block_m": m, "block_n": n, "block_k": 0, "warps": warps, "stages": stages}
        for m, n in pairs
        for warps in (4, 8)
        for stages in (2, 3)
    ]


def launches(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    dy: Tensor,
    indices: Tensor,
    weights: Tensor,
    rows: int | None = None,
) -> dict[str, tuple[int, Run]]:
    """Each kernel of a routed MLP: how many times P · H · I products it makes, and a call.

    With `rows` in a tile, whatever the plan's are, and one expert's memory for all: to compile.
    """
    launch = routed_mlp.Launch(x, w1, w2, route.plan(indices, len(w1)), PLAIN)
    launch.rows = launch.rows if rows is None else rows
    pairs, inner = indices.numel(), w2.shape[2]
    h, a = x.new_empty(pairs, 2 * inner), x.new_empty(pairs, inner)
    dh, y = torch.empty_like(h), x.new_empty(pairs, w2.shape[1])
    launch.up_swiglu(weights, h, a)
    dh.copy_(h)
    dw1, dw2 = (torch.empty_like(w) if rows is None else w for w in (w1, w2))
    return {
        "up_swiglu": (2, lambda: launch.up_swiglu(weights, h, a)),
        "down": (1, lambda: launch.grouped("down", a, w2.transpose(1, 2))),
        "combine": (0, lambda: launch.combine(y)),
        "down_dgrad": (1, lambda: launch.down_dgrad(dy, h, weights)),
        "dw2": (1, lambda: launch.weight_gradient(dy, a, True, dw2, False)),
        "dw1": (2, lambda: launch.weight_gradient(dh, x, False, dw1, False)),
        "dx": (2, lambda: launch.grouped("dx", dh, w1)),
    }


def _mlp_runs(sizes: Sizes, on: torch.device, rows: int | None) -> dict[str, Run]:
    dtype = getattr(torch, sizes.dtype)
    made = torch.Generator(on).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=on, dtype=dtype, generator=made).mul_(scale)

    logits = torch.randn(sizes.tokens, sizes.experts, device=on, generator=made)
    weights, indices = logits.softmax(-1).topk(sizes.k)
    experts = sizes.experts if rows is None else 1
    w1 = draw(experts, 2 * sizes.inner, sizes.hidden, scale=sizes.hidden**-0.5)
    w2 = draw(experts, sizes.hidden, sizes.inner, scale=sizes.inner**-0.5)
    w1, w2 = (w.expand(sizes.experts, -1, -1) for w in (w1, w2))
    x, dy = draw(sizes.tokens, sizes.hidden), draw(sizes.tokens, sizes.hidden)
    found = launches(x, w1, w2, dy, indices, weights, rows)
    both = found["dw1"][1], found["dw2"][1]  # one tiling serves the two
    calls = {name: found[name][1] for name in ("up_swiglu", "down", "down_dgrad", "dx")}
    return calls | {"weight_gradient": lambda: [call() for call in both]}


def _head_runs(sizes: Sizes, on: torch.device) -> dict[str, Run]:
    dtype = getattr(torch, sizes.dtype)

    def draw(count: int) -> Tensor:
        return torch.randn(1, sizes.tokens, count, sizes.head_size, device=on, dtype=dtype)

    q, k, v = draw(sizes.heads), draw(sizes.kv_heads), draw(sizes.kv_heads)
    gate = torch.rand(1, sizes.tokens, sizes.heads, device=on)
    rows = None
    if sizes.heads_on:
        chosen = torch.rand_like(gate).argsort(-1) < sizes.heads_on
        rows = heads.rows_of(chosen, sizes.kv_heads, sizes.heads_on * sizes.tokens)
    first = torch.zeros(1, sizes.tokens, dtype=torch.int32, device=on)
    launch = heads.Launch(q, k, v, first, sizes.head_size**-0.5, gate, rows)
    out, raw, dq, dout, weighed = (torch.zeros_like(q) for _ in range(5))
    dgate, dk, dv = torch.zeros_like(gate), torch.empty_like(k), torch.empty_like(v)
    sums = torch.zeros(launch.kept, device=on)
    deltas = torch.zeros_like(sums)
    dout.normal_()
    return {
        "attend": lambda: launch.attend(out, raw, sums),
        "attend_dq": lambda: launch.attend_dq(dout, raw, sums, dq, dgate, weighed, deltas),
        "attend_dkv": lambda: launch.attend_dkv(dout, sums, deltas, dk, dv),
    }


def rows_key(sizes: Sizes) -> int:
    """The table's key for these sizes: rows of a tile, or the head size as it is computed."""
    if sizes.heads:
        return max(16, triton.next_power_of_2(sizes.head_size))
    return block_rows(sizes.tokens * sizes.k, sizes.experts)


def table_of(arch: str, dtype: str, size: str, chosen: list[Timing]) -> dict[str, Any]:
    """Tilings in the form of the shipped table."""
    found: dict[str, Any] = {}
    for timing in chosen:
        key = "*" if timing.kernel == "weight_gradient" else str(timing.rows)
        found.setdefault(timing.kernel, {})[key] = {size: timing.cut}
    return {arch: {dtype: found}}


def add(table: dict[str, Any], sizes: Sizes, chosen: list[Timing]) -> None:
    """Put tilings into a table, for experts or heads of these sizes alone."""
    arch = architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    size = f"{sizes.hidden}x{sizes.inner}"
    if sizes.heads:
        size = f"{sizes.head_size}x{sizes.head_size}"
    for kernel, by_rows in table_of(arch, sizes.dtype, size, chosen)[arch][sizes.dtype].items():
        there = table.setdefault(arch, {}).setdefault(sizes.dtype, {}).setdefault(kernel, {})
        for rows, by_size in by_rows.items():
            there.setdefault(rows, {}).update(by_size)


@contextlib.contextmanager
def tiled(sizes: Sizes, rows: int, kernel: str, cut: Cut) -> Iterator[None]:
    """Every launch of a kernel takes this tiling."""
    before = os.environ.get("MOE_KERNELS_TABLE")
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = architecture(on)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        one = Timing(kernel, rows, cut, 0.0)
        path.write_text(json.dumps(table_of(arch, sizes.dtype, "*", [one])))
        os.environ["MOE_KERNELS_TABLE"] = str(path)
        try:
            yield
        finally:
            os.environ.pop("MOE_KERNELS_TABLE")
            if before is not None:
                os.environ["MOE_KERNELS_TABLE"] = before


def tune(sizes: Sizes, workers: int, report: Callable[[Timing], None]) -> list[Timing]:
    """Time every candidate of every kernel; each is reported as it is known."""
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = rows_key(sizes)
    runs = _head_runs(sizes, on) if sizes.heads else _mlp_runs(sizes, on, None)
    jobs = [(kernel, cut) for kernel in runs for cut in candidates(kernel, rows, sizes.dtype)]
    if not devices.interpreted():
        _compile(sizes, jobs, workers)
    timings = []
    for kernel, cut in jobs:
        with tiled(sizes, rows, kernel, cut):
            try:
                timing = Timing(kernel, rows, cut, seconds(runs[kernel], on))
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                timing = Timing(kernel, rows, cut, None, str(error).split("\n")[0])
        report(timing)
        timings.append(timing)
    return timings


def best(timings: list[Timing]) -> list[Timing]:
    """The fastest tiling of each kernel."""
    found: dict[str, tuple[float, Timing]] = {}
    for timing in timings:
        if timing.seconds is not None:
            mine = timing.seconds, timing
            found[timing.kernel] = min(found.get(timing.kernel, mine), mine, key=lambda t: t[0])
    return [timing for _, timing in found.values()]


def seconds(run: Run, on: torch.device, repeats: int = 10) -> float:
    """Median time of a call with a cold cache."""
    if on.type != "cuda":
        times = [_clock(run) for _ in range(3)]
        return statistics.median(times)
    flush = _flush(on)
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _clock(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@functools.cache
def _flush(on: torch.device) -> Tensor:
    return torch.empty(64 * 2**20, dtype=torch.int32, device=on)


def _compile(sizes: Sizes, jobs: list[tuple[str, Cut]], workers: int) -> None:
    """Fill the compiler's cache: what it takes is seconds a candidate, each on a core."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _compile_only, (sizes,)) as pool:
        list(pool.map(_compile_one, jobs))


_worker: dict[str, Any] = {}


def _compile_only(sizes: Sizes) -> None:
    """In a worker: launches compile and do not run."""
    run = triton.runtime.jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = warm
    on, rows = torch.device("cuda"), rows_key(sizes)
    few = dataclasses.replace(sizes, tokens=64)
    runs = _head_runs(few, on) if sizes.heads else _mlp_runs(few, on, rows)
    _worker.update(sizes=sizes, rows=rows, runs=runs)


def _compile_one(job: tuple[str, Cut]) -> None:
    kernel, cut = job
    with tiled(_worker["sizes"], _worker["rows"], kernel, cut), contextlib.suppress(Exception):
        _worker["runs"][kernel]()  # what does not compile is met again, and told, when it is timed
