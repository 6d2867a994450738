"""How fast a model reads and writes and what it keeps, beside its dense parent in the same run.

    report = bench([model, parent], Grid(batches=(1, 4), lengths=(128, 512)))

At each point of the grid the models take turns, so that what else the machine does meets all alike;
numbers are medians, and a ratio is the median of the rounds' own ratios. Prompts are random tokens.
"""

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe.errors import UserError, raise_all
from moe.hf.inspect import routed
from moe.hf.loading import identity, load_model
from moe.model import RoutedLlamaConfig
from moe.model.accounting import cache_bytes, flops_per_token, parameter_counts
from moe.model.cache import CACHE
from moe.model.spec import DenseAttention, DenseMLP
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import hash_file, read_config

WARMUP = 1  # rounds that are not counted; the first also measures memory
BACKWARD = 3.0  # training's FLOPs over those of a forward pass
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Every batch size with every prompt length in tokens; tokens to write after it; rounds."""

    batches: tuple[int, ...] = (1, 4)
    lengths: tuple[int, ...] = (128, 512)
    new_tokens: int = 32
    repeats: int = 3


def check(folders: Sequence[Path], grid: Grid) -> None:
    """Raise UserError with every length that a model has no positions for."""
    problems = []
    for folder in folders:
        positions = getattr(read_config(folder), "max_position_embeddings", None)
        for length in grid.lengths:
            if positions is not None and length + grid.new_tokens > positions:
                problems.append(
                    f"length={length} and {grid.new_tokens} new tokens: {folder} has {positions} "
                    f"positions. Use {positions - grid.new_tokens} or less."
                )
    raise_all(problems)


def known(config: PreTrainedConfig) -> RoutedLlamaConfig | None:
    """The config as the accounting reads it, None of an architecture that we do not know."""
    try:
        return routed(config)
    except UserError:
        return None


def is_dense(config: PreTrainedConfig) -> bool:
    ours = known(config)
    return ours is not None and all(
        isinstance(ours.attention_spec(i), DenseAttention)
        and isinstance(ours.mlp_spec(i), DenseMLP)
        for i in range(ours.num_hidden_layers)
    )


def find_parent(folder: Path) -> Path | None:
    """The dense folder that a model was made from, the last one of its history that is still what
    it was; None for a dense model. Raises UserError where a mixture has none.
    """
    if is_dense(read_config(folder)):
        return None
    receipt = Receipt.read(folder)
    named: list[str] = []
    for step in reversed(receipt.steps if receipt else []):
        for source in step.get("sources", []):
            path = Path(source["path"])
            named.append(str(path))
            file = path / "config.json"
            if not file.is_file() or hash_file(file) != source.get("config", hash_file(file)):
                continue
            if is_dense(read_config(path)):
                return path
    why = f"of {', '.join(named)} none is there as it was" if named else "it has no receipt"
    raise UserError(f"{folder}: its dense parent is not known ({why}). Name one with --against.")


def caution(folder: Path, against: Path) -> list[str]:
    """What to know of a model that was named as a dense parent, which it need not be."""
    receipt = Receipt.read(folder)
    sources = [s for step in receipt.steps for s in step.get("sources", [])] if receipt else []
    notes = []
    if not any(_is_source(against, source) for source in sources):
        why = "the receipt names none like it" if receipt else "it has no receipt"
        notes.append(
            f"{against} is not what {folder} was made from ({why}): ratios are of two models, not "
            "of a conversion and its parent."
        )
    if not is_dense(read_config(against)):
        notes.append(f"{against} is not dense: ratios are not against a dense model.")
    return notes


def _is_source(folder: Path, source: dict[str, Any]) -> bool:
    """Whether a folder holds what a receipt's source held, wherever it lies."""
    files = {"config.json": {"xxh3": source.get("config")}, **source.get("files", {})}
    return all(
        (folder / name).is_file() and hash_file(folder / name) == known.get("xxh3")
        for name, known in files.items()
    )


def bench(
    folders: Sequence[Path], grid: Grid, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every point of the grid for each model, the first being held against the others.

    All are loaded at once, in the first one's dtype. A point that memory or the model does not
    allow has an `error` in the place of its numbers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: list[PreTrainedModel] = []
    for folder in folders:
        say(f"loading {folder}")
        model: Any = load_model(folder)
        models.append(model.to(device=device, dtype=models[0].dtype if models else model.dtype))
    facts = [_facts(f, m) for f, m in zip(folders, models, strict=True)]
    for model in models:  # what a first call sets up for good is no point's memory
        with contextlib.suppress(UserError):
            measure(model, 1, 8, 1)
    points = []
    for length in grid.lengths:
        for batch in grid.batches:
            say(f"batch {batch}, length {length}")
            points.append(_point(models, batch, length, grid))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "new_tokens": grid.new_tokens,
        "repeats": grid.repeats,
        "models": facts,
        "points": points,
    }


def _facts(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    config = known(model.config)
    total, active = parameter_counts(config) if config else (model.num_parameters(), None)
    return {
        "path": str(folder),
        **identity(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "total_parameters": total,
        "active_parameters": active,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
    }


def _point(
    models: Sequence[PreTrainedModel], batch: int, length: int, grid: Grid
) -> dict[str, Any]:
    """All models at one batch size and length, in turn."""
    runs: list[list[dict[str, float]]] = [[] for _ in models]
    errors: list[str | None] = [None for _ in models]
    for round_ in range(WARMUP + grid.repeats):
        for i, model in enumerate(models):
            if errors[i] is None:
                try:
                    runs[i].append(measure(model, batch, length, grid.new_tokens, round_ == 0))
                except (RuntimeError, MemoryError, UserError) as failure:
                    errors[i] = _reason(failure)
    found = []
    for model, measured, error in zip(models, runs, errors, strict=True):
        if error is not None:
            found.append({"error": error})
            continue
        point: dict[str, Any] = {
            key: statistics.median(run[key] for run in measured[WARMUP:]) for key in SPEEDS
        }
        point |= {key: v for key, v in measured[0].items() if key not in SPEEDS}
        found.append(point | _computed(model, length))
    ratios = [_ratios(runs[0], other) if not (errors[0] or error) else None
              for other, error in zip(runs[1:], errors[1:], strict=True)]  # fmt: skip
    return {"batch": batch, "length": length, "models": found, "ratios": ratios}


def _reason(error: Exception) -> str:
    """What a point says in the place of numbers; re-raises what is a fault of ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    short = isinstance(error, MemoryError) or any(part in str(error) for part in OUT_OF_MEMORY)
    if short:
        return "out of memory"
    if isinstance(error, UserError):
        return text
    raise error


def _ratios(mine: list[dict[str, float]], parents: list[dict[str, float]]) -> dict[str, Any]:
    """First model over another, round by round: median, smallest and largest."""
    found = {}
    for key in SPEEDS:
        rounds = [a[key] / b[key] for a, b in zip(mine, parents, strict=True)][WARMUP:]
        found[key] = [statistics.median(rounds), min(rounds), max(rounds)]
    return found


def _computed(model: PreTrainedModel, length: int) -> dict[str, float | None]:
    config = known(model.config)
    if config is None:
        return {"forward_flops_per_token": None, "computed_cache_bytes_per_token": None}
    return {
        "forward_flops_per_token": flops_per_token(config, length) / BACKWARD,
        "computed_cache_bytes_per_token": cache_bytes(config, length, model.dtype.itemsize)
        / length,
    }


@torch.inference_mode()
def measure(
    model: PreTrainedModel, batch: int, length: int, new_tokens: int, memory: bool = False
) -> dict[str, float]:
    """One prompt read and `new_tokens` written. Times in seconds, speeds over the whole batch.

    With `memory` also the peak beyond what was held before, and the cache after the prompt, in
    bytes per token of a sequence.
    """
    if not getattr(model.config, "causal", True):
        specs = (model.config.mlp_spec(i) for i in range(model.config.num_hidden_layers))
        if "expert_choice" in {getattr(spec, "mode", "") for spec in specs}:
            raise UserError("mlp.mode=expert_choice writes no text: it looks at tokens to come")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    ids = ids.to(model.device)
    kept: dict[str, float] = {}
    with peak_memory(model.device) if memory else contextlib.nullcontext([0.0]) as peak:
        start = time.perf_counter()
        cache, token = _step(model, ids, None)
        first = time.perf_counter() - start
        if memory:
            kept["cache_bytes_per_token"] = held_bytes(cache) / (batch * length)
        start = time.perf_counter()
        for _ in range(new_tokens):
            cache, token = _step(model, token, cache)
        writing = time.perf_counter() - start
    if memory:
        kept["peak_memory_bytes"] = peak[0]
    return {
        "time_to_first_token": first,
        "prefill_tokens_per_second": batch * length / first,
        "decode_tokens_per_second": batch * new_tokens / writing,
        **kept,
    }


def _step(model: PreTrainedModel, ids: Tensor, cache: Any) -> tuple[Any, Tensor]:
    """Cache and likeliest next tokens [B, 1], on the host when it returns."""
    output = model(ids, use_cache=True, logits_to_keep=1, **({CACHE: cache} if cache else {}))
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    token.cpu()
    return output[CACHE], token


def held_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache, ours or transformers'."""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "nbytes", None)
        total += own() if own is not None else layer.keys.nbytes + layer.values.nbytes
    return total


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Any:
    """A list whose entry is, at the end, the most bytes held beyond those at the beginning: of the
    allocator on a GPU, of the process on a CPU.
    """
    found = [0.0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = float(torch.cuda.max_memory_allocated() - before)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of earlier points would hide this one
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is held
    before = _status("VmRSS")
    yield found
    found[0] = float(max(0, _status("VmHWM") - before))


def _status(key: str) -> int:
    """Bytes of the process by the kernel's account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return 0
