"""The model. Importing this registers RoutedLlama with transformers' Auto classes, and our kernels
as `experts_implementation="moe"` of its own mixtures.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe.model.config import RoutedLlamaConfig
from moe.model.foreign import run_experts
from moe.model.llama import RoutedCausalLMOutput, RoutedLlamaForCausalLM, RoutedLlamaModel
from moe.model.losses import LayerLoad, LayerRouting, RoutingLoad
from moe.model.spec import AttentionSpec, MLPSpec

AutoConfig.register(RoutedLlamaConfig.model_type, RoutedLlamaConfig, exist_ok=True)
AutoModel.register(RoutedLlamaConfig, RoutedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(RoutedLlamaConfig, RoutedLlamaForCausalLM, exist_ok=True)

__all__ = [
    "AttentionSpec",
    "LayerLoad",
    "LayerRouting",
    "MLPSpec",
    "RoutedCausalLMOutput",
    "RoutedLlamaConfig",
    "RoutedLlamaForCausalLM",
    "RoutedLlamaModel",
    "RoutingLoad",
    "run_experts",
]
