"""Weighing attention heads per token, before the output projection: the specification."""

from torch import Tensor


def gate_heads(heads_BSNd: Tensor, gate_BSN: Tensor) -> Tensor:
    """Head outputs [B, S, N, d] times a gate [B, S, N]; a gate of 1 leaves them bitwise alone."""
    return heads_BSNd * gate_BSN[..., None].to(heads_BSNd.dtype)
