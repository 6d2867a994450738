"""The routed MLP: a router, stacked SwiGLU experts, and the seam by which tokens reach them."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaMLP

from moe.kernels import ops
from moe.model.cache import kept
from moe.model.config import RoutedLlamaConfig
from moe.model.losses import RoutingLoad
from moe.model.router import ExpertChoice, ExpertRouter
from moe.model.spec import RoutedMLPSpec, UoEMLP
from moe.model.union import UnionRouter


class Experts(nn.Module):
    """E SwiGLU experts, stacked: gate_up_proj [E, 2I, H] (gate rows first), down_proj [E, H, I]."""

    recompute = False  # keep x alone for the backward pass: an engine says so

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts  # of the layer, whichever part of them lives here
        inner = intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner))
        for parameter in self.parameters():
            parameter.expert = True  # type: ignore[attr-defined]  # engines shard these apart

    def forward(
        self,
        x_TH: Tensor,
        indices_TK: Tensor | None,
        weights_TK: Tensor,
        plan: ops.Plan | None = None,
    ) -> Tensor:
        """What the experts make of each token [T, H]; without indices the weights are of all."""
        # an engine may have spread experts over ranks: these are the ones that live here
        w1_EDH, w2_EHI = (
            p.to_local() if hasattr(type(p), "to_local") else p  # type: ignore[attr-defined]
            for p in (self.gate_up_proj, self.down_proj)
        )
        if indices_TK is None:
            return ops.masked_mlp(x_TH, w1_EDH, w2_EHI, weights_TK)
        given = x_TH, w1_EDH, w2_EHI, indices_TK, weights_TK, plan
        return ops.routed_mlp(*given, recompute_h=self.recompute)


class Dispatcher(Protocol):
    """How tokens reach the experts. The model never sees ranks; an engine injects this.

    What `meanwhile` gives is added to the experts' output; where rows travel, it is computed while
    they do.
    """

    def __call__(
        self,
        experts: Experts,
        x_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        plan: ops.Plan | None = None,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor: ...


def local(
    experts: Experts,
    x_TH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    plan: ops.Plan | None = None,
    meanwhile: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The dispatcher of a process that holds every expert."""
    y_TH = experts(x_TH, indices_TK, weights_TK, plan)
    return y_TH if meanwhile is None else y_TH + meanwhile()


def limit(
    choice: ExpertChoice, num_experts: int, capacity: float, valid_T: Tensor | None
) -> ExpertChoice:
    """The choice, with nothing in place of an expert that has no room: index E, weight 0.

    Each of E experts has room for ceil(capacity · T · K / E) of the T tokens, whatever part of them
    is padding: that is a number known without asking the device. Those of the smallest weight go,
    of equal ones the later, padding (not counted as dropped) before all others.
    """
    tokens, k = choice.indices_TK.shape
    room = math.ceil(capacity * tokens * k / num_experts)
    given = choice.indices_TK, choice.weights_TK.detach()
    indices_TK = ops.limit_load(*given, num_experts, room, valid_T)
    lost_TK = indices_TK != choice.indices_TK
    counted_TK = lost_TK if valid_T is None else lost_TK & valid_T[:, None]
    load = choice.load._replace(dropped=counted_TK.sum().to(choice.load.tokens))
    return ExpertChoice(indices_TK, choice.weights_TK.masked_fill(lost_TK, 0.0), load)


class RoutedMLP(nn.Module):
    """Mixture-of-experts MLP with an optional expert that every token visits.

    Dropless, but for training with a `capacity`, which an engine may set.

    A union of experts is the same with slices for experts and another router.
    """

    dispatcher: Dispatcher = staticmethod(local)
    capacity: float | None = None

    def __init__(self, config: RoutedLlamaConfig, spec: RoutedMLPSpec) -> None:
        super().__init__()
        assert spec.intermediate_size is not None
        self.router: ExpertRouter | UnionRouter
        if isinstance(spec, UoEMLP):
            self.router = UnionRouter(spec, config.hidden_size)
        else:
            self.router = ExpertRouter(spec, config.hidden_size)
        self.experts = Experts(spec.num_experts, config.hidden_size, spec.intermediate_size)
        self.shared_expert = None
        if spec.shared_intermediate_size:
            shared = copy.copy(config)
            shared.intermediate_size = spec.shared_intermediate_size
            self.shared_expert = LlamaMLP(shared)

    def forward(
        self,
        x_BSH: Tensor,
        valid_T: Tensor | None,
        reference_E: Tensor | None,
        memory: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, RoutingLoad]:
        """Output [B, S, H] and the router's load; `memory` is what decoding remembers per row."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        if isinstance(self.router, UnionRouter):
            y_TH, load = self._union(self.router, x_BSH, x_TH, valid_T, reference_E, memory)
        else:
            # a hook on the router may return three
            choice = ExpertChoice(*self.router(x_TH, valid_T, reference_E))
            y_TH, load = self._visit(x_TH, choice, valid_T)
        return y_TH.view_as(x_BSH), load

    def _visit(
        self, x_TH: Tensor, choice: ExpertChoice, valid_T: Tensor | None
    ) -> tuple[Tensor, RoutingLoad]:
        """What the chosen experts make of each token [T, H], the shared one's output added."""
        if self.capacity is not None and self.training:
            choice = limit(choice, self.experts.num_experts, self.capacity, valid_T)
        indices_TK, weights_TK, load, plan = choice
        shared = None
        if self.shared_expert is not None:
            shared = functools.partial(self.shared_expert, x_TH)
        given = x_TH, indices_TK, weights_TK, plan, shared
        return self.dispatcher(self.experts, *given), load

    def _union(
        self,
        router: UnionRouter,
        x_BSH: Tensor,
        x_TH: Tensor,
        valid_T: Tensor | None,
        reference_E: Tensor | None,
        memory: dict[str, Tensor] | None,
    ) -> tuple[Tensor, RoutingLoad]:
        """A union's output [T, H], each token visiting as many experts as chose it or it chose."""
        held = None if memory is None else memory.get("expert_set")
        choice = router(x_BSH, valid_T, reference_E, set_BE=held)
        if memory is not None and choice.set_BE is not None:
            memory["expert_set"] = choice.set_BE
        weights_TE = router.output_scale * choice.weights_TE
        if self.dispatcher is local and ops.masks_pay(
            x_TH, router.share, self.experts.down_proj.shape[-1]
        ):
            y_TH = self.experts(x_TH, None, weights_TE * choice.mask_TE)
            y_TH = y_TH if self.shared_expert is None else y_TH + self.shared_expert(x_TH)
            return y_TH, choice.load
        if choice.indices_TK is not None:
            weights_TK = weights_TE.gather(1, choice.indices_TK)
            fixed = ExpertChoice(choice.indices_TK, weights_TK, choice.load)
            return self._visit(x_TH, fixed, valid_T)
        # any number of experts a token: each pair becomes a token with one expert
        token_P, expert_P = choice.mask_TE.nonzero(as_tuple=True)
        weight_P1 = weights_TE[token_P, expert_P][:, None]
        y_PH = self.dispatcher(self.experts, x_TH[token_P], expert_P[:, None], weight_P1)
        y_TH = torch.zeros_like(x_TH, dtype=y_PH.dtype).index_add(0, token_P, y_PH)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        return y_TH, choice.load


def memory_of(mlp: RoutedMLP, cache: Cache | None, layer: int) -> dict[str, Tensor] | None:
    """Where the MLP of a layer keeps what it decided for a prompt; None where it needs nothing."""
    remembers = isinstance(mlp.router, UnionRouter) and mlp.router.mode == "sequence"
    return kept(cache, layer) if remembers and cache is not None else None
