"""The native engine: plain torch in one process, FSDP2 over several (gloo or NCCL)."""

import math
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

import moe.kernels.ops  # noqa: F401  (registers moe::select_top_k and moe::route)
from moe.config import Parallel, RunConfig
from moe.engines.base import Entry, check_patterns
from moe.errors import UserError, raise_all
from moe.model.experts import Experts, RoutedMLP
from moe.parallel.exchange import AllToAll
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
        check_experts(model, config.parallel.expert, ranks.size)
        if ranks.size > 1 or self.dtype != torch.float32:
            self._shard(config.parallel)
        self.optimizer = self._adamw(config)

    def _shard(self, parallel: Parallel) -> None:
        mesh = self.ranks.mesh(parallel.replicate)
        # inputs are left alone: loads and positions are float32 on purpose
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype,
            reduce_dtype=torch.promote_types(self.dtype, torch.float32),
            cast_forward_inputs=False,
        )
        place: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        if parallel.expert > 1:
            self._spread_experts(self.ranks.expert_mesh(parallel.expert), policy)
        for layer in self.model.model.layers:
            fully_shard(layer, **place)
        fully_shard(self.model, **place)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # the loss is divided by global tokens already; gloo can only sum
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _spread_experts(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        """Each rank of the mesh's expert axis holds some experts of every layer whole, cut along
        their rows among the ranks that hold the same.
        """
        for module in self.model.modules():
            if not isinstance(module, RoutedMLP):
                continue
            experts = module.experts
            group = mesh.get_group("expert")
            module.dispatcher = AllToAll(group, len(experts.gate_up_proj))
            for name, parameter in list(experts.named_parameters(recurse=False)):
                mine = parameter.detach().chunk(mesh.size(1))[mesh.get_local_rank("expert")]
                spread = DTensor.from_local(
                    mine.clone(), mesh["expert"], [Shard(0)], run_check=False
                )
                wanted = nn.Parameter(spread, requires_grad=parameter.requires_grad)
                wanted.expert = True  # type: ignore[attr-defined]
                setattr(experts, name, wanted)
            fully_shard(
                experts, mesh=mesh["shard"], mp_policy=policy, shard_placement_fn=lambda _: Shard(1)
            )

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


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Train the parameters whose name matches a pattern, freeze the others.

    Raises UserError for a pattern that matches nothing: a misspelt one would freeze in silence.
    """
    check_patterns([name for name, _ in model.named_parameters()], patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


# What a recomputed layer must find again: a router's near-tie must not fall the other way.
CHOICES = (torch.ops.moe.select_top_k.default, torch.ops.moe.route.default)


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


def _keep_choices() -> tuple[_Keep, _Give]:
    """The two contexts of a checkpointed layer."""
    kept: list[Any] = []
    return _Keep(kept), _Give(kept)
