"""Which neurons of an MLP belong together: orders whose slices become experts.

order = order_of("kmeans", layer=3, gate=Read(...), num_experts=8, shared=0, key="0/3")
order.indices()[0:192]   # the neurons of the first expert
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.errors import UserError
from moe.upcycle.expression import Expression
from moe.upcycle.rearrange import Given

ROUNDS = 20  # of k-means; assignments rarely change after ten
TOKENS = 1024  # of text, whose activations tell neurons apart


@dataclass(frozen=True, slots=True)
class Partition:
    """Neurons grouped by what `_profiles` says of them, groups of one size, found when first asked.

    The `shared` neurons with the largest profiles come first and are in no group.
    """

    name: str
    layer: int
    gate: Expression
    num_experts: int
    shared: int
    key: str
    activations: "Activations | None" = None
    _found: list[list[int]] = field(default_factory=list, compare=False, repr=False)

    def indices(self) -> Sequence[int]:
        if not self._found:
            self._found.append(self._find())
        return self._found[0]

    def _find(self) -> list[int]:
        profiles = self._profiles()
        order = profiles.norm(dim=1).argsort(descending=True, stable=True).tolist()
        rest = sorted(order[self.shared :])
        groups = balanced_clusters(F.normalize(profiles[rest], dim=1), self.num_experts, self.key)
        grouped = [rest[i] for group in groups for i in group]
        return sorted(order[: self.shared]) + grouped

    def _profiles(self) -> Tensor:
        """[neurons, features], what makes neurons alike."""
        if self.activations is not None:
            return self.activations.of(self.layer)
        return self.gate.rows(0, self.gate.shape[0]).float()

    def __str__(self) -> str:
        return f"neurons by {self.name}"


def order_of(
    partition: str,
    layer: int,
    gate: Expression,
    num_experts: int,
    shared: int,
    key: str,
    activations: "Activations | None" = None,
) -> Given | Partition:
    """The order that a partition gives a layer's neurons. `gate` is its gate matrix."""
    width = gate.shape[0]
    if partition == "contiguous":
        return Given(tuple(range(width)))
    if partition == "random":
        return Given(tuple(random.Random(key).sample(range(width), width)))
    return Partition(partition, layer, gate, num_experts, shared, key, activations)


def balanced_clusters(points: Tensor, count: int, key: str) -> list[list[int]]:
    """`count` groups of one size of near points [N, D], each group in ascending order.

    k-means whose assignment has room for N / count points a group; those that would lose most by
    their last choice choose first.
    """
    size = len(points) // count
    first = random.Random(key).sample(range(len(points)), count)
    centres = points[first]
    groups: list[list[int]] = []
    for _ in range(ROUNDS):
        distance = torch.cdist(points, centres)
        earlier, groups = groups, _assign(distance, size)
        if groups == earlier:
            break
        centres = torch.stack([points[group].mean(0) for group in groups])
    return groups


def _assign(distance: Tensor, size: int) -> list[list[int]]:
    ranked = distance.sort(dim=1, stable=True)
    regret = ranked.values[:, -1] - ranked.values[:, 0]
    groups: list[list[int]] = [[] for _ in range(distance.shape[1])]
    choices = ranked.indices.tolist()
    for point in regret.argsort(descending=True, stable=True).tolist():
        group = next(g for g in choices[point] if len(groups[g]) < size)
        groups[group].append(point)
    return [sorted(group) for group in groups]


class Activations:
    """What each neuron adds to the residual stream on some text: |h| · ‖its down column‖.

    One pass of the model over the text, when first asked; all layers are kept, in bfloat16.
    """

    def __init__(self, folder: Path, text: Path) -> None:
        self.folder, self.text = folder, text
        self._layers: list[Tensor] = []

    def of(self, layer: int) -> Tensor:
        """[neurons, tokens], float32."""
        if not self._layers:
            self._record()
        return self._layers[layer].T.float()

    @torch.no_grad()
    def _record(self) -> None:
        from moe.upcycle.verify import load, windows

        model = load(self.folder)
        ids, _ = windows(self.folder, self.text, model.config.vocab_size)
        kept: dict[int, list[Tensor]] = {}

        def keep(index: int, norm_I: Tensor) -> Callable[..., None]:
            def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
                kept.setdefault(index, []).append((inputs[0][0].abs() * norm_I).bfloat16())

            return hook

        for index, layer in enumerate(model.model.layers):
            down = getattr(layer.mlp, "down_proj", None)
            if down is not None:
                down.register_forward_pre_hook(keep(index, down.weight.norm(dim=0)))
        for window in ids.flatten()[:TOKENS].split(ids.shape[1]):
            model(window[None], use_cache=False)
        self._layers = [
            torch.cat(kept[i]) if i in kept else torch.empty(0, 0)
            for i in range(len(model.model.layers))
        ]


def require_text(reads_text: bool, text: Path | None) -> None:
    """Raise UserError where a recipe needs text that was not given, or has no use for it."""
    what = (
        "--router and --shared calibrated, --partition activation and shared-coactivation, and "
        "--output-scale calibrated"
    )
    if reads_text and text is None:
        raise UserError(f"{what} need --calibrate FILE, a text to run over.")
    if not reads_text and text is not None:
        raise UserError(f"--calibrate is for {what}: nothing else is fitted to text.")
