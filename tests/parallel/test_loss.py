"""Cross entropy of logits split over the vocabulary, on real gloo ranks, against torch's."""

import pytest
import torch
from harness import run_ranks
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from moe.parallel.loss import cross_entropy
from moe.parallel.tensor import Logits, TensorAxis

DTYPES = torch.float64, torch.float32, torch.bfloat16
SIZES = 8, 9, 3  # of the vocabulary: even, uneven, and a rank with one token
LABELS = torch.tensor([[0, 1, -100, 2], [2, 2, 0, 1]])


def drawn(size: int) -> tuple[Tensor, Tensor]:
    """Hidden states [2, 4, 6] and the head's weight, of logits far apart."""
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(2, 4, 6, generator=draw, dtype=torch.float64)
    return x, 30 * torch.randn(size, 6, generator=draw, dtype=torch.float64)


def losses_and_gradients(head: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.requires_grad_()
    losses = cross_entropy(head(x), LABELS)
    weights = torch.linspace(-1, 2, len(losses), dtype=losses.dtype)
    return [losses.detach(), torch.autograd.grad((losses * weights).sum(), x)[0]]


def on_a_rank() -> dict[tuple, list[Tensor]]:
    axis = TensorAxis(init_device_mesh("cpu", (distributed.get_world_size(),)))
    found = {}
    for size in SIZES:
        for dtype in DTYPES:
            x, weight = (t.to(dtype) for t in drawn(size))
            head = Logits(axis.split(torch.nn.Parameter(weight), 0), axis)
            found[size, dtype] = losses_and_gradients(head, x)
    return found


def test_losses_and_gradients_are_those_of_whole_logits():
    for found in run_ranks(on_a_rank, 2):
        for (size, dtype), (losses, gradient) in found.items():
            x, weight = (t.to(dtype) for t in drawn(size))
            head = torch.nn.Linear(6, size, bias=False, dtype=dtype)
            head.weight.data = weight
            wanted, wide = losses_and_gradients(head, x)
            assert losses.dtype == torch.promote_types(dtype, torch.float32)
            tolerance = 4 * torch.finfo(losses.dtype).eps
            assert (losses - wanted).abs().max() <= tolerance * wanted.abs().max(), (size, dtype)
            assert losses[2] == 0, "a label of -100"
            near = 8 * torch.finfo(dtype).eps * wide.abs().max()
            assert (gradient - wide).abs().max() <= near, (size, dtype)


def test_whole_logits_are_torchs_in_float32_or_wider():
    for dtype in DTYPES:
        logits = drawn(9)[0].to(dtype)
        labels = LABELS.clamp(max=5)
        wanted = F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(dtype, torch.float32)),
            labels.flatten(),
            reduction="none",
        )
        assert torch.equal(cross_entropy(logits, labels), wanted)


def forget_the_others() -> dict[tuple, list[Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce", lambda *given, **named: None)
        return on_a_rank()


def test_ranks_that_do_not_add_up_are_found():
    """Negative control."""
    losses, _ = run_ranks(forget_the_others, 2)[0][8, torch.float64]
    x, weight = drawn(8)
    wanted = F.cross_entropy((x @ weight.T).flatten(0, 1), LABELS.flatten(), reduction="none")
    assert (losses - wanted).abs().max() > 1
