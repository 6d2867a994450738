"""Output scales of a union's MLPs, fitted to text: what the chosen slices give, times how much, is
nearest to the whole MLP.

scales = fit_scales(parent_folder, whole_folder, text)     # {layer: 1.31, …}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.model.experts import RoutedMLP
from moe.model.spec import UoEMLP
from moe.upcycle.verify import load, windows


@torch.no_grad()
def fit_scales(parent: Path, converted: Path, text: Path) -> dict[int, float]:
    """The factor of each union MLP that brings it nearest to its parent's, least squares over the
    text's tokens as they pass through the converted model. Both models are held in float32.
    """
    dense, routed = load(parent), load(converted)
    ids, _ = windows(parent, text, dense.config.vocab_size)
    sums: dict[int, list[float]] = {}

    def measure(layer: int, whole: nn.Module, own: UoEMLP) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            union = output[0].double() / own.output_scale
            wanted = whole(inputs[0]).double()
            product, square = sums.setdefault(layer, [0.0, 0.0])
            sums[layer] = [
                product + (union * wanted).sum().item(), square + union.square().sum().item()
            ]  # fmt: skip

        return hook

    for index, layer in enumerate(routed.model.layers):
        spec = routed.config.mlp_spec(index)
        if isinstance(layer.mlp, RoutedMLP) and isinstance(spec, UoEMLP):
            layer.mlp.register_forward_hook(measure(index, dense.model.layers[index].mlp, spec))
    for window in ids:
        routed(window[None], use_cache=False)
    return {i: round(product / square, 4) for i, (product, square) in sums.items()}
