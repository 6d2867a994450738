"""Which neurons of an MLP are always on, and which belong together: by what they add, and when.

A neuron's importance to a token is what it adds there. Those of largest mean are shared; the rest
go to groups of one size by their profiles, importance over tokens brought down to some numbers by a
random matrix. D neurons, S tokens of a window, P numbers of a profile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.upcycle.calibrate.ranks import Ranks
from moe.upcycle.expression import draw
from moe.upcycle.partition import balanced_clusters

NUMBERS = 64  # of a profile


def order_neurons(
    activations: Sequence[Tensor],
    starts: Sequence[int],
    weight_D: Tensor,
    always: int,
    groups: int,
    key: str,
    ranks: Ranks,
) -> Tensor:
    """The neurons that are always on, then group by group [D].

    `activations` are those of this rank's windows [S, D], whose first tokens have the numbers
    `starts` in the whole text; `weight_D` is what an activation of 1 adds.
    """
    inputs, device = len(weight_D), weight_D.device
    sums_ND = torch.zeros(2 + NUMBERS, inputs, dtype=torch.float64, device=device)
    for z_SD, start in zip(activations, starts, strict=True):
        worth_SD = z_SD.abs() * weight_D
        sums_ND[0] += worth_SD.sum(0).double()
        sums_ND[1] += worth_SD.square().sum(0).double()
        numbers = draw(f"{key}/profiles", start * NUMBERS, (start + len(z_SD)) * NUMBERS)
        sums_ND[2:] += (numbers.view(-1, NUMBERS).to(device).T @ worth_SD).double()
    ranks.sum(sums_ND)
    mean_D, square_D = sums_ND[0].cpu(), sums_ND[1].cpu()
    profile_DP = (sums_ND[2:].cpu() / square_D.sqrt().clamp(min=1e-30)).T
    first = mean_D.argsort(descending=True, stable=True)[:always].sort().values
    rest = [j for j in range(inputs) if j not in set(first.tolist())]
    found = balanced_clusters(profile_DP[rest].float(), groups, f"{key}/groups")
    grouped = [rest[i] for group in found for i in group]
    return torch.cat([first, torch.tensor(grouped, dtype=torch.long)])
