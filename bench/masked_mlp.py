"""A union's slices on a CPU: all at once and weighed, against each token's own by themselves.

python bench/masked_mlp.py --out bench/results

float32, inference, SmolLM2-135M's sizes: three quarters of an MLP of 1,536 neurons in slices. Both
sides run in turn, medians; what they compute is compared first. T tokens, H hidden, E experts.
"""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.pop("MOE_KERNELS", None)  # the automatic choice is what is measured

import torch
from report import Goal, interleave, publish
from torch import Tensor

from moe.kernels import ops

HIDDEN, NEURONS = 576, 1152
EXPERTS = (6, 24, 96, 192)
SHARES = (2 / 3, 1 / 3, 1 / 6)
TOLERANCE = 1e-5  # relative, in the Frobenius norm


def apart(x_TH: Tensor, w1: Tensor, w2: Tensor, weights_TE: Tensor) -> Tensor:
    """As the model has it where masks do not pay."""
    token_P, expert_P = weights_TE.nonzero(as_tuple=True)
    weight_P1 = weights_TE[token_P, expert_P][:, None]
    y_PH = ops.routed_mlp(x_TH[token_P], w1, w2, expert_P[:, None], weight_P1)
    return torch.zeros_like(x_TH).index_add(0, token_P, y_PH)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows, goals = [], []
    for tokens in (1024, 1):
        for experts in EXPERTS:
            inner = NEURONS // experts
            torch.manual_seed(0)
            x, w2 = torch.randn(tokens, HIDDEN), torch.randn(experts, HIDDEN, inner) * 0.03
            w1 = torch.randn(experts, 2 * inner, HIDDEN) * 0.03
            for share in SHARES:
                best = torch.rand(tokens, experts).topk(round(experts * share), dim=1).indices
                weights = torch.zeros(tokens, experts).scatter(1, best, 1.0)
                given = x, w1, w2, weights
                sides = {
                    "at once": partial(ops.masked_mlp, *given),
                    "apart": partial(apart, *given),
                }
                expected = sides["apart"]()
                assert (sides["at once"]() - expected).norm() <= TOLERANCE * expected.norm()
                times = interleave(sides, options.repeats)
                gain = times["apart"] / times["at once"]
                chosen = ops.masks_pay(x, share, inner)
                rows.append(
                    {"tokens": tokens, "slices": experts, "on": f"{share:.2f}",
                     **{f"{n}, ms": 1e3 * s for n, s in times.items()},
                     "apart / at once": gain, "chosen": "at once" if chosen else "apart"}
                )  # fmt: skip
                name = f"T{tokens} E{experts} {share:.2f}: what is chosen against the other"
                goals.append(Goal(name, gain if chosen else 1 / gain, "≥", 0.9))
    title = "Slices of an MLP on a CPU: all at once, or each token's own"
    publish("masked_mlp", title, rows, goals, [], options.out)


if __name__ == "__main__":
    main()
