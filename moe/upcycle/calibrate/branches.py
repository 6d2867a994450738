"""Routers between the sources of a mixture, fitted so that a token goes where it is read best.

record = calibrate_branches(sources, config, plan, layers, fits, windows, text, folder, ranks)

The walk goes through the mixture itself: a layer's routers are fitted to the hidden states that
come out of the layers before it, whose fitted routers are in place. T tokens, S of a window and R
of those that have a target, E sources, H hidden.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.model import RoutedLlamaConfig
from moe.model.llama import RoutedDecoderLayer
from moe.progress import Progress
from moe.upcycle.calibrate.fisher import EVERY
from moe.upcycle.calibrate.fitting import peak_memory
from moe.upcycle.calibrate.journal import Journal
from moe.upcycle.calibrate.parts import MODULES, Fits, Name
from moe.upcycle.calibrate.ranks import Ranks
from moe.upcycle.calibrate.ridge import Moments
from moe.upcycle.calibrate.stream import Model, Stream, losses
from moe.upcycle.calibrate.text import require_sense
from moe.upcycle.expression import Expression
from moe.upcycle.source import Source

SHARPEST = 8.0  # deviation of the logits, at most: beyond it a softmax has no gradient left
STEPS = 24  # of the first search, each by a factor of √2
REFINEMENTS = 40  # of the second, each to 0.62 of what was left


@dataclass(frozen=True, slots=True)
class Aim:
    """What routers are to tell of tokens: of this rank's by window, and of all ranks' together."""

    wanted: Sequence[Tensor]  # [R, E] of each window, centred
    best_T: Tensor  # the source that is right
    loss_TE: Tensor | None  # of each source; None where tokens are labelled

    def cost(self, logits_TE: Tensor) -> float:
        """What a router with these logits costs on average: its cross entropy, or the loss that is
        to be expected of sources drawn by it.
        """
        if self.loss_TE is None:
            return F.cross_entropy(logits_TE, self.best_T).item()
        return (logits_TE.softmax(1) * self.loss_TE).sum(1).mean().item()


def label_aim(labels: Sequence[int], windows: Sequence[Tensor], count: int, ranks: Ranks) -> Aim:
    """Labels as one-hot rows, less their mean over all tokens: these routers have no intercept."""
    own = [torch.full((len(ids),), label) for label, ids in zip(labels, windows, strict=True)]
    best_T = torch.cat(ranks.gather(torch.cat([torch.empty(0, dtype=torch.long), *own])))
    mean_E = F.one_hot(best_T, count).double().mean(0)
    return Aim([F.one_hot(best_R, count).double() - mean_E for best_R in own], best_T, None)


def loss_aim(own: Sequence[Tensor], ranks: Ranks) -> Aim:
    """From the sources' losses in each window [R, E]: minus those, less a token's mean."""
    loss_TE = torch.cat(ranks.gather(torch.cat([*own]).double()))
    wanted = [loss_RE.double().mean(1, keepdim=True) - loss_RE.double() for loss_RE in own]
    return Aim(wanted, loss_TE.argmin(1), loss_TE)


def temperature(scores_TE: Tensor, cost: Callable[[Tensor], float]) -> float:
    """The factor of the scores that costs least: the best of a row of factors, then between its
    neighbours by golden section. 1 where all scores are equal.
    """
    deviation = scores_TE.std(correction=0).item()
    if not deviation > 0:
        return 1.0

    def at(log: float) -> float:
        return cost(scores_TE * (math.exp(log) / deviation))

    step, last = math.log(2) / 2, math.log(SHARPEST)
    best = min((at(last - i * step), i) for i in range(STEPS))[1]
    low, high = last - (best + 1) * step, min(last - (best - 1) * step, last)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(REFINEMENTS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if at(left) < at(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2) / deviation


class _Reached(Exception):
    """A layer has come to the router in question."""


@contextlib.contextmanager
def _stopping_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what goes into a module, and ends each forward pass there."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield seen
    finally:
        handle.remove()


class BranchCalibration:
    """One request: a mixture's layers, the text's windows, and those that are this rank's."""

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Model,
        layers: Sequence[int],
        fits: Fits,
        windows: Sequence[Tensor],
        journal: Journal,
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        assert fits.branches is not None
        self.sources, self.mixture, self.layers, self.fits = sources, mixture, layers, fits
        self.branches, self.journal, self.ranks = fits.branches, journal, ranks
        share = slice(ranks.rank, None, ranks.size)
        self.windows, self.labels = windows[share], self.branches.labels[share]
        depth, count = mixture.config.num_hidden_layers, sum(map(len, self.windows))
        own = [self._own(number) for number in range(len(sources))]
        read = count + sum(len(self.windows[place]) for places in own for place in places)
        self.progress = Progress("calibrate", depth * read, "tokens", quiet or ranks.rank > 0)

    def agree(self, value: Any) -> Any:
        """What the first rank says."""
        return self.ranks.gather(value)[0]

    def _own(self, source: int) -> Sequence[int]:
        """The windows that a source reads: all, or some of those with its label."""
        if self.branches.target == "loss":
            return range(len(self.windows))
        return [place for place, label in enumerate(self.labels) if label == source][::EVERY]

    @torch.no_grad()
    def read(self, source: int) -> list[Tensor]:
        """What a source loses on each token of its windows [R], float32."""
        windows = [self.windows[place] for place in self._own(source)]
        sizes = [len(ids) - 1 for ids in windows]  # nothing follows the last one
        counts = self.ranks.gather(sum(sizes))
        name = f"{source}-of-{len(counts)}"  # so many ranks share the windows otherwise
        known = self.agree(self.journal.losses(name))
        if known is not None:
            self.progress.advance(self.mixture.config.num_hidden_layers * sum(map(len, windows)))
            return list(known.split(counts)[self.ranks.rank].split(sizes))
        model = Model(self.sources[source], self.ranks.device)
        stream = Stream(model, windows, self.ranks, self.progress)
        for index in range(model.config.num_hidden_layers):
            with model.layer(index) as layer:
                stream.advance(layer, index, ())
        own = stream_losses(stream, windows)
        whole = torch.cat(self.ranks.gather(torch.cat([torch.empty(0), *own])))
        self.journal.save_losses(name, whole)
        return own

    def aim(self, text: Path) -> tuple[Aim, list[dict[str, Any]]]:
        """What routers are to tell, and what to say of each source: its perplexity on its text.

        Raises UserError where no source reads its text.
        """
        read = [self.read(source) for source in range(len(self.sources))]
        record = []
        for own in read:
            perplexity, count = self._perplexity(own)
            record.append({"tokens": count, "perplexity": round(perplexity, 4)})
            if self.branches.target == "label":
                require_sense(text, perplexity, self.mixture.config.vocab_size)
        if self.branches.target == "label":
            given = self.labels, self.windows, len(self.sources)
            return label_aim(*given, self.ranks), record
        best = min(row["perplexity"] for row in record)
        require_sense(text, best, self.mixture.config.vocab_size)
        return loss_aim(
            [torch.stack(own, 1) for own in zip(*read, strict=True)], self.ranks
        ), record

    def _perplexity(self, own: Sequence[Tensor]) -> tuple[float, int]:
        """Of all ranks' tokens together, and how many they are."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for loss_R in own:
            sums += torch.tensor([loss_R.double().sum(), len(loss_R)]).to(sums)
        total, count = self.ranks.sum(sums).tolist()
        return math.exp(min(total / count, 700.0)), int(count)

    @torch.no_grad()
    def walk(self, aim: Aim) -> tuple[dict[Name, dict[str, Any]], float]:
        """Fit the routers of all layers, one after the other; returns what to say of each, and the
        mixture's perplexity.
        """
        record: dict[Name, dict[str, Any]] = {part: {} for part in self.branches.parts}
        stream = Stream(self.mixture, self.windows, self.ranks, self.progress)
        shape = self.branches.count, self.mixture.config.hidden_size
        for part in self.branches.parts:
            for index in self.layers:  # the plan has to be readable before it is complete
                self.fits.tensors[self.branches.router(part, index)] = torch.zeros(shape)
        for index in range(self.mixture.config.num_hidden_layers):
            with self.mixture.layer(index) as layer:
                for part in self.branches.parts if index in self.layers else ():
                    fitted = self._fit(stream.states, layer, index, part, aim)
                    record[part][str(index)] = fitted
                stream.advance(layer, index, ())
        return record, self._perplexity(stream_losses(stream, self.windows))[0]

    def _fit(
        self, states: Sequence[Tensor], layer: RoutedDecoderLayer, index: int, part: Name, aim: Aim
    ) -> dict[str, Any]:
        """Fit one router and put it in its place."""
        router: Any = getattr(layer, MODULES[part]).router
        with _stopping_at(router) as seen:
            for x_SH in states:
                with contextlib.suppress(_Reached):
                    self.mixture.run(layer, index, x_SH)
        count, device = self.branches.count, self.ranks.device
        moments = Moments.empty(self.mixture.config.hidden_size, count, device)
        pairs = [
            (x_SH[: len(y_RE)], y_RE.to(device))
            for x_SH, y_RE in zip(seen, aim.wanted, strict=True)
        ]
        for x_RH, y_RE in pairs:
            moments.add(x_RH, y_RE)
        moments.sum(self.ranks)
        solution = moments.solve(intercept=False)
        weight_EH = solution[:-1].T
        own = [(x_RH.double() @ weight_EH.T).cpu() for x_RH, _ in pairs]
        empty = torch.empty(0, count, dtype=torch.float64)
        scores_TE = torch.cat(self.ranks.gather(torch.cat([empty, *own])))
        factor = temperature(scores_TE, aim.cost)
        weight = (factor * weight_EH).to(self.fits.dtype).float().contiguous()
        router.weight.copy_(weight)
        self.fits.tensors[self.branches.router(part, index)] = weight.cpu()
        right = (scores_TE.argmax(1) == aim.best_T).double().mean().item()
        return {
            "r2": round(moments.explained(solution), 4),
            "right": round(right, 4),
            "scale": round(factor, 4),
            "cost": round(aim.cost(factor * scores_TE), 4),
        }


def stream_losses(stream: Stream, windows: Sequence[Tensor]) -> list[Tensor]:
    """Of each token that another follows [R], where all layers have been walked."""
    head = stream.model.head()
    return [
        torch.cat(list(losses(head, x_SH, ids_S, "none"))).cpu()
        for x_SH, ids_S in zip(stream.states, windows, strict=True)
    ]


def calibrate_branches(
    sources: Sequence[Source],
    config: RoutedLlamaConfig,
    plan: Mapping[str, Expression],
    layers: Sequence[int],
    fits: Fits,
    windows: Sequence[Tensor],
    text: Path,
    folder: Path | None,
    ranks: Ranks,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fill `fits` with the routers of the mixture that `plan` makes; returns what to say of it in a
    receipt.

    `folder` keeps what sources lose on each token; the walk through the mixture, cut short, begins
    again. Raises UserError where no source reads the text, Corrupt where values are not finite.
    """
    begin = time.monotonic()
    mixture = Model(sources[0], ranks.device, config, plan)
    run = BranchCalibration(sources, mixture, layers, fits, windows, Journal(folder), ranks, quiet)
    with run.progress:
        aim, read = run.aim(text)
        found, perplexity = run.walk(aim)
    parts = {
        part: {
            name: round(sum(row[name] for row in rows.values()) / len(rows), 4)
            for name in ("r2", "right", "cost")
        }
        | {"layers": rows}
        for part, rows in found.items()
    }
    return {
        "target": run.branches.target,
        "perplexity": round(perplexity, 4),
        "sources": read,
        "seconds": round(time.monotonic() - begin, 1),
        "peak_memory_bytes": peak_memory(),
        "parts": parts,
    }
