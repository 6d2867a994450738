"""What the loss makes of a part's output: second moments of its gradient there (empirical Fisher).

One forward and one backward pass over some of the windows, a layer's weights in memory at a time:
the hidden states at the entrance of every layer are kept, and each layer is run again backwards.
H hidden, S tokens of a window.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe.model import router
from moe.model.llama import RoutedDecoderLayer
from moe.progress import Progress
from moe.upcycle.calibrate.journal import Journal
from moe.upcycle.calibrate.parts import Name
from moe.upcycle.calibrate.ranks import Ranks, together
from moe.upcycle.calibrate.stream import Model, losses, require_finite

EVERY = 4  # of so many windows one: a second moment needs less than a router
PASSES = 3  # that a window is run through a layer, or back


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """Gates without the gradient that training gives them: constant but for jumps."""
    through = router.straight_through
    router.straight_through = lambda mask, probability: mask
    try:
        yield
    finally:
        router.straight_through = through


def measure_gradients(
    model: Model,
    windows: Sequence[Tensor],
    layers: Sequence[int],
    parts: Sequence[Name],
    journal: Journal,
    ranks: Ranks,
    progress: Progress,
) -> float:
    """Second moments [H, H] of the gradient at the outputs of these parts, into the journal.

    The gradient is that of a window's summed loss. Returns the windows' perplexity. Raises Corrupt
    where values are not finite.
    """
    entrances = together(ranks, lambda: _forward(model, windows, min(layers), progress))
    gradients, total, count = [], 0.0, 0
    head = model.head()
    for x_SH, ids_S in zip(entrances.pop(), windows, strict=True):
        x_SH = x_SH.requires_grad_()
        for loss in losses(head, x_SH, ids_S):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        count += len(ids_S) - 1
        # the last position has no next token: nothing reads it
        gradients.append(x_SH.grad if x_SH.grad is not None else torch.zeros_like(x_SH))
    del head
    sums = ranks.sum(torch.tensor([total, count], dtype=torch.float64, device=model.device))
    for index in range(model.config.num_hidden_layers - 1, min(layers) - 1, -1):
        with model.layer(index) as layer, _as_it_is():
            moments = _backward(
                model, layer, index, entrances.pop(), gradients,
                parts if index in layers else (), progress,
            )  # fmt: skip
        for part, moment in moments.items():
            journal.save_fisher(part, index, (ranks.sum(moment) / sums[1]).float())
    return math.exp(min((sums[0] / sums[1]).item(), 700.0))


@torch.no_grad()
def _forward(
    model: Model, windows: Sequence[Tensor], first: int, progress: Progress
) -> list[list[Tensor]]:
    """Hidden states of every window before each layer from `first` on, and after the last."""
    states = [model.embed(ids) for ids in windows]
    entrances = []
    for index in range(model.config.num_hidden_layers):
        if index >= first:
            entrances.append(states)
        with model.layer(index) as layer:
            states = [model.run(layer, index, x_SH) for x_SH in states]
        for x_SH in states:
            require_finite(model, index, x_SH)
            progress.advance(len(x_SH))
    return [*entrances, states]


def _backward(
    model: Model,
    layer: RoutedDecoderLayer,
    index: int,
    entrance: list[Tensor],
    gradients: list[Tensor],
    parts: Sequence[Name],
    progress: Progress,
) -> dict[Name, Tensor]:
    """Moments of this layer, float64; `gradients` of its output become those of its input."""
    hidden = model.config.hidden_size
    moments: dict[Name, Tensor] = {
        part: torch.zeros(hidden, hidden, dtype=torch.float64, device=model.device)
        for part in parts
    }
    attended: list[Tensor] = []
    handle = layer.self_attn.register_forward_hook(
        lambda module, inputs, output: attended.append(output[0])
    )
    try:
        for place, x_SH in enumerate(entrance):
            x_SH = x_SH.detach().requires_grad_()
            y_SH = model.run(layer, index, x_SH)
            own_SH = gradients[place]
            given = torch.autograd.grad(y_SH, (x_SH, attended.pop()), own_SH)
            gradients[place] = given[0]
            for part, moment in moments.items():
                # the MLP's output is added to the layer's: they have one gradient
                at_SH = own_SH if part == "mlp" else given[1][0]
                moment += (at_SH.T @ at_SH).double()
            progress.advance((PASSES - 1) * len(x_SH))
    finally:
        handle.remove()
    return moments
