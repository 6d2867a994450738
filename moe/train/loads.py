"""Routing of one optimiser step, summed over micro-batches and ranks in one collective.

meter = LoadMeter(model.config)
meter.add(output.routing)             # per micro-batch
step = meter.total(ranks.sum)         # StepLoads; starts the next step
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Corrupt
from moe.model import LayerLoad, LayerRouting, RoutedLlamaConfig, RoutingLoad
from moe.model.spec import DenseMLP, MoHAttention
from moe.train.events import lines_until, rewritten

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")
NOUNS: dict[Part, str] = {"attention": "heads", "mlp": "experts"}


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

    def cpu(self) -> "StepLoads":
        """The same on the host, in one transfer."""
        if not self.routers:
            return self
        values = [[x for x in load if x is not None] for load in self.routers.values()]
        flat = [x.reshape(-1).float() for load in values for x in load]
        here = iter(torch.cat(flat).cpu().split([len(x) for x in flat]))
        routers = {
            key: RoutingLoad(*(next(here).view_as(x) for x in load))
            for key, load in zip(self.routers, values, strict=True)
        }
        return StepLoads(routers, self.num_layers)

    def layers(self, part: Part) -> dict[int, dict[str, Any]]:
        """Per routed layer: load of each unit in percent of their mean, worst load over mean, dead
        share, and two entropies over their maximum: of a token's probabilities (`entropy_share`: 0
        where the router is sure) and of the load (`load_entropy`: 1 where it is even).
        """
        found = {}
        for layer, load in self.of(part).items():
            counts = load.counts.cpu().double()
            share = counts / counts.sum().clamp(min=1)
            most = math.log(max(2, len(counts)))
            found[layer] = {
                "max_over_mean": round((share.max() * len(counts)).item(), 4),
                "dead_share": round((counts == 0).double().mean().item(), 4),
                "entropy_share": round((load.entropy / load.tokens.clamp(min=1)).item() / most, 4),
                "load_entropy": round(torch.special.entr(share).sum().item() / most, 4),
                "load": (100 * len(counts) * share).round().int().tolist(),
            }
        return found

    def summary(self) -> dict[str, float]:
        """Per part: worst load over mean, dead share, entropies over their maximum (see `layers`),
        how many a token chose, balance (or a budget's loss), z; the share of choices that were
        dropped, where that is possible.
        """
        result: dict[str, float] = {}
        for part, noun in NOUNS.items():
            loads = list(self.of(part).values())
            if not loads:
                continue
            dead = torch.stack([(x.counts == 0).float().mean() for x in loads]).mean()
            even = [math.log(max(2, len(x.counts))) for x in loads]
            sure = [x.entropy / x.tokens / e for x, e in zip(loads, even, strict=True)]
            shares = [x.counts / x.counts.sum().clamp(min=1) for x in loads]
            ratio = torch.stack([s.max() * len(s) for s in shares]).max()
            spread = [torch.special.entr(s).sum() / e for s, e in zip(shares, even, strict=True)]
            result[f"{noun}/max_over_mean"] = ratio.item()
            result[f"{noun}/dead_share"] = dead.item()
            result[f"{noun}/entropy_share"] = torch.stack(sure).mean().item()
            result[f"{noun}/load_entropy"] = torch.stack(spread).mean().item()
            chosen = [x.counts.sum() / x.tokens.clamp(min=1) for x in loads]
            result[f"{noun}/per_token"] = torch.stack(chosen).mean().item()
            result[f"{noun}/balance"] = torch.stack([x.balance for x in loads]).mean().item()
            if part == "mlp":
                result["experts/z"] = torch.stack([x.z for x in loads]).mean().item()
                dropped = [(x.dropped, x.counts.sum()) for x in loads if x.dropped is not None]
                if dropped:
                    lost, pairs = (torch.stack(c).sum() for c in zip(*dropped, strict=True))
                    result["experts/dropped_share"] = (lost / pairs.clamp(min=1)).item()
        return result


def units(config: RoutedLlamaConfig, layer: int) -> tuple[int | None, int | None]:
    """How many heads and experts of a layer compete; None where it is dense."""
    attention, mlp = config.attention_spec(layer), config.mlp_spec(layer)
    if isinstance(attention, MoHAttention):
        groups = attention.granularity == "kv_group"
        whole = config.num_key_value_heads if groups else config.num_attention_heads
        assert whole is not None
        heads: int | None = len(attention.routed_heads(whole))
    else:
        heads = getattr(attention, "num_experts", None)
    return heads, getattr(mlp, "num_experts", None)


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


class LoadLog:
    """`loads.jsonl` of a run folder: what every router did, at so many steps that the file stays
    small, whatever the model and however long the run. The last step is always one of them.
    """

    BYTES = 16e6  # about what the file may take

    def __init__(self, out: Path, first: int, steps: int) -> None:
        self.steps, self.last = steps, 0
        path = out / "loads.jsonl"
        lines = lines_until(path, first)
        if lines:
            self.last = json.loads(lines[-1])["step"]
        self._file = rewritten(path, lines)

    def due(self, step: int, loads: StepLoads) -> bool:
        """Whether a step is to be one of them: a matter of sizes and steps alone, so that a run
        that was interrupted takes the same ones.
        """
        size = sum(4 * len(load.counts) + 110 for load in loads.routers.values())
        every = max(1, math.ceil(self.steps * size / self.BYTES))
        return bool(loads.routers) and (step == self.steps or step // every > self.last // every)

    def write(self, step: int, layers: dict[str, dict[int, dict[str, Any]]]) -> None:
        """Append {"step", "heads": {layer: …}, "experts": {layer: …}}, see `StepLoads.layers`."""
        self._file.write(json.dumps({"step": step, **layers}, separators=(",", ":")) + "\n")
        self._file.flush()
        self.last = step

    def close(self) -> None:
        self._file.close()


def plain(reference: list[LayerLoad] | None) -> list[list[list[float] | None]] | None:
    """Loads as JSON: float32 survives the way through Python's floats."""
    if reference is None:
        return None
    return [[None if f is None else f.tolist() for f in layer] for layer in reference]


def tensors(
    plain: list[list[list[float] | None]], config: RoutedLlamaConfig, device: torch.device
) -> list[LayerLoad]:
    """The reverse of `plain`. Raises Corrupt where they are no loads of such a model."""
    sizes = [[f and len(f) for f in layer] for layer in plain]
    expected = [units(config, layer) for layer in range(config.num_hidden_layers)]
    fits = len(sizes) == len(expected) and all(
        found is None or found == due
        for layer, both in zip(sizes, expected, strict=True)
        for found, due in zip(layer, both, strict=True)
    )
    if not fits:
        raise Corrupt(
            f"the checkpoint's loads are of {sizes} heads and experts, the model has {expected}."
        )
    return [
        LayerLoad(*(None if f is None else torch.tensor(f, device=device) for f in layer))
        for layer in plain
    ]
