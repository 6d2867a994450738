"""The tensor axis: ranks that see the same tokens and hold a part of each matrix.

A value on this axis is either whole, the same on every rank and with the same, complete gradient,
or split, a part along one of its dimensions. `TensorAxis` has the ways between the two; layers of
this file hold matrices of which a rank has the rows (outputs) or the columns (inputs) of its part.
Uneven parts are `torch.chunk`'s: all equal but the last.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

# torch 2.13 has renamed it
_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


class TensorAxis:
    """One rank's place on a mesh of one dimension, and what goes over it."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.parts, self.rank = mesh.size(), mesh.get_local_rank()
        self.device = mesh.device_type

    def part(self, total: int) -> tuple[int, int]:
        """Where this rank's part of `total` begins, and how long it is."""
        size = -(-total // self.parts)
        start = min(self.rank * size, total)
        return start, min(size, total - start)

    def cut(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part, a view."""
        return whole.narrow(dim, *self.part(whole.shape[dim]))

    def enter(self, x: Tensor) -> Tensor:
        """A whole value that each rank now does something else with: its gradients are summed."""
        return _Enter.apply(x, self)  # type: ignore[no-any-return]

    def leave(self, y: Tensor, *used: Tensor) -> Tensor:
        """The sum over ranks of what each made of its part: a whole value again.

        Those `used` get a gradient, zero, even if nothing of this rank's reads them: other ranks
        wait for this one where gradients are summed.
        """
        return _Leave.apply(y, self, *used)  # type: ignore[no-any-return]

    def take(self, whole: Tensor, dim: int = -1) -> Tensor:
        """This rank's part along `dim`; the gradient is whole."""
        return _Take.apply(whole, dim, self)  # type: ignore[no-any-return]

    def gather(self, part: Tensor, dim: int = -1, total: int | None = None) -> Tensor:
        """The whole of `total` (by default even parts) along `dim`; the gradient is split."""
        if total is None:
            total = part.shape[dim] * self.parts
        return _Gather.apply(part, dim, total, self)  # type: ignore[no-any-return]

    def collect(self, part: Tensor, dim: int, total: int) -> Tensor:
        """What `gather` does, without a gradient."""
        first = part.movedim(dim, 0)
        size = -(-total // self.parts)
        padded = first.new_zeros(size, *first.shape[1:])
        padded[: len(first)] = first
        every = padded.new_empty(size * self.parts, *first.shape[1:])
        _all_gather(every, padded, group=self.group)
        return every[:total].movedim(0, dim).contiguous()  # only the last parts are padded

    def split(self, parameter: Tensor, dim: int) -> nn.Parameter:
        """The parameter as one of which each rank holds its part along `dim`."""
        whole = parameter.detach()
        spread = DTensor.from_local(
            self.cut(whole, dim).clone(memory_format=torch.contiguous_format).to(self.device),
            self.mesh,
            [Shard(dim)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return nn.Parameter(spread, requires_grad=parameter.requires_grad)

    def held(self, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
        """This rank's weight and bias of a `Rows` or `Columns`; a sum's bias is whole."""
        weight, bias = linear.weight.to_local(), linear.bias  # type: ignore[operator,union-attr]
        if bias is not None and isinstance(linear, Rows):
            bias = self.cut(bias, 0)  # type: ignore[arg-type]
        return weight, bias  # type: ignore[return-value]


class Rows(nn.Module):
    """A linear layer of whose outputs each rank computes a part. Its input must have entered."""

    def __init__(self, linear: nn.Linear, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis
        self.weight, self.bias = axis.split(linear.weight, 0), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.axis.held(self))


class Columns(nn.Module):
    """A linear layer of whose inputs each rank has a part; its output is whole."""

    def __init__(self, linear: nn.Linear, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis
        self.weight, self.bias = axis.split(linear.weight, 1), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.axis.held(self)
        y = self.axis.leave(F.linear(x, weight))
        return y if bias is None else y + bias


class Vocabulary(nn.Module):
    """An embedding of which each rank holds a part of the tokens."""

    def __init__(self, embedding: nn.Embedding, axis: TensorAxis) -> None:
        super().__init__()
        self.axis, self.padding_idx = axis, embedding.padding_idx
        self.weight = axis.split(embedding.weight, 0)

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight.to_local()  # type: ignore[attr-defined]
        first = self.axis.part(self.weight.shape[0])[0]
        place, padding = ids - first, self.padding_idx
        here = (place >= 0) & (place < len(weight))
        if padding is not None:  # its embedding is not trained
            padding = padding - first if 0 <= padding - first < len(weight) else None
        x = F.embedding(torch.where(here, place, 0), weight, padding)
        return self.axis.leave(x.masked_fill(~here[..., None], 0.0))


class Logits(nn.Module):
    """A head without bias; its output says that it is split over the vocabulary: a DTensor."""

    def __init__(self, weight: nn.Parameter, axis: TensorAxis) -> None:
        super().__init__()
        self.axis, self.weight = axis, weight

    def forward(self, x: Tensor) -> Tensor:
        local = F.linear(self.axis.enter(x), self.weight.to_local())  # type: ignore[attr-defined]
        shape = torch.Size((*x.shape[:-1], self.weight.shape[0]))
        stride = torch.empty(shape, device="meta").stride()
        place = [Shard(x.ndim - 1)]
        return DTensor.from_local(
            local, self.axis.mesh, place, run_check=False, shape=shape, stride=stride
        )


class PartOfWeight(nn.Module):
    """A norm whose weight has a row per head: each rank norms its own heads."""

    def __init__(self, norm: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = norm.weight
        self.norm, self.axis = [norm], axis  # in a list: the weight keeps its one name

    def forward(self, x: Tensor) -> Tensor:
        part = {"weight": self.axis.cut(self.weight, 0)}  # type: ignore[arg-type]
        return torch.func.functional_call(self.norm[0], part, (x,))


def whole_on(mesh: DeviceMesh, tensor: DTensor) -> DTensor:
    """A tensor of the first axes of a mesh as one of all its axes, in the same storage: ranks along
    the others hold the same, which is to be counted and written once.
    """
    axes = mesh.ndim - tensor.device_mesh.ndim
    return DTensor.from_local(
        tensor.to_local(),
        mesh,
        (*tensor.placements, *[Replicate()] * axes),
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


class Dispatcher(Protocol):
    """moe.model.experts.Dispatcher."""

    def __call__(
        self,
        experts: Any,
        x_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        plan: Any = None,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor: ...


class SharedOut:
    """A dispatcher for ranks that have the same tokens: each sees to its share of them."""

    def __init__(self, inner: Dispatcher, axis: TensorAxis) -> None:
        self.inner, self.axis = inner, axis

    def __call__(
        self,
        experts: Any,
        x_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        plan: Any = None,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        x, indices, weights = (self.axis.take(t, 0) for t in (x_TH, indices_TK, weights_TK))
        y_TH = self.axis.gather(self.inner(experts, x, indices, weights), 0, len(x_TH))
        # of all tokens, and so not among the share's rows: after them
        return y_TH if meanwhile is None else y_TH + meanwhile()


class OwnExperts:
    """A dispatcher for ranks that have the same tokens and a part of the experts each: a rank
    computes what its experts make of all tokens.
    """

    def __init__(self, axis: TensorAxis, experts: int) -> None:
        self.axis, self.experts = axis, experts

    def __call__(
        self,
        experts: Any,
        x_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        plan: Any = None,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        first, count = self.axis.part(self.experts)
        place_TK = indices_TK - first
        here_TK = (place_TK >= 0) & (place_TK < count)
        x_TH, weights_TK = self.axis.enter(x_TH), self.axis.enter(weights_TK)
        y_TH = experts(x_TH, torch.where(here_TK, place_TK, count), weights_TK)
        y_TH = self.axis.leave(y_TH)
        return y_TH if meanwhile is None else y_TH + meanwhile()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.axis), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: TensorAxis, *used: Tensor) -> Tensor:
        ctx.used = [(u.shape, u.dtype) for u in used]
        return _sum(y, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (gradients[0].new_zeros(shape, dtype=d) for shape, d in ctx.used)
        return gradients[0], None, *zeros


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, axis: TensorAxis) -> Tensor:
        ctx.how = dim, whole.shape[dim], axis
        return axis.cut(whole, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        dim, total, axis = ctx.how
        return axis.collect(gradients[0], dim, total), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, total: int, axis: TensorAxis) -> Tensor:
        ctx.how = dim, axis
        return axis.collect(part, dim, total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        dim, axis = ctx.how
        return axis.cut(gradients[0], dim).contiguous(), None, None, None


def _sum(part: Tensor, axis: TensorAxis) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=axis.group)
    return total
