"""What one rank of a run holds and sends, in a moment for models and worlds of any size.

The engine itself runs a step on imagined tensors, with a few layers of each kind: another layer of
a kind adds what the one before it added.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch

from moe import engines
from moe.config import RunConfig
from moe.engines.measure import Footprint, Share
from moe.model import RoutedLlamaConfig
from moe.model.spec import MoHAttention
from moe.train.loop import token_losses

ALIKE = 3  # layers of a kind, after which the next is like the last: FSDP2 gathers two ahead


def footprint(
    config: RunConfig, model_config: RoutedLlamaConfig, size: int, rank: int = 0
) -> Footprint:
    """Of one rank of `size`; rank 0 holds the most, since what cannot be cut evenly begins there.

    Raises what the engine raises over the configuration.
    """
    kinds = layer_kinds(model_config)
    few = {kind: min(len(layers), ALIKE) for kind, layers in kinds.items()}
    more = [kind for kind, count in few.items() if len(kinds[kind]) > count]
    effort = sum(few.values()) * (1 + len(more)) + len(more)
    # frozen layers differ from others, and what lies below the lowest that learns from all
    if config.train.trainable != ["*"] or effort >= model_config.num_hidden_layers:
        return _run(config, model_config, size, rank)

    def run(counts: dict[Any, int]) -> Footprint:
        layers = [i for kind, count in counts.items() for i in kinds[kind][:count]]
        return _run(config, of_layers(model_config, sorted(layers)), size, rank)

    base = run(few)
    parts = [(1, base)]
    for kind in more:
        missing = len(kinds[kind]) - few[kind]
        parts += [(missing, run({**few, kind: few[kind] + 1})), (-missing, base)]
    return combine(parts)


def layer_kinds(config: RoutedLlamaConfig) -> dict[Any, list[int]]:
    """Layers that are the same by the config, in order of their first."""
    found: dict[Any, list[int]] = {}
    assert config.layer_types is not None
    for layer in range(config.num_hidden_layers):
        attention = config.attention_spec(layer)
        if isinstance(attention, MoHAttention):  # which heads are shared costs nothing
            some = tuple(range(len(attention.shared_heads)))
            mean = round(attention.mean_heads)
            attention = dataclasses.replace(attention, shared_heads=some, mean_heads=mean)
        kind = attention, config.mlp_spec(layer), config.layer_types[layer]
        found.setdefault(kind, []).append(layer)
    return found


def of_layers(config: RoutedLlamaConfig, layers: list[int]) -> RoutedLlamaConfig:
    """The same model with these of its layers alone."""
    fields = config.to_dict()
    for name in ("attention", "mlp", "layer_types"):
        if isinstance(fields[name], list):
            fields[name] = [fields[name][i] for i in layers]
    return RoutedLlamaConfig.from_dict({**fields, "num_hidden_layers": len(layers)})


def combine(parts: Iterable[tuple[int, Footprint]]) -> Footprint:
    """Footprints added up, each so many times; dispatch buffers are the largest layer's."""
    parts = list(parts)

    def add(name: str) -> Any:
        found = [(times, getattr(part, name)) for times, part in parts]
        if isinstance(found[0][1], Share):
            return Share(*(sum(n * v for n, v in pair) for pair in (
                [(n, s.total) for n, s in found], [(n, s.experts) for n, s in found])))  # fmt: skip
        if isinstance(found[0][1], Counter):
            total: Counter[Any] = Counter()
            for times, calls in found:
                for call, count in calls.items():
                    total[call] += times * count
            return total
        return max(v for _, v in found) if name == "dispatch" else sum(n * v for n, v in found)

    return Footprint(**{field.name: add(field.name) for field in fields(Footprint)})


def _run(config: RunConfig, model_config: RoutedLlamaConfig, size: int, rank: int) -> Footprint:
    return engines.footprint(config, model_config, rank, size, micro_batch(config))


def micro_batch(
    config: RunConfig, given: torch.Tensor | None = None
) -> Callable[[Any], torch.Tensor]:
    """One micro-batch of the configuration through an engine, to its loss, as training has it.

    Tokens [B, S] matter where there are values to route by.
    """
    shape = config.train.micro_batch_size, config.data.sequence_length

    def forward(engine: Any) -> torch.Tensor:
        tokens = torch.zeros(shape, dtype=torch.int64) if given is None else given
        batch = {"labels": tokens, "loss_mask": torch.ones(shape)}
        boundaries, positions = config.data.document_boundaries, torch.arange(shape[1])
        if boundaries == "attention":
            positions %= -(-shape[1] // 2)  # two documents
        output = engine.forward(
            input_ids=tokens,
            position_ids=positions.expand(shape).contiguous(),
            attention_mask=torch.ones_like(tokens) if boundaries == "positions" else None,
            reference_load=None,
        )
        return token_losses(output.logits, batch).sum() + output.router_loss

    return forward
