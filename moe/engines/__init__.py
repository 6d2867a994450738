"""Engines, each behind the protocol of `base`."""

from transformers import PreTrainedModel

from moe.config import RunConfig
from moe.engines.base import Engine
from moe.engines.parameters import limit_experts
from moe.parallel.world import Ranks


def build(model: PreTrainedModel, config: RunConfig, ranks: Ranks) -> Engine:
    """The engine that the configuration names, around a model in float32 on the CPU."""
    limit_experts(model, config.parallel.capacity)
    if config.engine == "deepspeed":
        from moe.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, ranks)
    from moe.engines.native import NativeEngine

    return NativeEngine(model, config, ranks)
