"""A model too large for one device, its experts divided among ranks: forward passes only."""

import math

from torch import nn

from moe.errors import UserError
from moe.model.experts import RoutedMLP
from moe.parallel.exchange import AllToAll
from moe.parallel.world import Ranks


def spread_experts(model: nn.Module, expert: int, ranks: Ranks) -> None:
    """Leave this rank its share of the experts of every layer: `expert` neighbours hold them all.

    From now on a forward pass takes all ranks at once. Raises UserError where they cannot be
    divided so.
    """
    routed = [m for m in model.modules() if isinstance(m, RoutedMLP)]
    if not routed:
        raise UserError(f"--expert-parallel {expert}: the model has no routed MLP of ours. Use 1.")
    counts = sorted({m.experts.num_experts for m in routed})
    shared = math.gcd(ranks.size, *counts)
    if shared % expert:
        legal = [n for n in range(1, shared + 1) if shared % n == 0]
        raise UserError(
            f"--expert-parallel {expert} does not divide both the {ranks.size} ranks and the "
            f"experts of every layer ({', '.join(map(str, counts))}). "
            f"Use one of {', '.join(map(str, legal))}."
        )
    mesh = ranks.expert_mesh(expert)
    group, place = mesh.get_group("expert"), mesh.get_local_rank("expert")
    for module in routed:
        experts = module.experts
        module.dispatcher = AllToAll(group, experts.num_experts)
        for name, parameter in list(experts.named_parameters(recurse=False)):
            share = parameter.detach().chunk(expert)[place].clone()
            setattr(experts, name, nn.Parameter(share, requires_grad=False))
