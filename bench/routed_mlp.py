"""Routed MLP, forward and backward, against transformers' experts and a dense MLP of equal FLOPs.

python bench/routed_mlp.py --out bench/results

float32, gradients of x, both weights and the routing weights. The dense MLP has the same active
FLOPs: intermediate size K·I. All sides run in turn, medians; what they compute is compared first.
E experts, K chosen, H hidden, I inner, T tokens.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.pop("MOE_KERNELS", None)  # the automatic choice is what is measured

import torch
from report import Goal, interleave, publish
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe.kernels import ops

TOLERANCE = 1e-5  # relative, in the Frobenius norm


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    tokens: int


SHAPES = (
    Shape("mix_s", 8, 2, 512, 1792, 1024),
    Shape("fine_t", 64, 8, 512, 128, 256),
    Shape("fine_s", 64, 8, 512, 128, 1024),
    Shape("fine_m", 64, 8, 1024, 256, 2048),
)


def experts_of(shape: Shape, w1: Tensor, w2: Tensor, implementation: str) -> MixtralExperts:
    """transformers' experts on the given weights."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=implementation,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(w1)
    experts.down_proj = torch.nn.Parameter(w2)
    return experts


def dense(x_TH: Tensor, w1_DH: Tensor, w2_HI: Tensor) -> Tensor:
    """SwiGLU with gate and up in one matrix, the faster way to have it."""
    gate_TI, up_TI = F.linear(x_TH, w1_DH).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TI) * up_TI, w2_HI)


def gradients(forward: Callable[[], Tensor], inputs: list[Tensor], dy_TH: Tensor) -> list[Tensor]:
    """Output and the gradients of `inputs`: what is timed."""
    y_TH = forward()
    return [y_TH.detach(), *torch.autograd.grad(y_TH, inputs, dy_TH)]


def sides(shape: Shape) -> dict[str, Callable[[], list[Tensor]]]:
    """The four sides at one shape, each a call without arguments."""
    torch.manual_seed(0)
    E, K, H, I, T = shape.experts, shape.top_k, shape.hidden, shape.inner, shape.tokens  # noqa: E741
    x_TH, dy_TH = torch.randn(T, H, requires_grad=True), torch.randn(T, H)
    w1_EDH = torch.randn(E, 2 * I, H) / H**0.5
    w2_EHI = torch.randn(E, H, I) / I**0.5
    scores_TK, indices_TK = torch.randn(T, E).softmax(-1).topk(K)
    weights_TK = (scores_TK / scores_TK.sum(-1, keepdim=True)).requires_grad_()
    result: dict[str, Callable[[], list[Tensor]]] = {}
    w1, w2 = w1_EDH.clone().requires_grad_(), w2_EHI.clone().requires_grad_()
    result["ours"] = partial(
        gradients,
        lambda: ops.routed_mlp(x_TH, w1, w2, indices_TK, weights_TK),
        [x_TH, w1, w2, weights_TK],
        dy_TH,
    )
    for name in ("grouped_mm", "eager"):
        experts = experts_of(shape, w1_EDH, w2_EHI, name)
        inputs = [x_TH, experts.gate_up_proj, experts.down_proj, weights_TK]
        run = partial(experts, x_TH, indices_TK, weights_TK)
        result[name] = partial(gradients, run, inputs, dy_TH)
    v1 = (torch.randn(2 * K * I, H) / H**0.5).requires_grad_()
    v2 = (torch.randn(H, K * I) / (K * I) ** 0.5).requires_grad_()
    result["dense"] = partial(gradients, partial(dense, x_TH, v1, v2), [x_TH, v1, v2], dy_TH)
    return result


def check(shape: Shape, runs: dict[str, Callable[[], list[Tensor]]]) -> float:
    """Largest relative difference to `eager`. Raises SystemExit where a side differs."""
    expected, worst = runs["eager"](), 0.0
    for name in ("ours", "grouped_mm"):
        names = ("y", "dx", "dw1", "dw2", "dweights")
        for what, a, b in zip(names, runs[name](), expected, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if not error <= TOLERANCE:
                raise SystemExit(
                    f"{shape.name}: {what} of {name} differs by {error:.1e} from eager"
                )
            worst = max(worst, error)
    return worst


def measure(shape: Shape, repeats: int) -> tuple[dict[str, object], list[Goal]]:
    """One row of the table and the goals of one shape."""
    runs = sides(shape)
    error = check(shape, runs)
    seconds = interleave(runs, repeats)
    ours = seconds["ours"]
    flops = 18 * shape.tokens * shape.top_k * shape.hidden * shape.inner
    weights = torch.empty(shape.experts, 2 * shape.inner, shape.hidden, device="meta")
    down = torch.empty(shape.experts, shape.hidden, shape.inner, device="meta")
    x = torch.empty(shape.tokens, shape.hidden)
    row: dict[str, object] = {
        "shape": f"{shape.name} E{shape.experts} k{shape.top_k} H{shape.hidden} "
        f"I{shape.inner} T{shape.tokens}",
        "backend": ops.backend(x, weights, down, shape.top_k),
        **{f"{name} ms": round(1e3 * s, 1) for name, s in seconds.items()},
        "GFLOP/s": round(flops / ours / 1e9),
        "ours/dense": ours / seconds["dense"],
        "ours/grouped_mm": ours / seconds["grouped_mm"],
        "eager/ours": seconds["eager"] / ours,
        "error": f"{error:.0e}",
    }
    goals = [Goal(f"{shape.name} ours/grouped_mm", ours / seconds["grouped_mm"], "≤", 1.0)]
    if shape.name == "mix_s":
        goals.append(Goal("mix_s ours/dense", ours / seconds["dense"], "≤", 1.15))
    if shape.experts == 64:
        goals.append(Goal(f"{shape.name} eager/ours", seconds["eager"] / ours, "≥", 8))
    return row, goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for routed_mlp.json and .md")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, goals = [], []
    for shape in SHAPES:
        if shape.name in options.shapes:
            row, reached = measure(shape, options.repeats)
            rows.append(row)
            goals += reached
    note = (
        f"float32, {options.threads} threads, medians of {options.repeats} runs of every side in "
        "turn after 2 to warm up. `dense`: SwiGLU of intermediate size K·I. `error`: largest "
        "relative difference of outputs and gradients to `eager`, over both other sides."
    )
    publish("routed_mlp", "Routed MLP, forward and backward", rows, goals, [note], options.out)


if __name__ == "__main__":
    main()
