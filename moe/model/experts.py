"""The routed MLP: a router, stacked SwiGLU experts, and the seam by which tokens reach them."""

import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from moe.kernels import ops
from moe.model.config import MLPSpec, RoutedLlamaConfig
from moe.model.losses import RoutingLoad
from moe.model.router import ExpertRouter


class Experts(nn.Module):
    """E SwiGLU experts, stacked: gate_up_proj [E, 2I, H] (gate rows first), down_proj [E, H, I]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        inner = intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner))
        for parameter in self.parameters():
            parameter.expert = True  # type: ignore[attr-defined]  # engines shard these apart

    def forward(self, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return ops.routed_mlp(x_TH, self.gate_up_proj, self.down_proj, indices_TK, weights_TK)


class Dispatcher(Protocol):
    """How tokens reach the experts. The model never sees ranks; an engine injects this."""

    def __call__(
        self, experts: Experts, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor
    ) -> Tensor: ...


def local(experts: Experts, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The dispatcher of a process that holds every expert."""
    return experts(x_TH, indices_TK, weights_TK)


class RoutedMLP(nn.Module):
    """Mixture-of-experts MLP, dropless, with an optional expert that every token visits."""

    dispatcher: Dispatcher = staticmethod(local)

    def __init__(self, config: RoutedLlamaConfig, spec: MLPSpec) -> None:
        super().__init__()
        assert spec.intermediate_size is not None
        self.router = ExpertRouter(spec, config.hidden_size)
        self.experts = Experts(spec.num_experts, config.hidden_size, spec.intermediate_size)
        self.shared_expert = None
        if spec.shared_intermediate_size:
            shared = copy.copy(config)
            shared.intermediate_size = spec.shared_intermediate_size
            self.shared_expert = LlamaMLP(shared)

    def forward(
        self, x_BSH: Tensor, valid_T: Tensor | None, reference_E: Tensor | None
    ) -> tuple[Tensor, RoutingLoad]:
        """Output [B, S, H] and the router's load."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        indices_TK, weights_TK, load = self.router(x_TH, valid_T, reference_E)
        y_TH = self.dispatcher(self.experts, x_TH, indices_TK, weights_TK)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        return y_TH.view_as(x_BSH), load
