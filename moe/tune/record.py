"""What every router does for every prompt: counts and gate mass, from one forward pass a batch.

    trace = record(subject, prompts, encoded, Recording(tokens="prompt"), partial, labels)

Batches are kept in a folder beside the trace, so a run that was stopped goes on. B prompts, S
tokens each, T = B·S, E experts, K chosen, C experts of all sites in a row.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from moe.errors import Corrupt, UserError
from moe.progress import Progress
from moe.tune.families import Site, columns
from moe.tune.generation import Sampling, pad, respond, stops
from moe.tune.intervene import tuned, watching
from moe.tune.prompts import Encoded, Prompt, chunks, places
from moe.tune.subject import Subject
from moe.tune.trace import Trace

Tokens = Literal["prompt", "last", "generated", "all"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)
SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Which tokens are watched, and how responses come about (None: none is generated)."""

    tokens: Tokens = "prompt"
    sampling: Sampling | None = None
    batch_size: int = 8


class Meter:
    """Adds up what routers do for the watched tokens of a batch, on the device."""

    def __init__(self, found: list[Site], device: torch.device) -> None:
        self.sites, self.starts, self.device = found, columns(found), device
        self.base_T1: Tensor | None = None  # where each token's row begins; None: not looking

    def begin(self, watch_BS: Tensor) -> None:
        """Look at the next forward pass: at the tokens of `watch_BS` (bool) and no others."""
        rows, width = len(watch_BS), self.starts[-1]
        row_B1 = torch.arange(rows, device=watch_BS.device)[:, None]
        # what is not watched adds to a row of its own, so nothing has to be masked layer by layer
        row_BS = torch.where(watch_BS, row_B1, rows)
        self.base_T1 = row_BS.reshape(-1, 1) * width
        self.counts_N = torch.zeros((rows + 1) * width, device=self.device, dtype=torch.int32)
        self.mass_N = torch.zeros((rows + 1) * width, device=self.device, dtype=torch.float64)
        self.calls = [0] * len(self.sites)

    def see(self, number: int, indices: Tensor, weights: Tensor, chosen: Tensor | None) -> None:
        """One router's choice [T, K] (`intervene.watching`)."""
        if self.base_T1 is None:
            return
        if len(indices) != len(self.base_T1):
            raise UserError(
                f"{self.sites[number].name}: its router saw {len(indices)} tokens of "
                f"{len(self.base_T1)}, so they cannot be told apart by prompt."
            )
        self.calls[number] += 1
        place_N = (self.base_T1 + indices.to(self.device)).flatten()
        if chosen is None:
            one_N = self.counts_N.new_ones(1).expand_as(place_N)
        else:
            one_N = chosen.to(self.counts_N).flatten()
        start = self.starts[number]
        self.counts_N[start:].scatter_add_(0, place_N, one_N)
        self.mass_N[start:].scatter_add_(0, place_N, weights.to(self.mass_N).flatten())

    def end(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and mass [B, C]. Raises UserError where a router did not run just once."""
        self.base_T1 = None
        wrong = [(s.name, n) for s, n in zip(self.sites, self.calls, strict=True) if n != 1]
        if wrong:
            name, times = wrong[0]
            raise UserError(
                f"{len(wrong)} of {len(self.sites)} routers did not run once in a forward pass "
                f"({name}: {times} times): something else computes their layers."
            )
        width = self.starts[-1]
        counts_BC, mass_BC = (
            t.view(-1, width)[:-1].cpu().numpy() for t in (self.counts_N, self.mass_N)
        )
        return counts_BC.astype(np.uint32), mass_BC.astype(np.float32)


class Batch(NamedTuple):
    """What a batch left: of which prompts (numbers), and what was seen."""

    numbers: np.ndarray  # int64 [B]
    counts: np.ndarray  # uint32 [B, C]
    mass: np.ndarray  # float32 [B, C]
    tokens: np.ndarray  # uint32 [B]
    responses: list[str | None]


@dataclass
class Partial:
    """The folder of a recording under way. `write` is atomic, and `read` finds all of it."""

    folder: Path
    settings: dict[str, Any]
    batches: list[Batch] = field(default_factory=list)

    def read(self) -> set[int]:
        """Numbers of the prompts that are done.

        Raises UserError where the folder is of other settings, Corrupt where it is damaged.
        """
        found = sorted(self.folder.glob("batch-*.npz"))
        if not found and not (self.folder / SETTINGS).exists():
            return set()
        try:
            there = json.loads((self.folder / SETTINGS).read_text())
            self._check_same(there)
            self.batches = [_read_batch(path) for path in found]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError,
                zipfile.BadZipFile) as error:  # fmt: skip
            if isinstance(error, UserError):
                raise
            raise Corrupt(
                f"{self.folder} cannot be read ({error}). Remove it, and record from the start."
            ) from error
        return {int(n) for batch in self.batches for n in batch.numbers}

    def add(self, batch: Batch) -> None:
        if not self.batches:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.settings, indent=1) + "\n"
            _publish(self.folder / SETTINGS, text.encode())
        path = self.folder / f"batch-{len(self.batches):05}.npz"
        beside = path.with_suffix(".new")
        arrays: Any = batch._asdict()
        arrays["responses"] = np.frombuffer(json.dumps(batch.responses).encode(), np.uint8)
        with beside.open("wb") as file:
            np.savez(file, **arrays)
        beside.replace(path)
        self.batches.append(batch)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _check_same(self, there: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        differ = [k for k in sorted(now.keys() | there.keys()) if now.get(k) != there.get(k)]
        if differ:
            said = "; ".join(
                f"{k} was {_say(there.get(k))}, now {_say(now.get(k))}" for k in differ
            )
            raise UserError(
                f"{self.folder} holds a recording with other settings ({said}). Give the same "
                "again, choose another --out, or remove the folder."
            )


def _say(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _publish(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def _read_batch(path: Path) -> Batch:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in Batch._fields}
    arrays["responses"] = json.loads(arrays["responses"].tobytes())
    return Batch(**arrays)


def check_tokens(tokens: Tokens, causal: bool) -> None:
    """Raise UserError where what follows a token changes what its router does."""
    if tokens in ("generated", "all") and not causal:
        raise UserError(
            f"--tokens {tokens}: this model is not causal (mlp.mode expert_choice or sequence), so "
            "routing in a whole text is not what it was while that was written. Use prompt or last."
        )


def record(
    subject: Subject, prompts: Sequence[Prompt], encoded: Sequence[Encoded], recording: Recording,
    partial: Partial, quiet: bool = False,
) -> Trace:  # fmt: skip
    """A trace with all rows in their order, labels left open; `partial` is there to be removed."""
    check_tokens(recording.tokens, getattr(subject.model.config, "causal", True))
    done = partial.read()
    # long ones first, so that a batch has little padding and what does not fit shows at once
    left = [n for n in range(len(prompts)) if n not in done]
    left.sort(key=lambda n: -len(encoded[n].prompt))
    names = places(prompts)
    meter = Meter(subject.sites, subject.device)
    with (
        tuned(subject.model, subject.tuning, subject.scale),
        watching(subject.model, subject.sites, meter.see),
        Progress("record", total=len(left), unit="prompts", quiet=quiet or not left) as progress,
    ):
        for numbers in chunks(left, recording.batch_size):
            answered, texts = _answered(subject, prompts, encoded, names, numbers, recording)
            counts, mass, tokens = observe(subject.model, meter, answered, recording.tokens)
            partial.add(Batch(np.array(numbers), counts, mass, tokens, texts))
            progress.advance(len(numbers))
    return _put_together(subject, prompts, partial)


def _answered(
    subject: Subject, prompts: Sequence[Prompt], encoded: Sequence[Encoded], names: Sequence[str],
    numbers: Sequence[int], recording: Recording,
) -> tuple[list[Encoded], list[str | None]]:  # fmt: skip
    """The batch's prompts with their responses, generated where there are none, and their texts."""
    batch = [encoded[n] for n in numbers]
    texts = [prompts[n].response for n in numbers]
    open_ = [i for i, entry in enumerate(batch) if entry.response is None]
    if recording.sampling is None or not open_:
        return batch, texts
    ends = stops(subject.model, subject.tokenizer)
    responses = respond(
        subject.model, [batch[i].prompt for i in open_], recording.sampling,
        [names[numbers[i]] for i in open_], ends,
    )  # fmt: skip
    for i, ids in zip(open_, responses, strict=True):
        batch[i] = Encoded(batch[i].prompt, ids)
        texts[i] = subject.tokenizer.decode(ids, skip_special_tokens=True)
    return batch, texts


@torch.no_grad()
def observe(
    model: Any, meter: Meter, batch: Sequence[Encoded], tokens: Tokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts [B, C], mass [B, C] and watched tokens [B] of one forward pass, without logits.

    The model is being watched (`intervene.watching`) with the meter's `see`.
    """
    rows = [entry.prompt for entry in batch]
    if tokens in ("generated", "all"):
        rows = [[*entry.prompt, *(entry.response or ())] for entry in batch]
    given = pad(rows, model.device)
    watch_BS = watched(given["attention_mask"], batch, tokens)
    meter.begin(watch_BS)
    model.get_decoder()(**given, use_cache=False)
    counts, mass = meter.end()
    return counts, mass, watch_BS.sum(1).cpu().numpy().astype(np.uint32)


def watched(mask_BS: Tensor, batch: Sequence[Encoded], tokens: Tokens) -> Tensor:
    """Which tokens count: bool [B, S], padding on the left never."""
    length = mask_BS.shape[1]
    if tokens == "last":
        last_S = torch.arange(length, device=mask_BS.device) == length - 1
        return mask_BS.bool() & last_S
    if tokens != "generated":
        return mask_BS.bool()
    sizes = [len(entry.response or ()) for entry in batch]
    size_B1 = torch.tensor(sizes, device=mask_BS.device)[:, None]
    return torch.arange(length, device=mask_BS.device) >= length - size_B1


def _put_together(subject: Subject, prompts: Sequence[Prompt], partial: Partial) -> Trace:
    """The batches' rows in the order of the prompts."""
    numbers = np.concatenate([batch.numbers for batch in partial.batches])
    order = np.argsort(numbers)
    if not np.array_equal(numbers[order], np.arange(len(prompts))):
        raise Corrupt(f"{partial.folder} does not hold every prompt once. Remove it, and record "
                      "from the start.")  # fmt: skip
    responses = [text for batch in partial.batches for text in batch.responses]
    rows = [
        {"id": p.id, "prompt": p.text, "label": None, "response": responses[i]}
        for p, i in zip(prompts, order, strict=True)
    ]
    arrays: Any = {
        name: np.concatenate([getattr(batch, name) for batch in partial.batches])[order]
        for name in ("counts", "mass", "tokens")
    }
    return Trace(sites=subject.sites, rows=rows, settings=dict(partial.settings), **arrays)


def settings_of(
    subject: Subject, prompts_hash: str, recording: Recording, chat: bool, tuning_hash: str | None
) -> dict[str, Any]:
    """What a trace says of how it was made; a recording goes on where all of it is the same."""
    from moe.tune.families import model_type
    from moe.upcycle.receipt import versions

    sampling = None if recording.sampling is None else asdict(recording.sampling)
    return {
        "model": subject.identity,
        "family": model_type(subject.model),
        "tokens": recording.tokens,
        "generation": sampling,
        "seed": recording.sampling.seed if recording.sampling else None,
        "chat": chat,
        "batch_size": recording.batch_size,
        "prompts": prompts_hash,
        "tuning": tuning_hash,
        "scale": subject.scale if tuning_hash else None,
        "versions": versions(),
    }
