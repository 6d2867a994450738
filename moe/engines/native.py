"""The native engine: plain torch in one process, FSDP2 over several (gloo or NCCL)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from moe.config import Parallel, RunConfig
from moe.engines import tensor
from moe.engines.base import Entry
from moe.engines.parameters import adamw, check_experts, kept_buffers, parameter_groups, prepare
from moe.errors import problem, raise_all
from moe.model.experts import RoutedMLP
from moe.parallel.exchange import AllToAll
from moe.parallel.norm import global_norm, scale_gradients
from moe.parallel.tensor import whole_on
from moe.parallel.world import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NativeEngine:
    """Parameters and moments in float32, computation in the run's dtype.

    In bfloat16 even one process shards (over itself): FSDP2 then casts parameters for the
    computation and accumulates gradients in float32, the same on one rank as on many.
    """

    def __init__(self, model: PreTrainedModel, config: RunConfig, ranks: Ranks) -> None:
        self.ranks, self.model = ranks, model
        prepare(model, config.train)
        self.dtype = DTYPES[config.train.dtype]
        self.mesh: DeviceMesh | None = None
        self.partial: list[nn.Parameter] = []  # whole, with a part of the gradient on each rank
        parallel = config.parallel
        raise_all(
            problem(check_experts, model, parallel.expert, ranks.size)
            + problem(tensor.check, model, parallel, ranks.size)
        )
        if ranks.size > 1 or self.dtype != torch.float32:
            self._shard(parallel)
        self.model.to(ranks.device)  # type: ignore[arg-type]
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = adamw(parameter_groups(trained), config.optimizer)

    def _shard(self, parallel: Parallel) -> None:
        self.mesh = mesh = self.ranks.mesh(parallel.replicate, parallel.tensor)
        # inputs are left alone: loads and positions are float32 on purpose
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype,
            reduce_dtype=torch.promote_types(self.dtype, torch.float32),
            cast_forward_inputs=False,
        )
        place: dict[str, Any] = {"mesh": mesh["replicate", "shard"], "mp_policy": policy}
        if parallel.expert > 1 or parallel.tensor > 1:
            self._spread_experts(parallel, policy)
        place["shard_placement_fn"] = partial(along, ranks=mesh.size(1))
        parts: list[str] = []
        if parallel.tensor > 1:
            parts = tensor.split(self.model, mesh["tensor"], parallel)
        for layer in self.model.model.layers:  # a device need not have room for all of it
            fully_shard(layer.to(self.ranks.device), **place)
        fully_shard(self.model.to(self.ranks.device), **place)  # type: ignore[arg-type]
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # the loss is divided by global tokens already; gloo can only sum
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        whole = dict(self.model.named_parameters())
        self.partial = [whole[name] for name in parts]

    def _spread_experts(self, parallel: Parallel, policy: MixedPrecisionPolicy) -> None:
        """Each rank of the expert axis holds some experts of every layer whole, cut along their
        rows among the ranks that hold the same.
        """
        mesh, device = self.ranks.expert_mesh(parallel.expert), self.ranks.device
        for module in self.model.modules():
            if not isinstance(module, RoutedMLP) or tensor.owns(module, parallel):
                continue
            experts = module.experts
            if parallel.expert == 1:  # tokens stay, and ranks of a tensor axis share them out
                place = partial(along, ranks=mesh.size(0))
                fully_shard(
                    experts.to(device),
                    mesh=mesh["shard"],
                    mp_policy=policy,
                    shard_placement_fn=place,
                )
                continue
            group = mesh.get_group("expert")
            module.dispatcher = AllToAll(group, len(experts.gate_up_proj))
            for name, parameter in list(experts.named_parameters(recurse=False)):
                mine = parameter.detach().chunk(mesh.size(1))[mesh.get_local_rank("expert")]
                spread = DTensor.from_local(
                    mine.clone().to(device), mesh["expert"], [Shard(0)], run_check=False
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
            # each micro-batch's gradient is cut up at once: whole ones would fill the memory
            self.model.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)
        loss.backward()
        if last and self.partial:
            assert self.mesh is not None
            tensor.add_parts(self.partial, self.mesh["tensor"])

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

    def skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def state(self) -> Iterator[Entry]:
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a forward pass alone leaves the root's in the run's dtype
        for name, parameter in self.model.named_parameters():
            yield Entry(name, "parameter", self._once(parameter.detach()))
        for name, buffer in kept_buffers(self.model):
            yield Entry(name, "buffer", buffer)
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            if moments:
                yield Entry(name, "exp_avg", self._once(moments["exp_avg"]))
                yield Entry(name, "exp_avg_sq", self._once(moments["exp_avg_sq"]))

    def _once(self, tensor: Tensor) -> Tensor:
        """The same tensor, where each rank of a tensor axis has it, as one that is there once."""
        if self.mesh is None or self.mesh.size(2) == 1 or not isinstance(tensor, DTensor):
            return tensor
        if tensor.device_mesh != self.mesh["replicate", "shard"]:
            return tensor
        return whole_on(self.mesh, tensor)

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


def along(parameter: nn.Parameter, ranks: int) -> Shard:
    """Along which dimension FSDP2 cuts a parameter among `ranks`: not what a tensor axis has cut
    already, and not so that ranks get whole experts where there are not enough for all.
    """
    if isinstance(parameter, DTensor):
        return Shard(1 if parameter.placements == (Shard(0),) else 0)
    few = parameter.ndim == 3 and len(parameter) % ranks
    return Shard(1 if few and parameter.shape[1] % ranks == 0 else 0)
