"""Other people's routed MLPs behind one call: run(x, weights) -> y, on given experts and indices.

Each maker takes w1 [E, 2I, H] (gate rows first), w2 [E, H, I], indices [T, K] and returns the call
and the leaves of its weights. One that does not import raises, which is reported as it is.
Peers are looked for on the path; PEERS=DIR adds every folder in it.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor], Tensor]
Maker = Callable[[Tensor, Tensor, Tensor], tuple[Call, list[Tensor]]]


def add_to_path(folder: Path | None) -> dict[str, str]:
    """Put the folders of peers on the path; their commits, where git knows them."""
    commits = {}
    for place in sorted(folder.iterdir()) if folder else []:
        if place.is_dir():
            sys.path.insert(0, str(place))
            noted = place / "COMMIT"
            if noted.is_file():
                commits[place.name] = noted.read_text().strip()
            elif (place / ".git").exists():
                asked = ["git", "-C", str(place), "rev-parse", "--short", "HEAD"]
                found = subprocess.run(asked, capture_output=True, text=True, check=False)
                commits[place.name] = found.stdout.strip()
            else:
                commits[place.name] = "unknown commit"
    return commits


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def ours(w1: Tensor, w2: Tensor, indices: Tensor) -> tuple[Call, list[Tensor]]:
    from moe.kernels import ops

    a, b = leaf(w1), leaf(w2)
    return lambda x, weights: ops.routed_mlp(x, a, b, indices, weights), [a, b]


def transformers_grouped(w1: Tensor, w2: Tensor, indices: Tensor) -> tuple[Call, list[Tensor]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=w2.shape[1],
        intermediate_size=w2.shape[2],
        num_local_experts=len(w1),
        num_experts_per_tok=indices.shape[1],
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(w1.clone())
    experts.down_proj = torch.nn.Parameter(w2.clone())
    leaves = [experts.gate_up_proj, experts.down_proj]
    return lambda x, weights: experts(x, indices, weights.to(x.dtype)), leaves


def scattermoe(w1: Tensor, w2: Tensor, indices: Tensor) -> tuple[Call, list[Tensor]]:
    from scattermoe.mlp import GLUMLP

    experts, inner = len(w1), w2.shape[2]
    mlp = GLUMLP(w2.shape[1], inner, experts, indices.shape[1]).to(w1.device, w1.dtype)
    with torch.no_grad():  # its up rows come first
        mlp.experts.weight.copy_(w1.unflatten(1, (2, inner)).flip(1).flatten(1, 2))
        mlp.output_experts.weight.copy_(w2)
    leaves = [mlp.experts.weight, mlp.output_experts.weight]
    return lambda x, weights: mlp(x, weights.to(x.dtype), indices), leaves


def liger(w1: Tensor, w2: Tensor, indices: Tensor) -> tuple[Call, list[Tensor]]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    a, b, short = leaf(w1), leaf(w2), indices.int()
    return lambda x, weights: LigerFusedMoEFunction.apply(x, a, b, short, weights), [a, b]


def sonicmoe(w1: Tensor, w2: Tensor, indices: Tensor) -> tuple[Call, list[Tensor]]:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, k = indices.shape
    a = leaf(w1.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))  # gate and up by turns
    b = leaf(w2)
    token = torch.arange(tokens, device=w1.device, dtype=torch.int32).repeat_interleave(k)
    expert = indices.flatten().int()
    stream = torch.cuda.current_stream().cuda_stream

    def run(x: Tensor, weights: Tensor) -> Tensor:
        return moe_general_routing_inputs(
            x, weights.flatten(), token, expert, a.permute(1, 2, 0), None, b.permute(1, 2, 0),
            None, len(w1), stream, ActivationType.SWIGLU,
        )[0]  # fmt: skip

    return run, [a, b]


def megablocks(w1: Tensor, w2: Tensor, indices: Tensor) -> tuple[Call, list[Tensor]]:
    from megablocks import ops
    from megablocks.layers.gelu import gelu  # noqa: F401  (a partial install fails here)

    a, b = leaf(w1), leaf(w2)
    flat = indices.flatten().int()
    order = torch.argsort(flat, stable=True).int()
    counts = torch.bincount(flat, minlength=len(w1))
    bins = counts.cumsum(0).int()

    def run(x: Tensor, weights: Tensor) -> Tensor:
        import grouped_gemm

        rows, k = ops.gather(x, order, flat[order.long()], bins, indices.shape[1]), indices.shape[1]
        size = counts.cpu()
        gate, up = grouped_gemm.ops.gmm(rows, a, size, trans_b=True).chunk(2, -1)
        y = grouped_gemm.ops.gmm(torch.nn.functional.silu(gate) * up, b, size, trans_b=True)
        return ops.scatter(y, order, flat[order.long()], weights.flatten().to(x.dtype), bins, k)

    return run, [a, b]


PEERS: dict[str, Maker] = {
    "ours": ours,
    "transformers grouped_mm": transformers_grouped,
    "ScatterMoE": scattermoe,
    "Liger": liger,
    "SonicMoE": sonicmoe,
    "MegaBlocks": megablocks,
}
