"""The native engine: plain torch in one process, FSDP2 over several (gloo or NCCL)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from moe.config import Parallel, RunConfig
from moe.engines.base import Entry
from moe.engines.parameters import adamw, check_experts, freeze, parameter_groups
from moe.engines.recompute import recompute
from moe.model.experts import RoutedMLP
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
        recompute(model, config.train.activation_checkpointing)
        if config.train.compile:
            for layer in model.model.layers:
                layer.compile()
        self.dtype = DTYPES[config.train.dtype]
        check_experts(model, config.parallel.expert, ranks.size)
        if ranks.size > 1 or self.dtype != torch.float32:
            self._shard(config.parallel)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = adamw(parameter_groups(trained), config.optimizer)

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
