"""What a calibrated choice is worth: beside the dense model, the paper's choice, and the best.

    rows = side_by_side(source, converted, fits, [("Python documentation", ids)])

Other choices are made on the source itself, by masking the inputs of output projections: a unit
that is off adds nothing. The oracle's goes by what units really are worth, which no router can
know. The fitted choice is the converted model itself, or its mask where a refit changed more.
T tokens, U units, D inputs of an output projection.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.upcycle.calibrate.budget import Choice
from moe.upcycle.calibrate.contributions import Units, contributions, share_of
from moe.upcycle.calibrate.parts import MODULES, OUTPUTS, Name, Part
from moe.upcycle.verify import load, perplexity

How = Literal["paper", "calibrated", "oracle"]
INPUTS = {"attention": "q_proj", "mlp": "gate_proj"}
NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


@dataclass(frozen=True, slots=True)
class Known:
    """What calibration knows of one part of one layer."""

    units: Units
    metric_Uss: Tensor
    choice: Choice


@dataclass(slots=True)
class Seen:
    """What went into a part of a layer, for the masks of its units."""

    x_TH: Tensor
    query_TD: Tensor | None = None
    norm_T1: Tensor | None = None


class Masks:
    """Masks of all parts of all layers by one way to choose; `kept` is what was on, per call."""

    def __init__(self, parts: Sequence[Part], known: dict[tuple[Name, int], Known],
                 bars: dict[Name, float], how: How) -> None:  # fmt: skip
        self.parts, self.known, self.bars, self.how = parts, known, bars, how
        self.kept: list[float] = []

    def of(self, part: Part, index: int, seen: Seen, z_TD: Tensor) -> Tensor:
        """What counts [T, D], 0 or 1."""
        known = self.known[part.name, index]
        if self.how == "paper":
            return _papers(part, seen, z_TD)
        if self.how == "calibrated":
            on_TU = known.choice.on(seen.x_TH, part.units)
        else:
            on_TU = self._best(part, known, seen, z_TD)
        self.kept.append(on_TU.sum(1).mean().item())
        return known.units.spread(on_TU, z_TD.shape[1])

    def _best(self, part: Part, known: Known, seen: Seen, z_TD: Tensor) -> Tensor:
        worth_TU = contributions(z_TD, known.units, known.metric_Uss)
        if part.relative:
            assert seen.norm_T1 is not None
            worth_TU = share_of(worth_TU, seen.norm_T1)
        if part.budget == "threshold":
            return (worth_TU >= self.bars[part.name]).to(worth_TU)
        routed = list(known.choice.routed)
        best_TK = worth_TU[:, routed].topk(known.choice.top_k, dim=1).indices
        on_TU = torch.ones_like(worth_TU)
        on_TU[:, routed] = torch.zeros_like(worth_TU[:, routed]).scatter(1, best_TK, 1.0)
        return on_TU


def _papers(part: Part, seen: Seen, z_TD: Tensor) -> Tensor:
    """No fewer inputs than the budget says, in whole units as they lie: MoH's first half shared and
    largest query norms, UoE's by a drawn router.
    """
    inputs = z_TD.shape[1]
    units = Units.in_a_row(inputs - inputs % part.units, part.units, z_TD.device)
    share = part.keep / part.units
    if part.name == "mlp":
        share = (part.always + share * (inputs - part.always)) / inputs
    keep = min(max(math.ceil(share * part.units - 1e-6), 1), part.units)
    if not part.drawn:
        assert seen.query_TD is not None
        worth_TU = seen.query_TD.unflatten(1, (part.units, -1)).norm(dim=-1)
        worth_TU[:, : min(part.units // 2, keep - 1)] = torch.inf
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(seen.x_TH.shape[1], part.units, generator=generator)
        worth_TU = seen.x_TH @ drawn.to(seen.x_TH)
    on_TU = torch.zeros_like(worth_TU).scatter(1, worth_TU.topk(keep, dim=1).indices, 1.0)
    return units.spread(on_TU, inputs)


@contextlib.contextmanager
def masking(
    model: Any, parts: Sequence[Part], layers: Sequence[int],
    mask: Callable[[Part, int, Seen, Tensor], Tensor | None],
) -> Iterator[None]:  # fmt: skip
    """The model with what `mask` gives for a part of a layer times its output projection's input;
    None leaves it as it is.
    """
    handles = []
    for index in layers:
        layer = model.model.layers[index]
        for part in parts:
            handles += _hooks(layer, part, index, mask)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: Any, part: Part, index: int, mask: Callable[..., Tensor | None]) -> list[Any]:
    module = getattr(layer, MODULES[part.name])
    first, last = getattr(module, INPUTS[part.name]), getattr(module, OUTPUTS[part.name])
    norm = getattr(layer, NORMS[part.name], None) or layer.input_layernorm
    seen = Seen(torch.empty(0))

    def residual(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.norm_T1 = inputs[0].flatten(0, -2).norm(dim=-1, keepdim=True)

    def enter(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.x_TH, seen.query_TD = inputs[0].flatten(0, -2), output.flatten(0, -2)

    def leave(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        mask_TD = mask(part, index, seen, inputs[0].flatten(0, -2))
        return None if mask_TD is None else (inputs[0] * mask_TD.view_as(inputs[0]),)

    return [
        norm.register_forward_pre_hook(residual),
        first.register_forward_hook(enter),
        last.register_forward_pre_hook(leave),
    ]


@torch.no_grad()
def side_by_side(
    source: Path, converted: Path, fits: Any, texts: Sequence[tuple[str, Tensor]]
) -> list[dict[str, Any]]:
    """Perplexity of each text, windows [N, S], under every choice; JSON-ready.

    `calibrated` is the converted model; where its output projections were fitted again that is
    `refit`, and `calibrated` the same choice without.
    """
    parts = [part for part in fits.parts if part.routes]
    layers = sorted({layer for _, layer in fits.known})
    model = load(source)
    rows: list[dict[str, Any]] = [
        {"text": name, "dense": perplexity(model, ids)} for name, ids in texts
    ]
    refit = any(part.refit for part in parts)
    hows: tuple[How, ...] = ("paper", "calibrated", "oracle") if refit else ("paper", "oracle")
    for how in hows:
        masks = Masks(parts, fits.known, fits.bars, how)
        with masking(model, parts, layers, masks.of):
            for row, (_, ids) in zip(rows, texts, strict=True):
                row[how] = perplexity(model, ids)
    model = load(converted)
    for row, (_, ids) in zip(rows, texts, strict=True):
        row["refit" if refit else "calibrated"] = perplexity(model, ids)
    return [{k: v if k == "text" else _rounded(v) for k, v in row.items()} for row in rows]


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
