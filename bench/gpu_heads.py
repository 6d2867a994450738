"""Gated attention against torch's own: `make gpu`'s section `heads`.

B batch, S tokens, N query heads, G KV heads, d head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from report import Goal
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(1, 8192, 32, 8, 128), (1, 32768, 32, 8, 128), (4, 2048, 32, 32, 64)]
# head size, queries, how far back they see, heads of 8 that are on
CASES = [(64, 300, 300, 8), (64, 300, 300, 4), (128, 700, 700, 4), (128, 700, 100, 8),
         (128, 513, 700, 2), (96, 257, 40, 4), (64, 1024, 1024, 1)]  # fmt: skip
TOY_CASES = [(16, 40, 40, 8), (16, 40, 12, 4)]
DECODING = [(8, 8192, 32, 8, 128), (8, 8192, 32, 32, 128)]
TOY, TOY_DECODING = [(1, 64, 4, 2, 16)], [(2, 64, 4, 2, 16)]


def heads(bench: Any) -> tuple[str, list[dict[str, Any]], list[Goal], list[str]]:
    """With a gate and without, over all heads, half of them and a quarter."""
    worst = max(accuracy(bench, *case) for case in (TOY_CASES if bench.toy else CASES))
    rows, goals = [], [Goal("largest share of plain torch's error", worst, "≤", 1.5)]
    for shape in TOY if bench.toy else SHAPES:
        runs, leaves, dout = sides(bench, *shape)
        found = {}
        for name, run in runs.items():
            once = bench.seconds(run)
            found[name] = bench.seconds(functools.partial(both, run, leaves, dout))
            rows.append({
                "shape": "B{} S{} N{} G{} d{}".format(*shape), "side": name,
                "forward ms": 1e3 * once, "both ms": 1e3 * found[name],
                "SDPA / this": found[name] and found["SDPA"] / found[name],
            })  # fmt: skip
        if shape == SHAPES[0]:
            gated, half = found["ours, gated"], found["ours, 0.5 on"]
            after = found["SDPA, then gate"]
            goals += [
                Goal("the kernel with its gate, over without", gated / found["ours"], "≤", 1.01),
                Goal("SDPA and a gate after it, over SDPA", after / found["SDPA"], "≤", 1.01),
                Goal("half of the heads, flash over ours", found["SDPA flash"] / half, "≥", 1.3),
            ]
    for shape in TOY_DECODING if bench.toy else DECODING:
        times = {name: bench.seconds(bench.graph(run)) for name, run in decoding(bench, *shape)}
        rows += [{
            "shape": "decoding B{} L{} N{} G{} d{}".format(*shape), "side": name,
            "forward ms": 1e3 * once, "both ms": 0.0, "SDPA / this": once and times["SDPA"] / once,
        } for name, once in times.items()]  # fmt: skip
    return "Gated attention", rows, goals, []


def accuracy(bench: Any, size: int, length: int, window: int, on: int) -> float:
    """The largest error against float64, of outputs and gradients, as a share of plain torch's."""
    from moe.kernels import ops
    from moe.kernels.heads import naive

    made = [torch.randn(2, length, heads, size, device=bench.device) for heads in (8, 2, 2, 8)]
    q, k, v, dout = (t.to(bench.dtype) for t in made)
    gate = torch.rand(2, length, 8, device=bench.device)
    place = torch.arange(length, dtype=torch.int32, device=bench.device)
    first = (place - window).clamp(min=0).expand(2, -1)
    chosen = torch.rand_like(gate).argsort(-1) < on if on < 8 else None
    results = {}
    for name, function, wide in (
        ("exact", naive.attend_heads, torch.float64),
        ("plain", naive.attend_heads, bench.dtype),
        ("ours", ops.attend_heads, bench.dtype),
    ):
        leaves = [t.to(wide).requires_grad_() for t in (q, k, v)]
        leaves.append(gate.to(torch.promote_types(wide, torch.float32)).requires_grad_())
        out = function(*leaves[:3], first, size**-0.5, leaves[3], chosen)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, dout.to(wide))]
    shares = []
    for ours, plain, exact in zip(*(results[n] for n in ("ours", "plain", "exact")), strict=True):
        errors = [(t.double() - exact).norm() for t in (ours, plain)]
        shares.append((errors[0] / errors[1].clamp(min=1e-6 * exact.norm())).item())
    return max(shares)


def decoding(
    bench: Any, batch: int, keys: int, count: int, groups: int, size: int
) -> list[tuple[str, Callable[[], Tensor]]]:
    """One new token per sequence after a cache of keys; shares of the heads are on."""
    from moe.kernels import ops

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device).to(bench.dtype).transpose(1, 2)

    q = draw(batch, count, 1, size)
    k, v = draw(batch, groups, keys, size), draw(batch, groups, keys, size)
    gate = torch.rand(batch, 1, count, device=bench.device)
    rank = torch.rand_like(gate).argsort(-1).argsort(-1)
    first = torch.zeros(batch, 1, dtype=torch.int32, device=bench.device)
    parts = [t.transpose(1, 2) for t in (q, k, v)]

    @torch.no_grad()
    def plain() -> Tensor:
        return F.scaled_dot_product_attention(*parts, enable_gqa=True).transpose(1, 2)

    @torch.no_grad()
    def ours(on: Tensor | None) -> Tensor:
        return ops.attend_heads(q, k, v, first, size**-0.5, gate, on)

    runs: dict[str, Callable[[], Tensor]] = {"SDPA": plain}
    runs |= {
        f"ours, {share:g} on": functools.partial(ours, rank < share * count if share < 1 else None)
        for share in (1, 0.5, 0.25)
    }
    return list(runs.items())


def both(run: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor) -> Any:
    return torch.autograd.grad(run(), leaves, dout)


def sides(
    bench: Any, batch: int, length: int, count: int, groups: int, size: int
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """Each side as a call, the leaves to differentiate by, and the output's gradient."""
    from moe.kernels import ops

    def draw(heads: int) -> Tensor:
        made = torch.randn(batch, heads, length, size, device=bench.device)
        return made.to(bench.dtype).transpose(1, 2).requires_grad_()

    q, k, v = draw(count), draw(groups), draw(groups)
    gate = torch.rand(batch, length, count, device=bench.device)
    rank = torch.rand_like(gate).argsort(-1).argsort(-1)
    first = torch.zeros(batch, length, dtype=torch.int32, device=bench.device)

    parts = [t.transpose(1, 2) for t in (q, k, v)]
    mask = None
    if length <= 8192:
        place = torch.arange(length, device=bench.device)
        mask = (place[:, None] >= place).expand(batch, 1, length, length)

    def plain(**how: Any) -> Tensor:
        how = how or {"is_causal": True}
        return F.scaled_dot_product_attention(*parts, enable_gqa=True, **how).transpose(1, 2)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH):
            return plain()

    def ours(keep: float) -> Tensor:
        most = int(keep * count)
        on = None if keep == 1 else rank < most
        return ops.attend_heads(q, k, v, first, size**-0.5, gate, on, most * batch * length)

    runs = {"SDPA": plain, "SDPA flash": flash}
    if mask is not None:
        runs["SDPA with a mask"] = functools.partial(plain, attn_mask=mask)
    runs["SDPA, then gate"] = lambda: ops.gate_heads(plain(), gate)
    runs["ours"] = lambda: ops.attend_heads(q, k, v, first, size**-0.5)
    runs["ours, gated"] = functools.partial(ours, 1)
    runs |= {f"ours, {share:g} on": functools.partial(ours, share) for share in (0.5, 0.25)}
    return runs, [q, k, v], torch.randn_like(q)
