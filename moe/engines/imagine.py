"""Engines that nobody has the machines for: any rank of any world, on tensors without memory.

The model, the engine and what they do are the real ones. Tensors are fake (shape, dtype and storage
size, no values), the process group sends nothing, and what a device would be asked about values
(how many tokens chose an expert) is answered as if routing were balanced.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moe.config import RunConfig
from moe.engines import Engine, build, tensor
from moe.engines.deepspeed_json import check as check_deepspeed
from moe.engines.measure import Footprint, measure
from moe.engines.parameters import check_experts
from moe.errors import UserError, problem
from moe.kernels import ops
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.model.experts import RoutedMLP
from moe.model.spec import routed_on
from moe.model.union import UnionRouter
from moe.model.union_attention import UnionAttention
from moe.parallel.exchange import AllToAll, buffer_bytes
from moe.parallel.tensor import SharedOut
from moe.parallel.traffic import unique_ranks
from moe.parallel.world import Ranks

aten = torch.ops.aten
CPU = torch.device("cpu")


class ImaginedRanks(Ranks):
    """A rank of a world that is not there. Meshes hold ranks as values, so they are real."""

    __slots__ = ()

    def mesh(self, *sizes: int) -> DeviceMesh:
        with _disable_current_modes():
            return Ranks.mesh(self, *sizes)

    def expert_mesh(self, *sizes: int) -> DeviceMesh:
        with _disable_current_modes():
            return Ranks.expert_mesh(self, *sizes)


class Expected(TorchDispatchMode):
    """Answers what depends on values: of a mask's entries a `share` is set, in whatever place."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.longest = 1.0, 1

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and all(type(t) in (Tensor, nn.Parameter) for t in tensors):
            with _disable_current_modes():  # a mesh looks into its ranks
                return operation(*args, **kwargs)
        if operation is aten.nonzero.default:
            (mask,) = args
            return mask.new_empty(round(mask.numel() * self.share), mask.ndim, dtype=torch.int64)
        if operation is aten.bincount.default:
            return args[0].new_empty(kwargs.get("minlength", args[-1]))
        if operation is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else self.longest
        return operation(*args, **kwargs)


class Balanced(AllToAll):
    """The dispatcher with as many rows to and from every rank as uniform choices give on average:
    tokens × `unique_ranks`, an equal part for each rank.
    """

    def pack(self, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> ops.Packed:
        given = (t.contiguous() for t in (x_TH, indices_TK, weights_TK))
        return ops.Packed(*torch.ops.moe.pack(*given, self.experts, self.size))

    def counts(self, rows_2W: Tensor, packed: ops.Packed) -> tuple[list[int], list[int]]:
        tokens, k = packed.place_TK.shape
        rows = round(tokens * unique_ranks(self.experts, k, self.size))
        per_rank = [rows // self.size + (r < rows % self.size) for r in range(self.size)]
        self.buffers = buffer_bytes(packed, self.experts // self.size, rows, rows)
        return per_rank, per_rank


def footprint(
    config: RunConfig,
    model_config: RoutedLlamaConfig,
    rank: int,
    size: int,
    forward: Callable[[Engine], Tensor],
) -> Footprint:
    """What one rank of `size` holds and sends; `forward` takes one micro-batch to its loss."""
    batch = config.train.micro_batch_size * size // config.parallel.tensor
    with imagine(config, model_config, rank, size) as engine:
        more = config.train.global_batch_size > batch
        return measure(engine, lambda: forward(engine), accumulates=more)


def refusals(config: RunConfig, model: nn.Module, size: int) -> list[str]:
    """Why `size` ranks cannot run this configuration of a model, or of its blueprint."""
    if config.engine == "deepspeed":
        return [*problem(config.check_world, size), *problem(check_deepspeed, model, config, size)]
    return [
        *problem(config.check_world, size),
        *problem(check_experts, model, config.parallel.expert, size),
        *(problem(tensor.check, model, config.parallel, size) if fits(config, size) else []),
    ]


def fits(config: RunConfig, size: int) -> bool:
    """Whether the ranks are as many as the mesh takes."""
    return not problem(config.check_world, size)


def blueprint(model_config: RoutedLlamaConfig) -> nn.Module:
    """A model of fake parameters."""
    with FakeTensorMode():
        return RoutedLlamaForCausalLM(model_config)


@contextlib.contextmanager
def imagine(
    config: RunConfig, model_config: RoutedLlamaConfig, rank: int, size: int
) -> Iterator[Engine]:
    """The engine of one rank of `size`, built in a moment whatever their size.

    Unions that are annealed have all their experts on, as in the first step. Layers are not
    compiled. Raises what the engine raises over the configuration.
    """
    if ops.forced_backend() == "naive":
        raise UserError("MOE_KERNELS=naive looks at values, and here are none. Use cpu or triton.")
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        plain = config.train.model_copy(update={"compile": False})
        config = config.model_copy(update={"train": plain})
        expected = Expected()
        with FakeTensorMode(), expected:
            model: Any = RoutedLlamaForCausalLM(model_config)
            for module in model.modules():  # fake parameters cannot be moved, and need not be
                module.to = functools.partial(_stay, module)
            model.model._masks = _masks(config, model_config)
            for router in model.modules():
                if config.train.anneal_steps and isinstance(router, UnionRouter):
                    router.use(router.spec.num_experts)
            engine = build(model, config, ImaginedRanks(rank, size, CPU))
            _answer(model, expected, config.data.sequence_length)
            engine.train(True)
            yield engine
    finally:
        distributed.destroy_process_group()


def _stay(module: nn.Module, device: torch.device) -> nn.Module:
    return module


def _masks(config: RunConfig, model_config: RoutedLlamaConfig) -> Callable[..., dict[str, Any]]:
    """What transformers makes of packed documents and sliding windows: it always makes a mask of
    fake tensors, since it cannot see that none is needed.
    """
    window, length = model_config.sliding_window, config.data.sequence_length
    packed = config.data.document_boundaries == "attention"

    def build_masks(inputs_embeds: Tensor, *rest: Any) -> dict[str, Any]:
        batch = len(inputs_embeds)
        found: dict[str, Any] = {}
        for kind in dict.fromkeys(model_config.layer_types or ()):
            slides = kind == "sliding_attention" and window is not None and window < length
            shape = (batch, 1, length, length)
            found[kind] = None
            if packed or slides:
                found[kind] = inputs_embeds.new_empty(shape, dtype=torch.bool)
        return found

    return build_masks


def _answer(model: nn.Module, expected: Expected, length: int) -> None:
    """Tell `expected` about each layer before it runs, and put balanced dispatchers in place."""

    def before(share: float) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            expected.share, expected.longest = share, math.ceil(share * length)

        return hook

    for module in model.modules():
        if isinstance(module, UnionAttention):
            share = module.router.top_k / module.spec.num_experts
            share += (1 - share) * min(module.spec.sink_tokens, length) / length
            module.register_forward_pre_hook(before(share))
        elif isinstance(module, RoutedMLP):
            if isinstance(module.router, UnionRouter):
                spec = module.router.spec
                share = (module.router.top_k or routed_on(spec)) / spec.num_experts
                module.register_forward_pre_hook(before(share))
            if isinstance(module.dispatcher, AllToAll):
                module.dispatcher = _balanced(module.dispatcher)
            elif isinstance(module.dispatcher, SharedOut):
                module.dispatcher.inner = _balanced(module.dispatcher.inner)


def _balanced(dispatcher: Any) -> Any:
    if isinstance(dispatcher, AllToAll):
        return Balanced(dispatcher.group, dispatcher.experts)
    return dispatcher
