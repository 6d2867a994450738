"""The native engine: plain torch in one process, FSDP2 over several (gloo or NCCL)."""

import functools
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

import moe.kernels.ops  # noqa: F401  (registers moe::select_top_k and moe::route)
from moe.config import RunConfig
from moe.engines.base import Entry, check_patterns
from moe.model.experts import Experts
from moe.parallel.norm import global_norm, scale_gradients
from moe.parallel.world import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NativeEngine:
    """Parameters and moments in float32, computation in the run's dtype.

    In bfloat16 even one process shards (over itself): FSDP2 then casts parameters for the
    computation and accumulates gradients in float32, the same on one rank as on many.
    """

    def __init__(self, model: PreTrainedModel, config: RunConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.model = model.to(ranks.device)  # type: ignore[arg-type]
        freeze(model, config.train.trainable)
        if config.train.activation_checkpointing == "full":
            kwargs = {"use_reentrant": False, "context_fn": _keep_choices}
            with warnings.catch_warnings():  # transformers 5.24 renames it, 5.17 knows no other
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(kwargs)
        for module in model.modules():
            if isinstance(module, Experts):
                module.recompute = config.train.activation_checkpointing == "experts"
        if config.train.compile:
            for layer in model.model.layers:
                layer.compile()
        self.dtype = DTYPES[config.train.dtype]
        if ranks.size > 1 or self.dtype != torch.float32:
            self._shard(config.parallel.replicate)
        self.optimizer = self._adamw(config)

    def _shard(self, replicate: int) -> None:
        mesh = self.ranks.mesh(replicate)
        # inputs are left alone: loads and positions are float32 on purpose
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        place: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        for layer in self.model.model.layers:
            fully_shard(layer, **place)
        fully_shard(self.model, **place)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # the loss is divided by global tokens already; gloo can only sum
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _adamw(self, config: RunConfig) -> torch.optim.AdamW:
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        # norms are not decayed, attention experts' norms (a row per head) among them
        decayed = {n for n, p in trained if p.ndim >= 2 and "norm" not in n}
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in trained if n in decayed]},
            {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
        ]
        options = config.optimizer
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )

    def forward(self, **inputs: Any) -> Any:
        return self.model(use_cache=False, **inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        loss.backward()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def grad_norm(self) -> Tensor:
        return global_norm(self._gradients())

    def step(self, lr: float, scale: Tensor) -> None:
        scale_gradients(self._gradients(), scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def state(self) -> Iterator[Entry]:
        for name, parameter in self.model.named_parameters():
            yield Entry(name, "parameter", parameter.detach())
        for name, buffer in self._buffers():
            yield Entry(name, "buffer", buffer)
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            if moments:
                yield Entry(name, "exp_avg", moments["exp_avg"])
                yield Entry(name, "exp_avg_sq", moments["exp_avg_sq"])

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        kept = self.model.state_dict()
        for name, buffer in self.model.named_buffers():
            if name in kept:
                yield name, buffer

    def prepare_moments(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    @property
    def updates(self) -> int:
        steps = [int(state["step"]) for state in self.optimizer.state.values()]
        return max(steps, default=0)

    @updates.setter
    def updates(self, value: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(value)


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Train the parameters whose name matches a pattern, freeze the others.

    Raises UserError for a pattern that matches nothing: a misspelt one would freeze in silence.
    """
    check_patterns([name for name, _ in model.named_parameters()], patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Recompute everything but the routers' choices: a near-tie must not fall the other way."""
    if operation in (torch.ops.moe.select_top_k.default, torch.ops.moe.route.default):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_keep_choices = functools.partial(create_selective_checkpoint_contexts, _policy)
