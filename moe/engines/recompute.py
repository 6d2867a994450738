"""Activation checkpointing that keeps what the routers chose."""

import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

import moe.kernels.ops  # noqa: F401  (registers moe::select_top_k and others)
from moe.model.experts import Experts

# What a recomputed layer must find again: a router's near-tie must not fall the other way.
CHOICES = tuple(
    getattr(torch.ops.moe, name).default
    for name in ("select_top_k", "select_above", "route", "limit_load")
)


class _Keep(TorchDispatchMode):
    """While a layer runs: keep the routers' choices."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compile what runs under it all the same: torch would fall back to eager in silence."""
        return True

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = operation(*args, **(kwargs or {}))
        if operation in CHOICES:
            self.kept.append(tree_map(torch.Tensor.detach, found))
        return found


class _Give(_Keep):
    """While it is recomputed: give them back in the same order. All else is computed, for what an
    FSDP does inside a layer is not the same the second time, which torch's own selective
    checkpointing takes for a mistake.
    """

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation in CHOICES:
            return self.kept.pop(0)
        return operation(*args, **(kwargs or {}))


def recompute(model: PreTrainedModel, what: str) -> None:
    """Have the backward pass compute again `what` train.activation_checkpointing names."""
    if what == "full":
        kwargs = {"use_reentrant": False, "context_fn": _keep_choices}
        with warnings.catch_warnings():  # transformers 5.24 renames it, 5.17 knows no other
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(kwargs)
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute = what == "experts"


def _keep_choices() -> tuple[_Keep, _Give]:
    """The two contexts of a checkpointed layer."""
    kept: list[Any] = []
    return _Keep(kept), _Give(kept)
