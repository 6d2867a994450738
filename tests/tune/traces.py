"""Traces with planted truth: some experts take more of the tokens of one label.

trace, planted = traces.planted(layers=58, experts=256, top_k=8, lift=3.0, seed=0)
"""

from typing import Any

import numpy as np

from moe.tune.families import Site
from moe.tune.trace import Trace

MODEL = {"name": "toy", "config": "c0", "weights": "w0"}
DISPERSION = 2000.0  # of a prompt's own rates around the model's: Dirichlet, that many counts


def sites(
    layers: int, experts: int, top_k: int, kind: str = "softmax", dense: int = 0
) -> list[Site]:
    """Routers of all MLPs but the first `dense`."""
    return [
        Site(layer=layer, part="mlp", experts=experts, top_k=top_k, kind=kind,
             module=f"layers.{layer}.mlp")
        for layer in range(dense, dense + layers)
    ]  # fmt: skip


def planted(
    layers: int = 58,
    experts: int = 256,
    top_k: int = 8,
    *,
    kind: str = "softmax",
    prompts: int = 60,
    planted: int = 10,
    lift: float = 3.0,
    dispersion: float = DISPERSION,
    seed: int = 0,
) -> tuple[Trace, set[tuple[int, int]]]:
    """A trace of `prompts` each of BAD and GOOD, and (layer, expert) of those planted.

    A planted expert is `lift` times as likely for a BAD token. Every prompt has 50 to 150 tokens
    and rates of its own; every expert's rate is around top_k / experts, some twice others'.
    """
    rng = np.random.default_rng(seed)
    found = sites(layers, experts, top_k, kind, dense=3)
    cells = rng.permutation(layers * experts)[:planted]
    truth = {(int(cell // experts) + 3, int(cell % experts)) for cell in cells}
    bad = np.arange(2 * prompts) % 2 == 0
    tokens = rng.integers(50, 151, 2 * prompts)
    counts, mass = [], []
    for site in found:
        base = rng.lognormal(0, 0.3, experts)
        lifted = [expert for layer, expert in truth if layer == site.layer]
        base[lifted] = 1.0
        rates = np.tile(base, (2 * prompts, 1))
        rates[np.ix_(bad, lifted)] *= lift
        rates /= rates.sum(1, keepdims=True)
        own = rng.standard_gamma(dispersion * rates) + 1e-12
        chosen = rng.multinomial(tokens * top_k, own / own.sum(1, keepdims=True))
        counts.append(np.minimum(chosen, tokens[:, None]))
        # a sigmoid router's weights are scaled and more alike than a softmax router's
        spread, scale = (0.1, 2.5) if kind == "sigmoid" else (0.3, 1.0)
        gates = counts[-1] * rng.lognormal(0, spread, counts[-1].shape)
        mass.append(gates / gates.sum(1, keepdims=True) * tokens[:, None] * scale)
    return trace_of(found, np.hstack(counts), np.hstack(mass), tokens, bad), truth


def trace_of(found: list[Site], counts: Any, mass: Any, tokens: Any, bad: Any) -> Trace:
    rows = [
        {"id": f"{n:016x}", "prompt": f"prompt {n}", "label": "BAD" if of else "GOOD"}
        for n, of in enumerate(bad)
    ]
    return Trace(
        sites=found, counts=np.asarray(counts, np.uint32), mass=np.asarray(mass, np.float32),
        tokens=np.asarray(tokens, np.uint32), rows=rows,
        settings={"model": MODEL, "family": "toy", "tokens": "prompt", "seed": 0},
    )  # fmt: skip


def small(counts: Any, tokens: Any, bad: Any, mass: Any = None, **site: Any) -> Trace:
    """One MLP router with as many experts as counts has columns; top-1 unless told."""
    counts = np.asarray(counts)
    found = [Site(**{"layer": 0, "part": "mlp", "experts": counts.shape[1], "top_k": 1,
                     "kind": "softmax", "module": "layers.0.mlp", **site})]  # fmt: skip
    return trace_of(found, counts, counts / 2 if mass is None else mass, tokens, bad)
