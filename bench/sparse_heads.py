"""Attention over some of the heads on a CPU against all of them and a mask, forward and backward.

python bench/sparse_heads.py --out bench/results

float32, causal; each token has the same number of heads on, drawn evenly. Both sides run in turn,
medians; what they compute is compared first. S tokens, N query heads, G KV heads, d head size.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("MOE_KERNELS", None)  # the automatic choice is what is measured

import torch
from report import Goal, interleave, publish
from torch import Tensor
from torch.nn import functional as F

from moe.kernels import ops

SHAPES = [(512, 8, 8, 64), (2048, 8, 8, 64), (2048, 8, 2, 64)]
KEEPS = (0.75, 0.5, 0.25, 0.125)
TOLERANCE = 1e-5  # relative, in the Frobenius norm


def all_heads(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, on: Tensor, first: Tensor) -> Tensor:
    parts = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2)
    return out * (gate * on)[..., None]


def some_heads(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, on: Tensor, first: Tensor) -> Tensor:
    return ops.attend_heads(q, k, v, first, q.shape[-1] ** -0.5, gate, on)


def step(
    attend: Any, leaves: list[Tensor], on: Tensor, first: Tensor, dout: Tensor
) -> list[Tensor]:
    out = attend(*leaves, on, first)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows, goals = [], []
    for length, heads, groups, size in SHAPES:
        torch.manual_seed(0)
        drawn = [torch.randn(1, n, length, size) for n in (heads, groups, groups, heads)]
        q, k, v, dout = (t.transpose(1, 2) for t in drawn)
        gate, first = torch.rand(1, length, heads), torch.zeros(1, length, dtype=torch.int32)
        for keep in KEEPS:
            on = torch.rand(1, length, heads).argsort(-1).argsort(-1) < keep * heads
            leaves = [t.detach().requires_grad_() for t in (q, k, v, gate)]
            sides = {
                "all": partial(step, all_heads, leaves, on, first, dout),
                "some": partial(step, some_heads, leaves, on, first, dout),
            }
            for ours, theirs in zip(sides["some"](), sides["all"](), strict=True):
                assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
            times = interleave(sides, options.repeats)
            gain = times["all"] / times["some"]
            shape = f"S{length} N{heads} G{groups} d{size}"
            rows.append({
                "shape": shape, "heads on": keep, "all, then mask ms": 1e3 * times["all"],
                "some ms": 1e3 * times["some"], "faster by": gain,
            })  # fmt: skip
            if keep <= 0.5:
                goals.append(Goal(f"{shape}, {keep:g} on: faster by", gain, "≥", 1.0))
    notes = [f"{torch.get_num_threads()} threads."]
    publish(
        "sparse_heads", "Attention over some of the heads, CPU", rows, goals, notes, options.out
    )


if __name__ == "__main__":
    main()
