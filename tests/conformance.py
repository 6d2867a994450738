"""Three clipped steps of any engine on any mesh, and how far they are from those of one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import tiny
import torch
import toy_run
from harness import run_ranks
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moe.config import parse
from moe.engines import build, native
from moe.kernels import ops
from moe.parallel.world import world

MODELS: dict[str, tuple[Any, Any]] = {
    "dense": (None, None),
    "moe": (None, {**tiny.MOE, "shared_intermediate_size": 16}),
    "moh+moe": (tiny.MOH, {**tiny.MOE, "score": "sigmoid", "selection_bias": True}),
    "bam+moe": ({"kind": "bam", "num_experts": 2}, tiny.MOE),
    "uoe": (
        {"kind": "uoe", "num_experts": 3, "top_k": 2},
        {"kind": "uoe", "num_experts": 4, "top_k": 2},
    ),
    "budgets": (tiny.THRESHOLD, tiny.BUDGET),
}
DISTRIBUTIONS = ("balanced", "skewed", "empty")
TOKENS = tiny.tokens(4, 12)
LABELS = 4 * 11
Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model on a mesh; on one process without further words."""

    model: str
    engine: str = "native"
    size: int = 1
    expert: int = 1
    distribution: str = "balanced"
    width: str = "float64"  # of everything; bfloat16: of the computation
    stage: int = 1
    accumulate: int = 1
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    broken: str = ""  # negative controls: division, clip

    @property
    def reference(self) -> "Case":
        """The same on one process."""
        trained = {k: v for k, v in self.options.items() if k == "trainable"}
        return Case(self.model, distribution=self.distribution, width=self.width, options=trained)

    def __str__(self) -> str:
        zero = f"-zero{self.stage}" if self.engine == "deepspeed" else ""
        mesh = f"{self.engine}{zero}-{self.size}-ep{self.expert}"
        rest = [self.distribution, self.width, *(f"{k}={v}" for k, v in self.options.items())]
        return "-".join(
            [self.model, mesh, *rest, *([f"accumulate{self.accumulate}"] * (self.accumulate > 1))]
        )

    def values(self) -> dict[str, Any]:
        """Its configuration."""
        options = dict(self.options)
        zero = {"stage": self.stage, "offload": options.pop("offload", "none")}
        narrow = "bfloat16" if self.width == "bfloat16" else "float32"
        batch = {"global_batch_size": 4, "micro_batch_size": 4 // self.size // self.accumulate}
        return {
            "model": "m",
            "out": "o",
            "engine": self.engine,
            "data": {"train": [{"path": "p"}]},
            "train": {"dtype": narrow, **batch, **options},
            "parallel": {"expert": self.expert},
            "deepspeed": zero,
        }


@contextmanager
def distributed_as(distribution: str) -> Iterator[None]:
    """skewed: every token chooses the first experts, of a threshold all of them; empty: none
    chooses the last, or none at all.
    """
    choose = ops.select_top_k

    def chosen(scores: Tensor, k: int) -> Tensor:
        if distribution == "skewed":
            falling = torch.arange(scores.shape[-1], 0, -1, device=scores.device)
            scores = falling.to(scores).expand_as(scores).contiguous()
        elif distribution == "empty":
            last = torch.arange(scores.shape[-1], device=scores.device) == scores.shape[-1] - 1
            scores = scores.masked_fill(last, -1e9) if scores.shape[-1] > k else scores
        return choose(scores, k)

    above = ops.select_above

    def reached(scores: Tensor, threshold: float) -> Tensor:
        far = {"skewed": 1e9, "empty": -1e9}.get(distribution, 0.0)
        return above(scores + far, threshold)

    with (
        mock.patch.object(ops, "select_top_k", chosen),
        mock.patch.object(ops, "select_above", reached),
    ):
        yield


def take_steps(case: Case) -> Found:
    """Losses, first norm and gradients (of the native engine), and the last state, all whole."""
    wide = torch.float32 if case.width == "bfloat16" else getattr(torch, case.width)
    dtypes = {"float32": wide, "bfloat16": torch.bfloat16}
    with (
        world() as ranks,
        distributed_as(case.distribution),
        mock.patch.dict(native.DTYPES, dtypes),
    ):
        model = tiny.routed_model(tiny.dense_model(), *MODELS[case.model]).to(wide)
        engine: Any = build(model, parse(case.values(), "test"), ranks)
        engine.train(True)
        scale = break_division(engine, ranks.size) if case.broken == "division" else 1.0
        found: Found = {"losses": []}
        mine = TOKENS.chunk(ranks.size)[ranks.rank]
        for step in range(3):
            total = torch.zeros((), dtype=wide)
            for index, part in enumerate(mine.chunk(case.accumulate)):
                logits = engine.forward(input_ids=part).logits[:, :-1].to(wide)
                given = logits.flatten(0, 1), part[:, 1:].flatten()
                loss = F.cross_entropy(*given, reduction="sum") / LABELS
                engine.backward(scale * loss, index == case.accumulate - 1)
                total += loss.detach()
            found["losses"].append(ranks.sum(total))
            norm = engine.grad_norm()
            if step == 0:
                found |= gradients(engine) | {"norm": norm.clone()}
            if case.broken == "clip":  # what a rank sees of the gradient is not all of it
                norm = torch.stack([local(g).norm() for g in engine._gradients()]).norm()
            engine.step(1e-2, (0.5 / norm).clamp(max=1.0))
        assert engine.updates == 3
        for entry in engine.state():
            found[f"{entry.kind}/{entry.name}"] = toy_run.whole(entry.tensor).clone()
        found["losses"] = torch.stack(found["losses"])
        return found


def take_all(cases: list[Case]) -> list[Found]:
    """One after another on the same ranks."""
    return [take_steps(case) for case in cases]


def gradients(engine: Any) -> Found:
    """Every parameter's, whole, before clipping."""
    found = {}
    for name, parameter in engine.model.named_parameters():
        if hasattr(engine, "whole_gradient"):
            gradient = engine.whole_gradient(name, parameter)
        else:
            gradient = parameter.grad
        if gradient is not None:
            found[f"gradient/{name}"] = toy_run.whole(gradient).clone()
    return found


def break_division(engine: Any, size: int) -> float:
    """FSDP2 as it comes: the mean over the ranks of each mesh; what the loss is to be times."""
    for module in engine.model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()._fsdp_param_group
            if state is not None:
                # gloo can do no division of torch's: by the mesh's size it is the same
                module.set_gradient_divide_factor(float(state.mesh_info.mesh.size()))
    return float(size)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def error(found: Found, expected: Found) -> tuple[float, str]:
    """Largest relative error of any tensor, and which it is."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = {
        n: ((found[n].double() - w.double()).norm() / w.double().norm().clamp(min=1e-5)).item()
        for n, w in expected.items()
    }
    worst = max(errors, key=lambda n: errors[n])
    return errors[worst], worst


def bounds(cases: list[Case]) -> list[tuple[Found, float]]:
    """Per case the numbers of one process and how far a mesh may be from them: 1e-10 in float64,
    else four times what another order of sums in one process makes (of three orders the two that
    differ most), or 1e-6.
    """
    narrow = [c.reference for c in cases if c.width != "float64"]
    orders = [replace(c, accumulate=parts) for c in narrow for parts in (2, 4)]
    wanted = [*(c.reference for c in cases), *orders]
    unique = list({str(c): c for c in wanted}.values())
    (found,) = run_ranks(take_all, 1, unique, timeout=600)
    by_name = {str(c): f for c, f in zip(unique, found, strict=True)}
    result = []
    for case in cases:
        one, bound = by_name[str(case.reference)], 1e-10
        if case.width != "float64":
            two, four = (by_name[str(replace(case.reference, accumulate=n))] for n in (2, 4))
            pairs = (two, one), (four, one), (four, two)
            bound = max(4 * max(error(*pair)[0] for pair in pairs), 1e-6)
        result.append((one, bound))
    return result


def check(cases: list[Case]) -> None:
    """All cases, which have their number of ranks in common, against one process."""
    (size,) = {c.size for c in cases}
    expected = bounds(cases)
    ranks = run_ranks(take_all, size, cases, timeout=600)
    lines = []
    for index, (case, (one, bound)) in enumerate(zip(cases, expected, strict=True)):
        for rank, found in enumerate(ranks):
            worst, name = error(found[index], one)
            if not worst <= bound:
                lines.append(f"{case} rank {rank}: {name} is {worst:.2e} off, bound {bound:.1e}")
    assert not lines, "\n" + "\n".join(lines)
