"""Projections of some of the heads on a CPU against those of all: prompts, steps of decoding.

python bench/project_heads.py --out bench/results

float32, forward; each token has the same number of heads on, drawn evenly. Both sides run in turn,
medians; what they compute is compared first. T tokens, H hidden, N heads, d head size.
"""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.pop("MOE_KERNELS", None)  # the automatic choice is what is measured

import torch
from report import Goal, interleave, publish
from torch import Tensor
from torch.nn import functional as F

from moe.kernels import ops

MODELS = [(576, 9, 64), (2048, 32, 64), (4096, 32, 128)]
TOKENS = (1, 8, 128, 512)
KEEPS = (0.75, 0.5, 0.25)
TOLERANCE = 1e-5  # relative, in the Frobenius norm


def all_heads(x: Tensor, weight: Tensor, on: Tensor) -> Tensor:
    return F.linear(x, weight).unflatten(-1, (on.shape[1], -1))


def some_heads(x: Tensor, weight: Tensor, on: Tensor) -> Tensor:
    return ops.project_heads(x, weight, None, on)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows, goals = [], []
    for hidden, heads, size in MODELS:
        for tokens in TOKENS:
            torch.manual_seed(0)
            x, weight = torch.randn(tokens, hidden), torch.randn(heads * size, hidden)
            share = ops.projection_share(x.device, tokens, size * hidden)
            for keep in KEEPS:
                on = torch.rand(tokens, heads).argsort(-1).argsort(-1) < keep * heads
                sides = {
                    "all": partial(all_heads, x, weight, on),
                    "some": partial(some_heads, x, weight, on),
                }
                expected = sides["all"]() * on[..., None]
                assert (sides["some"]() - expected).norm() <= TOLERANCE * expected.norm()
                times = interleave(sides, options.repeats)
                gain = times["all"] / times["some"]
                shape = f"T{tokens} H{hidden} N{heads} d{size}"
                chosen = keep <= share
                rows.append({
                    "shape": shape, "heads on": keep, "all ms": 1e3 * times["all"],
                    "some ms": 1e3 * times["some"], "faster by": gain,
                    "chosen": "some" if chosen else "all",
                })  # fmt: skip
                if chosen:
                    goals.append(Goal(f"{shape}, {keep:g} on: faster by", gain, "≥", 1.0))
    notes = [f"{torch.get_num_threads()} threads."]
    publish(
        "project_heads", "Projections of some of the heads, CPU", rows, goals, notes, options.out
    )


if __name__ == "__main__":
    main()
