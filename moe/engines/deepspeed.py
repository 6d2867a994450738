"""The DeepSpeed engine: ZeRO stages 0 to 3, experts spread over ranks with stages 0 to 2.

DeepSpeed holds parameters, gradients and moments; norm, clipping, learning rate and checkpoints are
ours, so that they are what they are in every other engine. What is read off its optimisers is
private to DeepSpeed, whose version is therefore pinned.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from transformers import PreTrainedModel

from moe.config import RunConfig
from moe.engines.base import Entry, Kind
from moe.engines.deepspeed_json import check, generate
from moe.engines.parameters import adamw, kept_buffers, parameter_groups, prepare
from moe.errors import UserError
from moe.model.attention import RoutedAttention
from moe.model.experts import Experts, RoutedMLP
from moe.model.union_attention import UnionAttention
from moe.parallel.exchange import AllToAll
from moe.parallel.norm import global_norm, scale_gradients
from moe.parallel.world import Ranks

# it would warn that it found no GPU on a machine that has none
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
try:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.utils import groups
except ImportError as error:
    raise UserError(
        f"engine=deepspeed: {error}. Install it with: pip install 'moe-stack[deepspeed]'."
    ) from error


class SpreadExperts(Experts, MoE):
    """The experts of one rank. DeepSpeed treats expert parameters apart only inside its own class,
    of which nothing else is used.
    """

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Its groups are there already."""


class DeepSpeedEngine:
    """Parameters and moments in float32, computation in the run's dtype."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, ranks: Ranks) -> None:
        self.ranks, self.stage = ranks, config.deepspeed.stage
        self.offloads = config.deepspeed.offload != "none"
        check(model, config, ranks.size)
        prepare(model, config.train)
        self.model: nn.Module = model
        self.mesh = ranks.expert_mesh(config.parallel.expert)
        self.world = ranks.mesh(1)["shard"]
        if config.parallel.expert > 1:
            self._spread_experts()
        # DeepSpeed rounds or divides them, and has no float32 of what it does not train
        self.frozen = {
            n: p.detach().clone()
            for n, p in model.named_parameters()
            if not p.requires_grad and (self.stage == 3 or config.train.dtype != "float32")
        }
        self.optimizer = self._optimizer(config)
        settings = generate(config, ranks.size, ranks.device.type)
        self.engine = self._initialize(settings, config.deepspeed.overlay is not None)
        self.has_moments = False

    def _spread_experts(self) -> None:
        """Each rank keeps its experts of every layer; dispatchers bring tokens to them."""
        expert, group = self.mesh.size(1), self.mesh.get_group("expert")
        for module in self.model.modules():
            if isinstance(module, RoutedMLP):
                module.dispatcher = AllToAll(group, len(module.experts.gate_up_proj))
                for name, parameter in list(module.experts.named_parameters(recurse=False)):
                    mine = parameter.detach().chunk(expert)[self.mesh.get_local_rank("expert")]
                    kept = nn.Parameter(mine.clone(), requires_grad=parameter.requires_grad)
                    setattr(module.experts, name, kept)
                _describe(module.experts, expert)
        trained = [p for p in self.model.parameters() if is_expert(p) and p.requires_grad]
        for module in self.model.modules():
            # where all are frozen DeepSpeed has nothing to see to, and says that it misses it
            if isinstance(module, RoutedMLP) and trained:
                module.experts.__class__ = SpreadExperts

    def _optimizer(self, config: RunConfig) -> torch.optim.AdamW:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        apart = parameter_groups(named)
        if config.parallel.expert > 1:
            apart = split_params_into_different_moe_groups_for_optimizer(apart)
        return adamw([g for g in apart if g["params"]], config.optimizer)

    def _initialize(self, settings: dict[str, Any], overlaid: bool) -> Any:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # an operation for inference, which it would compile at every first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for module in self.model.modules():
            if self.stage == 3 and isinstance(module, RoutedAttention):
                # it may read the weights of modules inside it, without calling them
                more = module.k_proj, module.v_proj, module.o_proj
                for inner in (module.q_proj, *more * isinstance(module, UnionAttention)):
                    for parameter in inner.parameters():
                        deepspeed.zero.register_external_parameter(module, parameter)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        if self.mesh.size(1) > 1:
            groups._create_expert_and_data_parallel(self.mesh.size(1))
        given = {"model": self.model, "optimizer": self.optimizer, "config": settings}
        try:
            return deepspeed.initialize(**given, dist_init_required=False)[0]
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            if not overlaid:
                raise
            said = " ".join(str(error).split())
            if isinstance(error, ValidationError):
                said = "; ".join(
                    f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
                )
            raise UserError(
                f"DeepSpeed refuses its settings: {said}. Correct deepspeed.overlay."
            ) from error

    def forward(self, **inputs: Any) -> Any:
        return self.engine(use_cache=False, **inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over ranks, and our loss is to be summed
        self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        """What this rank holds of the gradient, said to be where it lies."""
        zero: Any = self.engine.optimizer
        if self.stage == 0:
            return [
                self._spread(p.grad, [Replicate(), Shard(0)]) if is_expert(p) else p.grad
                for p in self.model.parameters()
                if p.grad is not None
            ]
        if isinstance(zero, BF16_Optimizer):
            held = list(zero.fp32_groups_gradient_flat_partition)
        elif self.offloads:
            held = [p.grad for p in self._partitions() if p.grad is not None]
        else:
            held = [g for group in zero.averaged_gradients.values() for g in group or ()]
        # every value is in the partition of one rank
        return [
            DTensor.from_local(g.view(-1), self.world, [Shard(0)], run_check=False) for g in held
        ]

    def _partitions(self) -> list[nn.Parameter]:
        """What the optimiser updates: flat pieces of the float32 weights."""
        zero: Any = self.engine.optimizer
        if self.stage == 0:
            return [p for p in self.model.parameters() if p.requires_grad]
        if isinstance(zero, BF16_Optimizer):
            return list(zero.fp32_groups_flat_partition)
        if self.stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        return list(zero.single_partition_of_fp32_groups)

    def whole_gradient(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of a parameter, put together; for looking at, since it is slow."""
        if not parameter.requires_grad:
            return None
        whole = deepspeed.utils.safe_get_full_grad(parameter)
        return self._spread(whole, [Replicate(), Shard(0)]) if is_expert(parameter) else whole

    def grad_norm(self) -> Tensor:
        return global_norm(self._gradients())

    def step(self, lr: float, scale: Tensor) -> None:
        self.prepare_moments()
        scale_gradients(self._gradients(), scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def skip(self) -> None:
        """DeepSpeed's own step would update with what is not finite (stage 0), or not at all what
        is. Its accumulators are emptied as that step leaves them.
        """
        zero: Any = self.engine.optimizer
        if self.stage == 0:
            self.engine.zero_grad()
            return
        zero.zero_grad()
        if isinstance(zero, BF16_Optimizer):
            return
        if self.stage == 3:
            zero._pre_step()
            zero.averaged_gradients = {}
            zero.grad_partitions_flat_buffer.zero_()
        else:
            zero.micro_step_id = -1
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if self.offloads:
            if self.stage < 3:
                zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
            for part in self._partitions():
                if part.grad is not None:
                    part.grad.zero_()

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def state(self) -> Iterator[Any]:
        moments: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
        for name, parameter in self.model.named_parameters():
            yield Held(self, name, "parameter", parameter)
        for name, buffer in kept_buffers(self.model):
            yield Entry(name, "buffer", buffer)
        for name, parameter in self.model.named_parameters():
            if self.has_moments and parameter.requires_grad:
                for kind in moments:
                    yield Held(self, name, kind, parameter)

    def prepare_moments(self) -> None:
        if self.has_moments:
            return
        for part in self._partitions():
            self.optimizer.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                "exp_avg": torch.zeros_like(part, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(part, requires_grad=False),
            }
        self.has_moments = True
        if self.stage in (1, 2):
            # here, where all are there: DeepSpeed does it after the first group's step
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def updates(self) -> int:
        return max((int(s["step"]) for s in self.optimizer.state.values()), default=0)

    @updates.setter
    def updates(self, value: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(value)

    def gather(self, name: str, kind: Kind, parameter: nn.Parameter) -> Tensor:
        """A tensor of the state, whole: of an expert parameter, this rank's experts."""
        if not parameter.requires_grad:
            return self.frozen.get(name, parameter.detach())
        if self.stage == 0:
            held = parameter if kind == "parameter" else self.optimizer.state[parameter][kind]
            return held.detach()
        if kind == "parameter":
            return deepspeed.utils.safe_get_full_fp32_param(parameter)
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)

    @torch.no_grad()
    def set(self, name: str, kind: Kind, parameter: nn.Parameter, value: Tensor) -> None:
        """The reverse of `gather`."""
        if kind != "parameter":
            if self.stage == 0:
                self.optimizer.state[parameter][kind].copy_(value)
            else:
                deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        if name in self.frozen:
            self.frozen[name].copy_(value)
        elif self.stage > 0 and parameter.requires_grad:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        # that is what the optimiser works on; the model computes with another
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)

    def _spread(self, local: Tensor, placements: list[Placement]) -> DTensor:
        return DTensor.from_local(local, self.mesh, placements, run_check=False)


class Held:
    """An entry of the state that DeepSpeed has in pieces: put together when it is asked for.

    As `tensor`, each rank has its share of rows, so that ranks share the reading and writing.
    """

    def __init__(
        self, engine: DeepSpeedEngine, name: str, kind: Kind, parameter: nn.Parameter
    ) -> None:
        self.engine, self.name, self.kind, self.parameter = engine, name, kind, parameter

    @property
    def tensor(self) -> DTensor:
        whole = self.engine.gather(self.name, self.kind, self.parameter)
        if not is_expert(self.parameter):
            pieces, rank = whole.chunk(self.engine.ranks.size), self.engine.ranks.rank
            mine = pieces[rank] if rank < len(pieces) else whole[:0]  # there may be too few rows
            return DTensor.from_local(
                mine.clone(),
                self.engine.world,
                [Shard(0)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        mesh = self.engine.mesh
        ranks, rank = mesh.size(0), mesh.get_local_rank("shard")
        mine = whole.chunk(ranks, dim=1)[rank].contiguous()
        return self.engine._spread(mine, [Shard(1), Shard(0)])

    def put(self, tensor: Tensor) -> None:
        """Bring the value to all pieces."""
        assert isinstance(tensor, DTensor)
        if is_expert(self.parameter):
            whole = tensor.redistribute(placements=[Replicate(), Shard(0)]).to_local()
        else:
            whole = tensor.full_tensor()
        self.engine.set(self.name, self.kind, self.parameter, whole)


def _describe(experts: Any, ranks: int) -> None:
    """What DeepSpeed reads of experts that are spread over so many ranks."""
    experts.ep_size, experts.num_local_experts = ranks, len(experts.gate_up_proj)
    experts.expert_group_name = f"ep_size_{ranks}"
    for parameter in experts.parameters():
        parameter.allreduce = False
        parameter.group_name = experts.expert_group_name


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether ranks hold different values of it."""
    return not getattr(parameter, "allreduce", True)
