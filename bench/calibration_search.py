"""What was tried to choose heads and slices better, beside the way that `moe upcycle` has.

python bench/calibration_search.py --source SmolLM2-135M-Instruct --data DIR --out bench/results

`--data` holds WikiText-2: fitted to its validation file, measured on its test file and on modules
of Python's library, another domain. Units are masked in the dense model; nothing is trained but
the predictor that says so. 6 of 9 heads, and three quarters of the MLPs in 24 slices.
T tokens, S of a window, H hidden, U units, D inputs of an output projection.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # no installation is needed

import torch
from calibration import WINDOW, windows
from report import publish
from study_text import code
from torch import Tensor, nn
from torch.nn import functional as F

from moe.upcycle.calibrate.budget import Choice, bar, choose
from moe.upcycle.calibrate.compare import INPUTS, Known, Masks, masking
from moe.upcycle.calibrate.compare import Seen as Masked
from moe.upcycle.calibrate.contributions import contributions, metrics
from moe.upcycle.calibrate.fitting import Calibration, Found, units_of
from moe.upcycle.calibrate.journal import Journal, LayerFit
from moe.upcycle.calibrate.parts import MODULES, OUTPUTS, Part
from moe.upcycle.calibrate.ranks import Alone
from moe.upcycle.calibrate.ridge import Moments, with_one
from moe.upcycle.calibrate.stream import Seen, Stream
from moe.upcycle.calibrate.text import read_windows
from moe.upcycle.recipes.conversion import config_of
from moe.upcycle.source import Source
from moe.upcycle.tokenizer import load_tokenizer
from moe.upcycle.verify import load, perplexity

PARTS = {
    "6 of 9 heads": Part(name="attention", units=9, keep=6),
    "16 of 24 slices": Part(name="mlp", units=24, keep=16, always=384, mean="mean_experts"),
}
FEW, USUAL, MANY = 4096, 16_384, 49_152  # tokens
RANKS = (16, 64)  # of stand-ins for what is left out
HIDDEN, STEPS, BATCH = 64, 300, 1024  # of the predictor with a hidden layer

On = Callable[[int, Tensor], Tensor]
"""Which units of a layer are on [T, U], from the part's input [T, H]."""


class Lab(Calibration):
    """A calibration of one part of every layer; with `keep` all that its predictors learn from."""

    def __init__(
        self, source: Source, part: Part, texts: Sequence[Tensor], folder: Path, keep: bool = False
    ) -> None:
        layers = range(source.config.num_hidden_layers)
        super().__init__(source, layers, [part], texts, "0", Journal(folder), Alone(), quiet=True)
        self.part, self.keep = part, keep
        self.given: dict[int, tuple[Tensor, Tensor]] = {}  # x [T, H], worth [T, U]

    def solve(self) -> tuple[Found, dict[int, Choice], float]:
        """What `moe upcycle` does: gradients, the walk, one threshold."""
        self.perplexity()
        found = self.fit()
        own = {layer: found[self.part.name, layer] for layer in self.layers}
        choices, threshold = choose(own, self.part, torch.float32)
        assert threshold is not None
        return found, choices, threshold

    def fit_part(self, part: Part, index: int, seen: Sequence[Seen]) -> LayerFit:
        fit = super().fit_part(part, index, seen)
        if self.keep:
            units, metric_Uss = self.units(index, fit)
            worth = [contributions(s.z_SD, units, metric_Uss) for s in seen]
            self.given[index] = torch.cat([s.x_SH for s in seen]), torch.cat(worth)
        return fit

    def units(self, index: int, fit: LayerFit) -> tuple[Any, Tensor]:
        """Which inputs belong to which unit, and what is worth how much."""
        weight_HD = self.model.weight(self.part.output(index))
        units = units_of(self.part, fit.order, weight_HD)
        fisher = self.journal.fisher(self.part.name, index)
        assert fisher is not None
        return units, metrics(weight_HD, units, fisher.to(weight_HD))

    def one_after_the_other(self, threshold: float) -> tuple[Found, dict[int, Choice]]:
        """Each layer fitted on what comes out of the layers before with their units left out."""
        stream = Stream(self.model, self.windows, self.ranks, self.progress)
        found: Found = {}
        choices = {}
        for index in self.layers:
            with self.model.layer(index) as layer:
                before = list(stream.states)
                seen = stream.advance(layer, index, [self.part.name])[self.part.name]
                fit = self.fit_part(self.part, index, seen)
                choices[index] = choice = choice_at(fit, self.part, threshold)
                units = self.units(index, fit)[0]
                stream.states = before
                with masking(self.model.empty, [self.part], [index], masks(units, choice.on)):
                    stream.advance(layer, index, [])
            found[self.part.name, index] = fit
        return found, choices

    @torch.no_grad()
    def stand_ins(self, found: Found, choices: dict[int, Choice], rank: int) -> dict[int, Tensor]:
        """Linear maps of a part's input and 1 [H + 1, H], of that rank, to what is left out."""
        stream, fitted = Stream(self.model, self.windows, self.ranks, self.progress), {}
        for index in self.layers:
            with self.model.layer(index) as layer:
                seen = stream.advance(layer, index, [self.part.name])[self.part.name]
            weight_HD = self.model.weight(self.part.output(index))
            units = self.units(index, found[self.part.name, index])[0]
            moments = Moments.empty(len(weight_HD), len(weight_HD), weight_HD.device)
            for x_SH, z_SD, _ in seen:
                on_SU = choices[index].on(x_SH, self.part.units)
                left_out_SD = z_SD * (1 - units.spread(on_SU, z_SD.shape[1]))
                moments.add(x_SH, left_out_SD @ weight_HD.T)
            whole = moments.solve(intercept=True)
            predicted = whole.T @ moments.inputs @ whole
            best = torch.linalg.eigh(predicted).eigenvectors[:, -rank:]
            fitted[index] = (whole @ best @ best.T).float()
        return fitted


def choice_at(fit: LayerFit, part: Part, threshold: float) -> Choice:
    """A layer's units by what its ridge regression predicts, over a threshold known before."""
    solution = fit.solution.clone()
    solution[-1] -= threshold
    return Choice(
        shared=(), dead=(), weight=solution[:-1].T.float().contiguous(),
        bias=solution[-1].float(), routed=tuple(range(part.units)),
    )  # fmt: skip


def masks(units: Any, on: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """For `masking`, of one layer."""

    def mask(part: Part, index: int, seen: Masked, z_TD: Tensor) -> Tensor:
        return units.spread(on(seen.x_TH, part.units), z_TD.shape[1])

    return mask


class Hidden(nn.Module):
    """A ridge regression, and what a hidden layer can add to it, trained on what it misses."""

    def __init__(self, fit: LayerFit, x_TH: Tensor, worth_TU: Tensor, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ridge = fit.solution.float()
        self.mean, self.deviation = x_TH.mean(0), x_TH.std(0) + 1e-6
        missed_TU = worth_TU - with_one(x_TH) @ self.ridge
        self.scale = missed_TU.std() + 1e-9
        units = worth_TU.shape[1]
        self.net = nn.Sequential(
            nn.Linear(x_TH.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, units)
        )
        nn.init.zeros_(self.net[2].weight)
        self._train((x_TH - self.mean) / self.deviation, missed_TU / self.scale)

    def _train(self, x_TH: Tensor, y_TU: Tensor) -> None:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
        for _ in range(STEPS):
            chosen = torch.randint(len(x_TH), (BATCH,))
            loss = F.mse_loss(self.net(x_TH[chosen]), y_TU[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.requires_grad_(False)

    def forward(self, x_TH: Tensor) -> Tensor:
        more_TU = self.net((x_TH - self.mean) / self.deviation) * self.scale
        return with_one(x_TH) @ self.ridge + more_TU


class Search:
    """The dense model, the texts, and rows of what came out."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.source, self.folder = options.source, folder
        self.text = options.data / "wikitext2/valid.txt"
        tokenizer = load_tokenizer(self.source)
        wiki = (options.data / "wikitext2/test.txt").read_text()
        modules = [text for text in code() if len(text) < 60_000]
        self.texts = {
            "wiki": windows(tokenizer, wiki, options.windows),
            "code": windows(tokenizer, "\n\n".join(modules[1::2]), options.windows),
        }
        self.model = load(self.source)
        self.dense = {name: perplexity(self.model, ids) for name, ids in self.texts.items()}
        self.rows: list[dict[str, Any]] = []

    def lab(self, part: Part, tokens: int, keep: bool = False) -> Lab:
        source = Source.open(self.source)
        given = read_windows(self.source, self.text, tokens, config_of(source))
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return Lab(source, part, given, folder, keep)

    def row(self, part: str, name: str, seconds: float, lab: Lab, found: Found, on: On,
            stand_ins: dict[int, Tensor] | None = None) -> None:  # fmt: skip
        """Measure the dense model with these units on."""
        kept: list[float] = []
        units = {index: lab.units(index, found[lab.part.name, index])[0] for index in lab.layers}

        def mask(part: Part, index: int, seen: Masked, z_TD: Tensor) -> Tensor:
            on_TU = on(index, seen.x_TH)
            kept.append(on_TU.sum(1).mean().item())
            return units[index].spread(on_TU, z_TD.shape[1])

        added = standing_in(self.model, lab.part, stand_ins or {})
        with masking(self.model, [lab.part], lab.layers, mask), added:
            self._note(part, name, seconds, kept)

    def oracle(self, part: str, lab: Lab, found: Found, choices: dict[int, Choice]) -> None:
        """What the best choice would keep."""
        known = {}
        for index in lab.layers:
            units, metric_Uss = lab.units(index, found[lab.part.name, index])
            known[lab.part.name, index] = Known(units, metric_Uss, choices[index])
        worth = torch.cat([found[lab.part.name, i].worth.flatten() for i in lab.layers])
        best = Masks([lab.part], known, {lab.part.name: bar(worth, lab.part, len(worth))}, "oracle")
        with masking(self.model, [lab.part], lab.layers, best.of):
            self._note(part, "the best choice there is", 0.0, best.kept)

    def _note(self, part: str, name: str, seconds: float, kept: list[float]) -> None:
        found = {text: perplexity(self.model, ids) for text, ids in self.texts.items()}
        row: dict[str, Any] = {"part": part, "way": name}
        row["found on"] = round(sum(kept) / len(kept), 2)
        for text, value in found.items():
            row[text] = round(value, 2)
            row[f"{text} +%"] = round(100 * (value / self.dense[text] - 1), 2)
        row["seconds"] = round(seconds)
        self.rows.append(row)
        print(row, flush=True)

    def part(self, title: str, part: Part) -> None:
        """All ways for one part."""
        for tokens in (FEW, MANY, USUAL):
            begin = time.monotonic()
            lab = self.lab(part, tokens, keep=tokens == USUAL)
            found, choices, threshold = lab.solve()
            ridge = time.monotonic() - begin
            on = chosen(choices, part)
            self.row(title, f"ridge, {tokens:,} tokens", ridge, lab, found, on)
        self.oracle(title, lab, found, choices)

        begin = time.monotonic()
        nets = {
            i: Hidden(found[part.name, i], *lab.given.pop(i), seed=i) for i in lab.layers
        }  # fmt: skip
        lab.keep = False
        self.row(title, f"ridge and {HIDDEN} hidden units", ridge + time.monotonic() - begin, lab,
                 found, over(nets, lab, found))  # fmt: skip

        for rank in RANKS:
            begin = time.monotonic()
            maps = lab.stand_ins(found, choices, rank)
            spent = ridge + time.monotonic() - begin
            self.row(title, f"ridge, stand-ins of rank {rank}", spent, lab, found, on, maps)

        begin = time.monotonic()
        after, their = lab.one_after_the_other(threshold)
        spent = ridge + time.monotonic() - begin
        name = "ridge, layer after layer"
        self.row(title, name, spent, lab, after, chosen(their, part))


def chosen(choices: dict[int, Choice], part: Part) -> On:
    return lambda index, x_TH: choices[index].on(x_TH, part.units)


def over(nets: dict[int, Hidden], lab: Lab, found: Found) -> On:
    """Units whose prediction by these is over one threshold, found on the same windows."""
    stream = Stream(lab.model, lab.windows, lab.ranks, lab.progress)
    scores = []
    for index in lab.layers:
        with lab.model.layer(index) as layer:
            seen = stream.advance(layer, index, [lab.part.name])[lab.part.name]
        scores += [nets[index](s.x_SH).flatten() for s in seen]
    threshold = bar(torch.cat(scores), lab.part, sum(map(len, scores)))
    return lambda index, x_TH: (nets[index](x_TH) >= threshold).to(x_TH)


@contextlib.contextmanager
def standing_in(model: Any, part: Part, maps: dict[int, Tensor]) -> Iterator[None]:
    """The model with a linear map of a part's input added to its output."""
    handles = []
    for index, whole in maps.items():
        module = getattr(model.model.layers[index], MODULES[part.name])
        seen: list[Tensor] = []

        def enter(module: nn.Module, inputs: Any, output: Tensor, seen: Any = seen) -> None:
            seen[:] = inputs

        def leave(
            module: nn.Module, inputs: Any, y: Tensor, seen: Any = seen, whole: Tensor = whole
        ) -> Tensor:
            return y + (with_one(seen[0].flatten(0, -2)) @ whole).view_as(y)

        handles.append(getattr(module, INPUTS[part.name]).register_forward_hook(enter))
        handles.append(getattr(module, OUTPUTS[part.name]).register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="SmolLM2-135M's folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of wikitext2")
    parser.add_argument("--windows", type=int, default=8, help="of each held-out text")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        search = Search(options, Path(folder))
        for title, part in PARTS.items():
            search.part(title, part)
    notes = [
        f"Dense: {search.dense['wiki']:.2f} and {search.dense['code']:.2f}, "
        f"{options.windows} windows of {WINDOW} tokens each. Targets by the loss's curvature, one "
        f"threshold for all layers; {USUAL:,} tokens of WikiText-2's validation file where no "
        "number is given. Seconds: all there is to do, gradients included. A stand-in is a linear "
        "map of the layer's input that is added for what is left out."
    ]
    title = "Ways to choose parts that were tried"
    publish("calibration_search", title, search.rows, [], notes, options.out)


if __name__ == "__main__":
    main()
