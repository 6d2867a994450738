"""Which meshes a number of ranks can be: the legal values of each axis, and why others are not."""

from typing import Any

from torch import nn

from moe.config import RunConfig
from moe.engines.imagine import refusals
from moe.errors import raise_all

AXES = ("replicate", "expert", "tensor")  # shard is what is left


def check(config: RunConfig, model: nn.Module, size: int) -> None:
    """Raise UserError with every reason why `size` ranks cannot run the configuration."""
    raise_all(refusals(config, model, size))


def legal_meshes(config: RunConfig, model: nn.Module, size: int) -> dict[str, Any]:
    """For each axis, the others as configured: values that work, and {value: why not} of the rest.

    Values that do not divide the ranks never work and are left out.
    """
    found: dict[str, Any] = {}
    for axis in AXES:
        legal, refused = [], {}
        for value in (n for n in range(1, size + 1) if size % n == 0):
            if problems := refusals(with_mesh(config, shard=-1, **{axis: value}), model, size):
                refused[value] = " ".join(problems)
            else:
                legal.append(value)
        found[axis] = {"legal": legal, "refused": refused}
    return found


def with_mesh(config: RunConfig, **axes: int) -> RunConfig:
    """The configuration on another mesh."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=axes)})


def with_ranks(config: RunConfig, size: int, micro_batches: int) -> RunConfig:
    """The configuration on `size` ranks that take so many micro-batches of the same size a step.

    The global batch grows with the ranks, and so does the number of ranks that share a copy.
    """
    train = config.train
    batch = train.micro_batch_size * micro_batches * (size // config.parallel.tensor)
    update = {"train": train.model_copy(update={"global_batch_size": batch})}
    return with_mesh(config.model_copy(update=update), shard=-1)
