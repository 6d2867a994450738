"""Projections of the heads that are on, on a CPU: head by head, the rows that have it on.

T tokens, H hidden, N heads, d head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def runs(on_TN: Tensor) -> Iterator[tuple[int, Tensor | slice]]:
    """The heads that some token has on, and the tokens that do."""
    for head, count in enumerate(on_TN.sum(0).tolist()):
        if count == len(on_TN):
            yield head, slice(None)  # nothing to gather: of a single token, that is every one
        elif count:
            yield head, on_TN[:, head].nonzero()[:, 0]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, on: Tensor) -> Tensor:
    """[T, N, d], zeros where a head is off; weight [N · d, H], bias [N · d]."""
    heads = on.shape[1]
    parts = weight.view(heads, -1, weight.shape[1])
    biases = [None] * heads if bias is None else bias.view(heads, -1)
    out = x.new_zeros(*on.shape, parts.shape[1])
    for head, rows in runs(on):
        out[rows, head] = F.linear(x[rows], parts[head], biases[head])
    return out


def backward(dout: Tensor, x: Tensor, weight: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; what is off has none."""
    heads = on.shape[1]
    parts = weight.view(heads, -1, weight.shape[1])
    dx, dparts = torch.zeros_like(x), torch.zeros_like(parts)
    dbias = dout.new_zeros(parts.shape[:2])
    for head, rows in runs(on):
        dout_Pd = dout[rows, head]
        dx[rows] += dout_Pd @ parts[head]  # a row stands once in a run
        dparts[head] = dout_Pd.T @ x[rows]
        dbias[head] = dout_Pd.sum(0)
    return dx, dparts.view_as(weight), dbias.flatten()
