"""Which parameters are trained, how, and among how many ranks experts can be divided."""

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe.config import Optimizer, Train
from moe.engines.base import check_patterns
from moe.engines.recompute import recompute
from moe.errors import UserError, raise_all
from moe.model.experts import RoutedMLP
from moe.model.spec import UoEMLP


def prepare(model: PreTrainedModel, train: Train) -> None:
    """What every engine does before it takes hold of a model: freeze, recompute, compile."""
    freeze(model, train.trainable)
    recompute(model, train.activation_checkpointing)
    if train.compile:
        compile_layers(model.model.layers)


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer for the very shapes that it sees, so that what a step computes does not
    depend on those before it: a run that goes on would else differ in the last bits.
    """
    # Layers share their code's cache. By default dynamo gives up, without a word, after 8 entries
    # of it, fewer than a model of some kinds of layers has: each comes with and without a mask,
    # with and without the loads of the step before, for training and validation.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 16 * len(layers))
    dynamo.accumulated_recompile_limit = max(
        dynamo.accumulated_recompile_limit, dynamo.recompile_limit
    )
    for layer in layers:
        layer.compile(dynamic=False)


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a model's state."""
    kept = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def parameter_groups(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameters whose weights decay, and norms and biases, whose do not; none of them empty."""
    # attention experts' norms, a row per head, are no matrices either
    decayed = {n for n, p in named if p.ndim >= 2 and "norm" not in n}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n in decayed], "name": "decayed"},
        {"params": [p for n, p in named if n not in decayed], "name": "kept", "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def adamw(groups: list[dict[str, Any]], options: Optimizer) -> torch.optim.AdamW:
    """The optimiser of every engine."""
    return torch.optim.AdamW(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def check_experts(model: nn.Module, expert: int, size: int) -> None:
    """Raise UserError where the experts cannot be divided among `expert` of `size` ranks."""
    routed = [m.experts.gate_up_proj for m in model.modules() if isinstance(m, RoutedMLP)]
    if expert == 1:
        return
    if not routed:
        raise UserError(f"parallel.expert={expert}, but the model has no routed MLP. Use 1.")
    experts, problems = math.gcd(*(len(w) for w in routed)), []
    if experts % expert:
        legal = [n for n in range(1, experts + 1) if experts % n == 0 and size % n == 0]
        problems.append(
            f"parallel.expert={expert} does not divide the experts of every layer "
            f"({', '.join(str(n) for n in sorted({len(w) for w in routed}))}). Use one of "
            f"{', '.join(map(str, legal))}."
        )
    rows = math.gcd(*(n for w in routed for n in (w.shape[1], w.shape[2])))
    if rows % (size // expert):
        problems.append(
            f"{size // expert} ranks that hold the same experts cannot cut their rows evenly: "
            f"sizes have {rows} as largest common divisor. Use a larger parallel.expert."
        )
    raise_all(problems)


def limit_experts(model: nn.Module, capacity: float | None) -> None:
    """Give every routed MLP this capacity. Raises UserError where there is none to take it."""
    if capacity is None:
        return
    routed = [m for m in model.modules() if isinstance(m, RoutedMLP)]
    if not routed:
        raise UserError(f"parallel.capacity={capacity:g}, but the model has no routed MLP.")
    specs = [m.router.spec for m in routed]
    modes = {s.mode for s in specs if isinstance(s, UoEMLP)} & {
        "threshold",
        "expert_choice",
        "budget",
    }
    if modes:
        raise UserError(
            f"parallel.capacity={capacity:g}: mlp.mode={', '.join(sorted(modes))} gives a token no "
            "fixed number of experts, so that there is no mean for a capacity to be of. Remove it."
        )
    for module in routed:
        module.capacity = capacity


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Train the parameters whose name matches a pattern, freeze the others.

    Raises UserError for a pattern that matches nothing: a misspelt one would freeze in silence.
    """
    check_patterns([name for name, _ in model.named_parameters()], patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
