"""One definition of the gradient norm: L2 over every parameter once, whatever its sharding."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard


@torch.no_grad()
def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients, the same number on every rank: [] float32 or wider.

    A sharded gradient's squares are summed over the mesh axes that shard it and over no others,
    so that replicas count once. Partial placements are not gradients any engine hands out.
    """
    local: dict[tuple, Tensor] = {}  # squares by the groups they still have to be summed over
    width = torch.float32
    for gradient in gradients:
        axes: tuple = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            axes = tuple(
                (mesh, axis)
                for axis, placement in enumerate(gradient.placements)
                if isinstance(placement, Shard)
            )
            gradient = gradient.to_local()
        width = torch.promote_types(gradient.dtype, width)
        # a CPU adds up a long vector in one row: in float32 the fifth digit of 30 000 is wrong
        within = torch.float64 if gradient.device.type == "cpu" else width
        square = torch.linalg.vector_norm(gradient, dtype=within).double().square()
        local[axes] = local[axes] + square if axes in local else square
    for axes, square in local.items():
        for mesh, axis in axes:
            distributed.all_reduce(square, group=mesh.get_group(axis))
    total = torch.stack(list(local.values())).sum() if local else torch.zeros(())
    return total.sqrt().to(width)


@torch.no_grad()
def scale_gradients(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by one number, in place."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if local:
        torch._foreach_mul_(local, factor)
