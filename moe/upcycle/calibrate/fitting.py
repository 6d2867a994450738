"""The whole of a calibration: gradients, a walk that fits, a budget, and a walk that fits again.

record = calibrate(source, layers, fits, windows, text, key, folder, ranks)
"""

import math
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.progress import Progress
from moe.upcycle.calibrate.budget import Choice, bar, choose
from moe.upcycle.calibrate.compare import Known
from moe.upcycle.calibrate.contributions import (
    Units,
    contributions,
    importance,
    metrics,
    share_of,
)
from moe.upcycle.calibrate.fisher import EVERY, PASSES, measure_gradients
from moe.upcycle.calibrate.journal import Journal, LayerFit, empty_order
from moe.upcycle.calibrate.neurons import order_neurons
from moe.upcycle.calibrate.parts import Fits, Name, Part
from moe.upcycle.calibrate.ranks import Ranks
from moe.upcycle.calibrate.ridge import Moments, Refit, with_one
from moe.upcycle.calibrate.stream import Model, Seen, Stream, losses
from moe.upcycle.calibrate.text import require_sense, starts
from moe.upcycle.source import Source

SAMPLED = 16  # of so many tokens one says what the best choice there is would be

Found = dict[tuple[Name, int], LayerFit]


class Calibration:
    """One request: the source's layers, the text's windows, and those of them that are this rank's.

    `key` names what is drawn: projections and the beginnings of clusters.
    """

    def __init__(
        self,
        source: Source,
        layers: Sequence[int],
        parts: Sequence[Part],
        windows: Sequence[Tensor],
        key: str,
        journal: Journal,
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        self.model = Model(source, ranks.device)
        self.layers, self.parts, self.key = layers, parts, key
        self.journal, self.ranks = journal, ranks
        share = slice(ranks.rank, None, ranks.size)
        self.windows, self.starts = windows[share], starts(list(windows))[share]
        # the windows whose gradients, or at least perplexity, are measured: whoever shares them
        self.some = windows[::EVERY][share]
        self.curved: list[Name] = [part.name for part in parts if part.measure == "loss"]
        total = self._walk_work() + (self._gradient_work() if self.curved else 0)
        if any(part.refit for part in parts):
            total += self._refit_work()
        self.progress = Progress("calibrate", total, "tokens", quiet or ranks.rank > 0)

    def perplexity(self) -> float:
        """Of the text, from the pass that measures gradients; 0 where that is still to be seen."""
        noted = self.agree(self.journal.noted("perplexity"))
        if noted is None and self.curved:
            given = self.model, self.some, self.layers, self.curved
            noted = measure_gradients(*given, self.journal, self.ranks, self.progress)
            self.journal.note("perplexity", noted)
        elif self.curved:
            self.progress.advance(self._gradient_work())
        return noted or 0.0

    def _gradient_work(self) -> int:
        depth = self.model.config.num_hidden_layers
        return (depth + (PASSES - 1) * (depth - min(self.layers))) * sum(map(len, self.some))

    def _refit_work(self) -> int:
        return (max(self.layers) + 1) * sum(map(len, self.windows))

    def agree(self, value: Any) -> Any:
        """What the first rank says."""
        return self.ranks.gather(value)[0]

    def fit(self) -> Found:
        """A walk through all layers, of which each gives its fits; those that did are passed by."""
        names = [part.name for part in self.parts]
        found: Found = self.agree(self.journal.fits(names, self.layers))
        whole = len(found) == len(names) * len(self.layers)
        if whole and self.agree(self.journal.noted("perplexity")) is not None:
            self.progress.advance(self._walk_work())
            return found
        stream = Stream(self.model, self.windows, self.ranks, self.progress)
        for index in range(self._depth):
            wanted = [
                p for p in self.parts if index in self.layers and (p.name, index) not in found
            ]
            with self.model.layer(index) as layer:
                seen = stream.advance(layer, index, [part.name for part in wanted])
            for part in wanted:
                fit = self.fit_part(part, index, seen.pop(part.name))
                found[part.name, index] = fit
                self.journal.save_fit(part.name, index, fit)
        if not self.curved:
            self.journal.note("perplexity", self._perplexity_of(stream))
        return found

    @property
    def _depth(self) -> int:
        """Layers to walk through: all of them where perplexity is seen at the end alone."""
        return max(self.layers) + 1 if self.curved else self.model.config.num_hidden_layers

    def _walk_work(self) -> int:
        return self._depth * sum(map(len, self.windows))

    @torch.no_grad()
    def _perplexity_of(self, stream: Stream) -> float:
        """Of those windows that gradients would be measured on, come through all layers."""
        head, total, count = self.model.head(), 0.0, 0
        for place, (x_SH, ids_S) in enumerate(zip(stream.states, self.windows, strict=True)):
            if (self.ranks.rank + place * self.ranks.size) % EVERY:
                continue
            total += sum(loss.item() for loss in losses(head, x_SH, ids_S))
            count += len(ids_S) - 1
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.model.device)
        self.ranks.sum(sums)
        return math.exp(min((sums[0] / sums[1]).item(), 700.0))

    @torch.no_grad()
    def fit_part(self, part: Part, index: int, seen: Sequence[Seen]) -> LayerFit:
        """Everything about one part of one layer, from what it saw."""
        begin = time.monotonic()
        weight_HD = self.model.weight(part.output(index))
        fisher = self.agree(self.journal.fisher(part.name, index))
        fisher_HH = fisher.to(weight_HD) if part.measure == "loss" else None
        order = self._order(part, index, seen, weight_HD, fisher_HH)
        units = units_of(part, order, weight_HD)
        metric_Uss = metrics(weight_HD, units, fisher_HH)
        moments = Moments.empty(len(weight_HD), part.units, weight_HD.device)
        some = [torch.empty(0, part.units)]
        for x_SH, z_SD, norm_S1 in seen:
            worth_SU = contributions(z_SD, units, metric_Uss)
            worth_SU = share_of(worth_SU, norm_S1) if part.relative else worth_SU
            moments.add(x_SH, worth_SU)
            some.append(worth_SU[::SAMPLED].cpu())
        moments.sum(self.ranks)
        solution = moments.solve(part.intercept)
        own = [(with_one(s.x_SH).double() @ solution).float().cpu() for s in seen]
        empty = torch.empty(0, part.units)
        return LayerFit(
            solution=solution.cpu(),
            scores=torch.cat(self.ranks.gather(torch.cat([empty, *own]))),
            worth=torch.cat(self.ranks.gather(torch.cat(some))),
            mean=moments.mean.cpu(),
            explained=torch.tensor(moments.explained(solution)),
            order=order,
            seconds=torch.tensor(time.monotonic() - begin),
        )

    def _order(
        self,
        part: Part,
        index: int,
        seen: Sequence[Seen],
        weight_HD: Tensor,
        fisher_HH: Tensor | None,
    ) -> Tensor:
        """The neurons of an MLP in the order of its units; empty for attention."""
        if part.name == "attention":
            return empty_order()
        if part.order is not None:
            return torch.tensor(list(part.order(index)), dtype=torch.long)
        worth_D = importance(weight_HD, fisher_HH)
        activations = [s.z_SD for s in seen]
        key = f"{self.key}/{index}"
        given = activations, self.starts, worth_D, part.always, part.units
        return order_neurons(*given, key, self.ranks)

    @torch.no_grad()
    def refit(
        self, found: Found, choices: Mapping[Name, Mapping[int, Choice]]
    ) -> dict[str, Tensor]:
        """Output projections fitted to what the choices leave on, in a walk of their own."""
        parts = [part for part in self.parts if part.refit]
        outputs: dict[str, Tensor] = {}
        for part in parts:
            for index in self.layers:
                kept = self.agree(self.journal.output(part.name, index))
                if kept is not None:
                    outputs[part.output(index)] = kept
        if len(outputs) == len(parts) * len(self.layers):
            self.progress.advance(self._refit_work() if parts else 0)
            return outputs
        stream = Stream(self.model, self.windows, self.ranks, self.progress)
        for index in range(max(self.layers) + 1):
            wanted = [p for p in parts if index in self.layers and p.output(index) not in outputs]
            with self.model.layer(index) as layer:
                seen = stream.advance(layer, index, [part.name for part in wanted])
            for part in wanted:
                fit, choice = found[part.name, index], choices[part.name][index]
                weight = self._refit_part(part, index, fit, choice, seen.pop(part.name))
                outputs[part.output(index)] = weight
                self.journal.save_output(part.name, index, weight)
        return outputs

    def remember(
        self, fits: Fits, found: Found, choices: Mapping[Name, Mapping[int, Choice]]
    ) -> None:
        """What a comparison of choices needs to know."""
        for part in self.parts:
            for index, choice in choices[part.name].items():
                weight_HD = self.model.weight(part.output(index))
                units = units_of(part, found[part.name, index].order, weight_HD)
                fisher = self.journal.fisher(part.name, index)
                fisher_HH = None if fisher is None else fisher.to(weight_HD)
                metric_Uss = metrics(weight_HD, units, fisher_HH)
                known = Known(units.to("cpu"), metric_Uss.cpu(), choice)
                fits.known[part.name, index] = known
            if part.budget == "threshold":
                worth = {index: found[part.name, index].worth for index in self.layers}
                living = [
                    worth_TU[:, choices[part.name][index].living].flatten()
                    for index, worth_TU in worth.items()
                ]
                count = sum(worth_TU.numel() for worth_TU in worth.values())
                fits.bars[part.name] = bar(torch.cat(living), part, count)

    def _refit_part(
        self, part: Part, index: int, fit: LayerFit, choice: Choice, seen: Sequence[Seen]
    ) -> Tensor:
        weight_HD = self.model.weight(part.output(index))
        units = units_of(part, fit.order, weight_HD)
        sums = Refit.empty(weight_HD.shape[1], weight_HD.device)
        for x_SH, z_SD, _ in seen:
            sums.add(z_SD, units.spread(choice.on(x_SH, part.units), z_SD.shape[1]))
        return sums.solve(weight_HD, self.ranks).float().cpu()


def units_of(part: Part, order: Tensor, weight_HD: Tensor) -> Units:
    """Which inputs of the output projection belong to which unit."""
    if part.name == "attention":
        return Units.in_a_row(weight_HD.shape[1], part.units, weight_HD.device)
    return Units.of_order(order.to(weight_HD.device), part.always, part.units)


def calibrate(
    source: Source,
    layers: Sequence[int],
    fits: Fits,
    windows: Sequence[Tensor],
    text: Path,
    key: str,
    folder: Path | None,
    ranks: Ranks,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fill `fits` with what its parts ask for; returns what to say of it in a receipt.

    `folder` keeps what each layer gave until it is removed; only the first rank has one. Raises
    UserError where the text does not suit the model, Corrupt where values are not finite.
    """
    begin, journal = time.monotonic(), Journal(folder)
    run = Calibration(source, layers, fits.parts, windows, key, journal, ranks, quiet)
    with run.progress:
        vocabulary = run.model.config.vocab_size
        if perplexity := run.perplexity():
            require_sense(text, perplexity, vocabulary)
        found = run.fit()
        perplexity = run.agree(journal.noted("perplexity"))
        require_sense(text, perplexity, vocabulary)
        choices: dict[Name, dict[int, Choice]] = {}
        record: dict[str, Any] = {}
        for part in fits.parts:
            own = {layer: found[part.name, layer] for layer in layers}
            choices[part.name], threshold = choose(own, part, fits.dtype)
            record[part.name] = describe(part, own, choices[part.name], threshold)
        fits.tensors |= run.refit(found, choices)
        run.remember(fits, found, choices)
    for part in fits.parts:
        settle(fits, part, choices[part.name], found)
    if ranks.rank == 0:
        warn(fits.parts, choices)
    seconds = round(time.monotonic() - begin, 1)
    return {
        "perplexity": round(perplexity, 4),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "parts": record,
    }


def settle(
    fits: Fits,
    part: Part,
    choices: Mapping[int, Choice],
    found: Mapping[tuple[Name, int], LayerFit],
) -> None:
    """Give a part's routers, orders and specifications their values."""
    changes = fits.changes.setdefault(part.name, {})
    for layer, choice in choices.items():
        if part.routes:
            fits.tensors[part.router(layer, "weight")] = choice.weight
            fits.tensors[part.router(layer, "bias")] = choice.bias
        own: dict[str, Any] = {}
        if part.shared:
            own["shared_heads"] = list(choice.shared)
        if part.budget == "layer":
            own["top_k"] = choice.top_k
        elif part.budget == "threshold":
            own[part.mean] = max(round(choice.mean, 4), 1e-4)  # a mean of none has no loss
        changes[layer] = own
        order = found[part.name, layer].order
        if len(order):
            fits.orders[layer] = order.tolist()


def describe(
    part: Part, fits: Mapping[int, LayerFit], choices: Mapping[int, Choice], threshold: float | None
) -> dict[str, Any]:
    """A receipt's entry for a part."""
    layers = {}
    for layer, choice in choices.items():
        kept = {"top_k": choice.top_k} if choice.top_k else {"mean_on": round(choice.mean, 4)}
        layers[str(layer)] = {
            "shared": list(choice.shared),
            **kept,
            "r2": round(fits[layer].explained.item(), 4),
            "worth": [float(f"{mean:.3g}") for mean in fits[layer].mean.tolist()],
            "dead": list(choice.dead),
            "seconds": round(fits[layer].seconds.item(), 2),
        }
    return {
        "target": part.measure,
        "budget": part.budget,
        "units": part.units,
        "keep": part.keep,
        "mean_on": round(sum(c.mean for c in choices.values()) / len(choices), 4),
        "threshold": threshold,
        "refit": part.refit,
        "layers": layers,
    }


def warn(parts: Iterable[Part], choices: Mapping[Name, Mapping[int, Choice]]) -> None:
    """Name the units that add nothing, and a budget that they leave unspent."""
    found = []
    for part in parts:
        for layer, choice in choices[part.name].items():
            if choice.dead:
                found.append(
                    f"layer {layer}: {part.noun} {', '.join(map(str, choice.dead))} add nothing on "
                    "the calibration text: never shared, chosen last."
                )
        mean = sum(c.mean for c in choices[part.name].values()) / len(choices[part.name])
        if part.routes and mean < part.keep - 0.01 * part.units:
            found.append(
                f"{mean:.3g} of {part.units} {part.noun} are on per token on average, not "
                f"{part.keep:g}: the others add nothing."
            )
    for text in found:
        print(f"warning: {text}", file=sys.stderr)


def peak_memory() -> int:
    """Bytes that this process held at most; of a GPU's memory where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
