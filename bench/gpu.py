"""The Triton kernels on a GPU: right first, then how fast, against torch and against peers.

make gpu [ONLY="correctness routing kernels heads layer"] [RESULTS=DIR] [PEERS=DIR]

Writes gpu_SECTION.json and .md into RESULTS; a section that is there is not run again unless ONLY
names it. `--toy` runs everything at toy sizes in Triton's interpreter, which times nothing.
T tokens, H hidden, I inner, E experts, K chosen, P = T·K.
"""

import argparse
import functools
import hashlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # no installation is needed

import torch
from gpu_heads import heads
from gpu_layer import layer
from gpu_peers import add_to_path
from machine import PACKAGES
from report import Goal, publish
from torch import Tensor

FLOPS, BYTES = 790e12, 4.3e12  # what an H200 gives a bf16 matmul and a copy (specified goals' roof)


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int

    def __str__(self) -> str:
        return f"{self.name}: T{self.tokens} H{self.hidden} I{self.inner} E{self.experts} K{self.k}"

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has twice as many."""
        return 6.0 * self.tokens * self.k * self.hidden * self.inner


SHAPES = [
    Shape("A", 8192, 2048, 768, 128, 8),
    Shape("A'", 32768, 2048, 768, 128, 8),
    Shape("B", 8192, 4096, 14336, 8, 2),
    Shape("C", 16384, 2048, 1024, 64, 8),
    Shape("D", 24576, 1536, 256, 128, 8),
    Shape("E", 16384, 768, 256, 64, 8),
]
TOY = [Shape("toy", 64, 64, 32, 4, 2)]
CORRECT = [(64, 64, 32, 4, 2), (1000, 256, 128, 8, 2), (4096, 512, 256, 64, 8), (37, 72, 72, 5, 3),
           (1, 128, 64, 8, 8), (2048, 768, 256, 128, 8), (513, 1024, 96, 16, 1),
           (8192, 128, 512, 4, 2), (300, 2048, 768, 128, 8), (128, 64, 64, 1, 1)]  # fmt: skip


@dataclass
class Bench:
    """Where and how things are measured."""

    device: torch.device
    toy: bool
    partial: Path = Path("gpu.partial")  # what a section knows before it is through
    identity: str = ""  # of the code and the peers that it was found with
    roof: float = FLOPS

    @property
    def shapes(self) -> list[Shape]:
        return TOY if self.toy else SHAPES

    @functools.cached_property
    def flush(self) -> Tensor:
        return torch.empty(0 if self.toy else 64 * 2**20, dtype=torch.int32, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        """bf16; float32 in the interpreter, which multiplies bf16 wrongly in peers' kernels."""
        return torch.float32 if self.toy else torch.bfloat16

    def seconds(self, run: Callable[[], Any], repeats: int = 15) -> float:
        """Median time of a call, with nothing of it in the cache; 0 where nothing is timed."""
        if self.toy:
            run()
            return 0.0
        begin = time.monotonic()
        for _ in range(20):
            run()
            torch.cuda.synchronize()
            if time.monotonic() - begin > 0.3:
                break
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < repeats and (len(times) < 5 or time.monotonic() - begin < 0.7):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The call without the host's part: captured, which also proves that it asks nothing."""
        if self.toy:
            return run
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def inputs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs of O(1) from them."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*size, device=self.device, generator=generator)
            return (made * scale).to(dtype)

        logits = draw(shape.tokens, shape.experts).float()
        scores, indices = logits.softmax(-1).topk(shape.k)
        return {
            "x": draw(shape.tokens, shape.hidden),
            "w1": draw(shape.experts, 2 * shape.inner, shape.hidden, scale=shape.hidden**-0.5),
            "w2": draw(shape.experts, shape.hidden, shape.inner, scale=2 * shape.inner**-0.5),
            "indices": indices,
            "weights": scores / scores.sum(-1, keepdim=True),
            "dy": draw(shape.tokens, shape.hidden),
            "logits": logits,
        }


Section = tuple[str, list[dict[str, Any]], list[Goal], list[str]]
INPUTS = ("x", "w1", "w2", "dy", "indices", "weights")
NAMES = ("y", "dx", "dw1", "dw2", "dweights")


def correctness(bench: Bench) -> Section:
    """Errors against float64, as shares of plain torch's in the same dtype: at most 1.5.

    In processes of their own, for nearly all of it is compiling.
    """
    jobs = [
        (sizes, dtype)
        for sizes in CORRECT[: 1 if bench.toy else None]
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 16), spawn) as pool:
        rows = list(pool.map(functools.partial(errors, bench.toy), *zip(*jobs, strict=True)))
    worst = max(row[name] for row in rows for name in NAMES)
    goal = Goal("largest share of plain torch's error", worst, "≤", 1.5)
    return "Routed MLP: error as a share of plain torch's", rows, [goal], []


def errors(toy: bool, sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Of one shape and dtype: the output's and each gradient's."""
    from moe.kernels import ops
    from moe.kernels.routed_mlp import naive

    shape = Shape("", *sizes)
    given = Bench(torch.device("cpu" if toy else "cuda"), toy).inputs(shape, dtype)
    results = {}
    for name, function, wide in (
        ("exact", naive.routed_mlp, torch.float64),
        ("plain", naive.routed_mlp, dtype),
        ("ours", ops.routed_mlp, dtype),
    ):
        x, w1, w2, dy = (given[n].to(wide) for n in ("x", "w1", "w2", "dy"))
        weights = given["weights"].to(torch.promote_types(wide, torch.float32))
        leaves = [t.requires_grad_() for t in (x, w1, w2, weights)]
        y = function(x, w1, w2, given["indices"], weights)
        results[name] = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    row: dict[str, Any] = {"shape": str(shape), "dtype": str(dtype)[6:]}
    for index, name in enumerate(NAMES):
        exact = results["exact"][index]
        ours, plain = ((results[w][index].double() - exact).norm() for w in ("ours", "plain"))
        # in float32 2e-6 of the norm are as good, whatever torch's own order of sums gives
        least = (2e-6 / 1.5 if dtype == torch.float32 else 1e-7) * exact.norm()
        row[name] = (ours / plain.clamp(min=least)).item()
    return row


def routing(bench: Bench) -> Section:
    """All of routing in two launches, against the chain of torch operations."""
    from moe.kernels import ops

    rows, goals = [], []
    sizes = [(32768, 128, 8), (8192, 128, 8), (8192, 8, 2), (16384, 64, 8), (32768, 512, 8)]
    for tokens, experts, k in [(64, 8, 2)] if bench.toy else sizes:
        logits = torch.randn(tokens, experts, device=bench.device)

        def chain(logits: Tensor = logits, k: int = k, experts: int = experts) -> Any:
            scores, indices = logits.softmax(-1).topk(k)
            weights = scores / scores.sum(-1, keepdim=True)
            flat, order = torch.sort(indices.flatten(), stable=True)
            offsets = torch.bincount(flat, minlength=experts).cumsum(0)
            return weights, order, order // k, offsets

        def ours(logits: Tensor = logits, k: int = k) -> Any:
            return ops.route(logits, k, "softmax", True)

        mine, theirs = (1e6 * bench.seconds(run) for run in (ours, chain))
        device = 1e6 * bench.seconds(bench.graph(ours))
        rows.append({
            "shape": f"T{tokens} E{experts} K{k}", "ours, on the device µs": device,
            "ours, called µs": mine, "torch, called µs": theirs,
        })  # fmt: skip
        if (tokens, experts) == (32768, 128):
            goals.append(Goal("routing of 32k tokens, µs", device, "≤", 25))
    return "Routing", rows, goals, []


def kernels(bench: Bench) -> Section:
    """Each kernel of the routed MLP, its share of the roof, torch's matmul of the same FLOPs."""
    from moe.kernels.tune import launches

    rows = []
    for shape in bench.shapes:
        given = bench.inputs(shape, bench.dtype)
        pairs, hidden, inner = shape.tokens * shape.k, shape.hidden, shape.inner
        once = 2.0 * pairs * hidden * inner
        for name, (passes, run) in launches(**{n: given[n] for n in INPUTS}).items():
            seconds = bench.seconds(run)
            flops = passes * once
            least = flops / FLOPS if passes else 2.0 * hidden * (pairs + shape.tokens) / BYTES
            plain = 0.0
            if passes:
                left = given["x"].new_empty(pairs, hidden)
                right = given["x"].new_empty(hidden, passes * inner)
                plain = bench.seconds(functools.partial(torch.mm, left, right))
            rows.append({
                "shape": str(shape), "kernel": name, "ms": 1e3 * seconds,
                "TFLOP/s": seconds and flops / seconds / 1e12,
                "of roof": seconds and least / seconds, "torch.mm ms": 1e3 * plain,
            })  # fmt: skip
    return "Kernels of the routed MLP, bf16", rows, [], []


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "correctness": correctness, "routing": routing, "kernels": kernels, "heads": heads,
    "layer": layer,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=[])
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--peers", type=Path, help="a folder of checkouts of peers")
    parser.add_argument("--toy", action="store_true", help="in the interpreter, at toy sizes")
    options = parser.parse_args()
    if options.toy and options.results == Path("bench/results"):
        raise SystemExit("--toy times nothing: name a folder of its own with --results.")
    if options.toy:
        os.environ |= {"TRITON_INTERPRET": "1", "MOE_KERNELS": "triton"}
    elif not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device; bench/gpu.py --toy runs without one.")
    if options.peers and not options.peers.is_dir():
        raise SystemExit(f"--peers {options.peers} is no folder.")
    if options.results.exists() and not options.results.is_dir():
        raise SystemExit(f"--results {options.results} is no folder.")
    commits = add_to_path(options.peers)
    device = torch.device("cpu" if options.toy else "cuda")
    sources = sorted((Path(__file__).parents[1] / "kernels").rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    bench = Bench(device, options.toy, identity=f"{code} {sorted(commits.items())}")
    for name, section in SECTIONS.items():
        there = options.results / f"gpu_{name}.json"
        if (options.only and name not in options.only) or (not options.only and there.exists()):
            print(f"{name}: {there} is there already" if there.exists() else f"{name}: not asked")
            continue
        begin = time.monotonic()
        options.results.mkdir(parents=True, exist_ok=True)
        bench.partial = options.results / f"gpu_{name}.partial"
        title, rows, goals, notes = section(bench)
        what = "Triton's interpreter" if options.toy else torch.cuda.get_device_name()
        notes.append(f"On {what}.")
        notes += [f"{peer} at {commit}" for peer, commit in commits.items()]
        packages = (*PACKAGES, "triton")
        publish(f"gpu_{name}", title, rows, goals, notes, options.results, packages)
        print(f"{name} took {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
