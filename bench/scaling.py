"""A training step on 1, 2 and 4 ranks of one machine: tokens a second, bytes sent, overlap.

python bench/scaling.py --out bench/results

A mixture with a shared expert, the same global batch on any number of ranks, gloo. The least that
must be sent is counted by hand from the routers' choices: a row for each token and each other rank
that holds one of its experts. Every rank has one thread, so that more ranks than cores only share.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from report import Goal, publish
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F

from moe.config import parse
from moe.engines import build
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.model.experts import RoutedMLP
from moe.parallel.exchange import AllToAll
from moe.parallel.world import world

HIDDEN, LAYERS, EXPERTS, TOP_K, BATCH, LENGTH = 576, 4, 8, 2, 8, 256
MLP = {
    "kind": "moe",
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "intermediate_size": 384,
    "shared_intermediate_size": 768,
}
MESHES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, parallel.expert
WIDTHS = ("float32", "bfloat16")


class ByHand:
    """A dispatcher that counts what the tokens that pass it have to send, and may come first."""

    def __init__(self, inner: AllToAll, overlap: bool) -> None:
        self.inner, self.overlap, self.least = inner, overlap, 0

    def __call__(
        self, experts: Any, x: Tensor, indices: Tensor, weights: Tensor, plan: Any, meanwhile: Any
    ) -> Tensor:
        held = indices // (self.inner.experts // self.inner.size)
        for there in range(self.inner.size):
            if there != self.inner.rank:
                rows = int((held == there).any(1).sum())
                self.least += rows * x.shape[1] * x.element_size()
        given = experts, x, indices, weights, plan
        if self.overlap or meanwhile is None:
            return self.inner(*given, meanwhile)
        return self.inner(*given) + meanwhile()  # the shared expert when all is back


def model() -> RoutedLlamaForCausalLM:
    torch.manual_seed(0)
    config = RoutedLlamaConfig(
        vocab_size=4096,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        mlp=MLP,
    )
    return RoutedLlamaForCausalLM(config)


def measure(expert: int, width: str, overlap: bool, steps: int) -> dict[str, float]:
    """Median seconds of a step, and per step the dispatchers' counters, over all ranks."""
    with world() as ranks:
        values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}}
        train = {"dtype": width, "global_batch_size": BATCH, "micro_batch_size": BATCH}
        config = parse({**values, "train": train, "parallel": {"expert": expert}}, "bench")
        engine: Any = build(model(), config, ranks)
        engine.train(True)
        dispatchers = []
        for module in engine.model.modules():
            if isinstance(module, RoutedMLP) and isinstance(module.dispatcher, AllToAll):
                module.dispatcher = ByHand(module.dispatcher, overlap)
                dispatchers.append(module.dispatcher)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(4096, (BATCH, LENGTH), generator=generator)
        mine = tokens.chunk(ranks.size)[ranks.rank]
        seconds = []
        for step in range(steps + 2):
            if step == 2:  # warm by now
                for d in dispatchers:
                    d.least = d.inner.sent_bytes = 0
                    d.inner.waited_seconds = 0.0
            distributed.barrier()
            begin = time.perf_counter()
            logits = engine.forward(input_ids=mine).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum")
            engine.backward(losses / tokens[:, 1:].numel(), True)
            engine.step(1e-4, torch.ones(()))
            distributed.barrier()
            seconds.append(time.perf_counter() - begin)
        counted = torch.tensor([
            [d.least, d.inner.sent_bytes, d.inner.waited_seconds] for d in dispatchers
        ] or [[0.0] * 3], dtype=torch.float64).sum(0)  # fmt: skip
        least, sent, waited = (ranks.sum(counted) / steps).tolist()
        waits = waited / ranks.size
        return {
            "seconds": statistics.median(seconds[2:]), "least": least, "sent": sent, "waits": waits,
        }  # fmt: skip


def start(rank: int, size: int, place: str, folder: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    found = [measure(expert, width, overlap, steps) for expert, width, overlap, steps in given]
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def run(size: int, cases: list[tuple[Any, ...]]) -> list[dict[str, float]]:
    """The cases one after another on the same ranks."""
    with tempfile.TemporaryDirectory() as folder:
        args = (size, f"file://{folder}/rendezvous", folder, tuple(cases))
        multiprocessing.spawn(start, args, nprocs=size)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    cases: dict[int, list[tuple[int, str, bool]]] = {}
    for size, expert in MESHES:
        for width in WIDTHS:
            for overlap in (True, False) if expert > 1 else (True,):
                cases.setdefault(size, []).append((expert, width, overlap))
    found = {
        (size, *case): result
        for size, group in cases.items()
        for case, result in zip(group, run(size, [(*c, options.steps) for c in group]), strict=True)
    }
    rows, goals, tokens = [], [], BATCH * LENGTH
    for (size, expert, width, overlap), result in found.items():
        if not overlap:
            continue
        alone = found[1, 1, width, True]["seconds"]
        row: dict[str, Any] = {
            "ranks": size, "expert": expert, "dtype": width,
            "tokens/s": tokens / result["seconds"],
            "of one rank": alone / result["seconds"],
            "sent MB": "-", "over the least": "-", "waits ms": "-", "without overlap ms": "-",
        }  # fmt: skip
        if expert > 1:
            over = result["sent"] / result["least"]
            later = found[size, expert, width, False]
            row |= {
                "sent MB": result["sent"] / 1e6, "over the least": f"{over:.4f}",
                "waits ms": 1e3 * result["waits"], "without overlap ms": 1e3 * later["waits"],
            }  # fmt: skip
            goals.append(
                Goal(f"{size} ranks, expert {expert}, {width}: sent over least", over, "≤", 1.05)
            )
        rows.append(row)
    notes = [
        f"{LAYERS} layers of {HIDDEN}, {EXPERTS} experts of {MLP['intermediate_size']}, {TOP_K} "
        f"chosen, a shared one of {MLP['shared_intermediate_size']}; {BATCH} × {LENGTH} tokens a "
        f"step on any number of ranks, one thread each; median of {options.steps} steps.",
        "Sent: by the dispatchers to other ranks, forward (rows out, with their indices and "
        "weights), over all ranks and layers of a step; the least: these rows alone, counted from "
        "the routers' choices. As much travels back, and twice that in the backward pass.",
        "Waits: what a rank's host waits in a step for rows on their way back and their gradients, "
        "with the shared expert computed meanwhile, and after.",
    ]
    publish("scaling", "Training on several ranks of one machine", rows, goals, notes, options.out)


if __name__ == "__main__":
    main()
