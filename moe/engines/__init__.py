"""Engines, each behind the protocol of `base`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from moe.config import RunConfig
from moe.engines.base import Engine
from moe.engines.parameters import limit_experts
from moe.parallel.world import Ranks

if TYPE_CHECKING:
    from moe.engines.measure import Footprint
    from moe.model import RoutedLlamaConfig


def build(model: PreTrainedModel, config: RunConfig, ranks: Ranks) -> Engine:
    """The engine that the configuration names, around a model in float32 on the CPU."""
    limit_experts(model, config.parallel.capacity)
    if config.engine == "deepspeed":
        from moe.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, ranks)
    from moe.engines.native import NativeEngine

    return NativeEngine(model, config, ranks)


def footprint(
    config: RunConfig,
    model_config: "RoutedLlamaConfig",
    rank: int,
    size: int,
    forward: Callable[[Any], Tensor],
) -> "Footprint":
    """What one rank of `size` holds and sends with the engine that the configuration names.

    `forward` takes one micro-batch through an engine, to its loss. An engine that does not run on
    imagined tensors has a function of its own here.
    """
    from moe.engines import deepspeed_footprint, imagine

    one = {"native": imagine.footprint, "deepspeed": deepspeed_footprint.footprint}
    return one[config.engine](config, model_config, rank, size, forward)
