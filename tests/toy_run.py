"""Toy training runs on real files: a mixed RoutedLlama, text that can be learnt, a configuration.

toys = make(folder)                      # Toys(model, data)
train(toys.config(folder / "run", "train.steps=4"))
"""

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
import yaml
from torch.distributed.tensor import DTensor

from moe.checkpoint import store
from moe.config import RunConfig, load
from moe.data.prepare import prepare

SEQUENCE = 32

ATTENTION = [tiny.MOH, tiny.TWO_STAGE, {"kind": "dense"}]
MLP = [
    {"kind": "moe", "num_experts": 3, "top_k": 1, "shared_intermediate_size": 16, "z_coef": 0.01},
    {"kind": "dense"},
    {**tiny.MOE, "selection_bias": True, "balance_scope": "global"},
]


@dataclass(frozen=True)
class Toys:
    """A model folder and the prefix of prepared data with its validation part."""

    model: Path
    data: Path

    def values(self, out: Path) -> dict[str, Any]:
        """The keys of a short float32 run without warm-up."""
        return {
            "model": str(self.model),
            "out": str(out),
            "data": {
                "train": [{"path": str(self.data)}],
                "sequence_length": SEQUENCE,
                "document_boundaries": "attention",
            },
            "train": {
                "steps": 4,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "dtype": "float32",
                "log_every": 1,
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 0},
        }

    def write(self, out: Path) -> Path:
        """The same as a YAML file."""
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(self.values(out)))
        return path

    def config(self, out: Path, *overrides: str) -> RunConfig:
        """The same as a configuration."""
        return load(self.write(out), overrides)

    @property
    def validation(self) -> str:
        """The override that turns validation on."""
        return f"data.validation=[{{path: {self.data}-validation}}]"


def make(folder: Path, attention: Any = ATTENTION, mlp: Any = MLP, **sizes: int) -> Toys:
    """Write the model and the data."""
    model, data = folder / "model", folder / "data"
    dense = tiny.dense_model(**sizes)
    tiny.routed_model(dense, attention, mlp).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(400)))
    prepare([str(source)], str(model), data, validation=0.1, workers=1, quiet=True)
    return Toys(model, data)


def texts(count: int) -> list[str]:
    """Stretches of the alphabet of any length: the next letter follows from the last."""
    draw = random.Random(0)
    return [
        "".join(tiny.LETTERS[(begin + i) % 90] for i in range(draw.randint(3, 60)))
        for begin in (draw.randrange(90) for _ in range(count))
    ]


def run(config: RunConfig, pictures: bool = False) -> str:
    """Train in this process (this rank); what it printed. Pictures take longer than steps."""
    from moe.train.loop import train
    from moe.train.metrics import Reporter

    with contextlib.ExitStack() as stack:
        if not pictures:
            stack.enter_context(mock.patch.object(Reporter, "_draw"))
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        train(config)
    return printed.getvalue()


@dataclass
class Step:
    """What one optimiser step saw and did: gradients are whole, and from before clipping."""

    loss: float
    norm: float
    loads: Any
    inputs: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]


@contextlib.contextmanager
def opened(config: RunConfig) -> Iterator[tuple[Any, Callable[[], Step]]]:
    """A Run, and a function that takes its next step."""
    from moe.data.sampler import Batches
    from moe.parallel.world import world
    from moe.train.loop import Run

    with world() as ranks:
        run = Run(config, ranks)
        engine: Any = run.engine
        batches = Batches(
            run.dataset,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=run.ranks.data_rank,
            world_size=run.ranks.data_size,
        )

        def take() -> Step:
            inputs: list[dict[str, Any]] = []
            gradients: dict[str, torch.Tensor] = {}

            def forward(**given: Any) -> Any:
                inputs.append(given)
                return type(engine).forward(engine, **given)

            def step(lr: float, scale: torch.Tensor) -> None:
                for name, parameter in engine.model.named_parameters():
                    gradient = parameter.grad
                    if hasattr(engine, "whole_gradient"):  # where it lies in pieces
                        gradient = engine.whole_gradient(name, parameter)
                    if gradient is not None:
                        gradients[name] = whole(gradient).clone()
                type(engine).step(engine, lr, scale)

            with mock.patch.multiple(engine, forward=forward, step=step):
                loss, norm, _, loads = run.train_step(batches)
            return Step(loss.item(), norm.item(), loads, inputs, gradients)

        yield run, take
        batches.close()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def metrics(out: Path) -> list[dict[str, Any]]:
    """The training lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def validation(out: Path) -> float:
    """The last validation loss of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


def checkpoint(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but generators, whole, under `kind/name`."""
    with store.Reader(out / "checkpoints" / f"step-{step}") as reader:
        return {
            key: reader.block(key, (0,) * len(record.shape), record.shape)
            for key, record in reader.manifest.tensors.items()
            if record.kind != "rng"
        }


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the last bit, or on one side only."""
    names = left.keys() | right.keys()
    return sorted(
        n
        for n in names
        if n not in left or n not in right or left[n].dtype != right[n].dtype
        or not torch.equal(left[n], right[n])
    )  # fmt: skip


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    assert left.keys() == right.keys()
    return max(
        float((left[n] - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-12))
        for n in left
    )


def column(lines: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    """One metric over the logged steps."""
    return torch.tensor([line[name] for line in lines], dtype=torch.float64)
