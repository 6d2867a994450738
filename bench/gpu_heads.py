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

SHAPES = [(1, 8192, 32, 8, 128), (1, 32768, 32, 8, 128), (4, 2048, 32, 32, 64)]
TOY = [(1, 64, 4, 2, 16)]


def heads(bench: Any) -> tuple[str, list[dict[str, Any]], list[Goal], list[str]]:
    """With a gate and without, over all heads, half of them and a quarter."""
    rows, goals = [], []
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
            goals.append(
                Goal("gate over plain SDPA", found["ours, 1 on"] / found["SDPA"], "≤", 1.01)
            )
            goals.append(Goal("half of the heads", found["SDPA"] / found["ours, 0.5 on"], "≥", 1.3))
    return "Gated attention", rows, goals, []


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

    def plain() -> Tensor:
        parts = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2)

    def ours(keep: float) -> Tensor:
        most = int(keep * count)
        on = None if keep == 1 else rank < most
        return ops.attend_heads(q, k, v, first, size**-0.5, gate, on, most * batch * length)

    runs = {"SDPA": plain, "SDPA, then gate": lambda: ops.gate_heads(plain(), gate)}
    runs |= {f"ours, {share:g} on": functools.partial(ours, share) for share in (1, 0.5, 0.25)}
    return runs, [q, k, v], torch.randn_like(q)
