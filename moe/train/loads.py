"""Routing of one optimiser step, summed over micro-batches and ranks in one collective.

meter = LoadMeter(model.config)
meter.add(output.routing)             # per micro-batch
step = meter.total(ranks.sum)         # StepLoads; starts the next step
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.model import LayerLoad, LayerRouting, RoutedLlamaConfig, RoutingLoad
from moe.model.spec import DenseMLP

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")


@dataclass(frozen=True, slots=True)
class StepLoads:
    """Loads of every router of the model, by (layer, part), over one whole global batch."""

    routers: dict[tuple[int, Part], RoutingLoad]
    num_layers: int

    def reference(self) -> list[LayerLoad]:
        """Fractions of tokens per head and expert: what balance scope `global` works on next."""

        def fraction(layer: int, part: Part) -> Tensor | None:
            load = self.routers.get((layer, part))
            return None if load is None else load.counts / load.tokens.clamp(min=1)

        return [
            LayerLoad(*(fraction(layer, part) for part in PARTS))
            for layer in range(self.num_layers)
        ]

    def of(self, part: Part) -> dict[int, RoutingLoad]:
        """Layer to load, for the layers where this part is routed."""
        return {layer: load for (layer, p), load in self.routers.items() if p == part}

    def selections(self, config: RoutedLlamaConfig) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens per expert of each MLP with selection biases, and how many each is to have."""
        counts, targets = [], []
        for layer, load in self.of("mlp").items():
            spec = config.mlp_spec(layer)
            if not isinstance(spec, DenseMLP) and spec.selection_bias:
                counts.append(load.counts)
                targets.append(load.tokens * spec.top_k / spec.num_experts)
        return counts, targets

    def summary(self) -> dict[str, float]:
        """Per part: worst load over mean, dead share, entropy over its maximum, balance, z; the
        share of choices that were dropped, where that is possible.
        """
        result: dict[str, float] = {}
        for part, noun in zip(PARTS, ("heads", "experts"), strict=True):
            loads = list(self.of(part).values())
            if not loads:
                continue
            ratio = torch.stack([x.counts.max() / x.counts.mean() for x in loads]).max()
            dead = torch.stack([(x.counts == 0).float().mean() for x in loads]).mean()
            even = [torch.tensor(max(2, len(x.counts))).log() for x in loads]
            entropy = torch.stack(
                [x.entropy.cpu() / x.tokens.cpu() / e for x, e in zip(loads, even, strict=True)]
            ).mean()
            result[f"{noun}/max_over_mean"] = ratio.item()
            result[f"{noun}/dead_share"] = dead.item()
            result[f"{noun}/entropy_share"] = entropy.item()
            result[f"{noun}/balance"] = torch.stack([x.balance for x in loads]).mean().item()
            if part == "mlp":
                result["experts/z"] = torch.stack([x.z for x in loads]).mean().item()
                dropped = [(x.dropped, x.counts.sum()) for x in loads if x.dropped is not None]
                if dropped:
                    lost, pairs = (torch.stack(c).sum() for c in zip(*dropped, strict=True))
                    result["experts/dropped_share"] = (lost / pairs.clamp(min=1)).item()
        return result


class LoadMeter:
    """Adds up what routers did. Losses are weighed by tokens, so that sums stay exact."""

    def __init__(self, config: RoutedLlamaConfig) -> None:
        self.num_layers = config.num_hidden_layers
        self._sums: dict[tuple[int, Part], Tensor] = {}

    @torch.no_grad()
    def add(self, routing: Sequence[LayerRouting]) -> None:
        """Count one forward pass."""
        for layer, parts in enumerate(routing):
            for part, load in zip(PARTS, parts, strict=True):
                if load is not None:
                    scalars = torch.stack(
                        [
                            load.entropy,
                            load.tokens,
                            load.balance * load.tokens,
                            load.z * load.tokens,
                            *([] if load.dropped is None else [load.dropped]),
                        ]
                    )
                    vector = torch.cat([load.counts, load.probability, scalars]).float()
                    key = layer, part
                    self._sums[key] = self._sums[key] + vector if key in self._sums else vector

    def total(self, all_sum: Callable[[Tensor], Tensor]) -> StepLoads:
        """Loads of the step over all ranks; the meter is empty again."""
        sums, self._sums = self._sums, {}
        if not sums:
            return StepLoads({}, self.num_layers)
        flat = all_sum(torch.cat(list(sums.values())))
        routers = {}
        for key, vector in zip(sums, flat.split([len(v) for v in sums.values()]), strict=True):
            units = (len(vector) - 4) // 2
            counts, probability, scalars = vector.split([units, units, len(vector) - 2 * units])
            entropy, tokens, balance, z, *dropped = scalars
            mean = tokens.clamp(min=1)
            routers[key] = RoutingLoad(
                counts, probability, entropy, tokens, balance / mean, z / mean, *dropped
            )
        return StepLoads(routers, self.num_layers)


def plain(reference: list[LayerLoad] | None) -> list[list[list[float] | None]] | None:
    """Loads as JSON: float32 survives the way through Python's floats."""
    if reference is None:
        return None
    return [[None if f is None else f.tolist() for f in layer] for layer in reference]


def tensors(plain: list[list[list[float] | None]], device: torch.device) -> list[LayerLoad]:
    """The reverse of `plain`."""
    return [
        LayerLoad(*(None if f is None else torch.tensor(f, device=device) for f in layer))
        for layer in plain
    ]
