"""Model folders and training checkpoints as language models of lm-evaluation-harness.

lm = MoeLM(Path("runs/a/checkpoints/step-500"), batch_size=8)

On several ranks every one of them is given all requests, as one process would be: the harness needs
to know nothing of ranks (lm.rank is 0 on each), and the batches are the same on any number of them.
They are a task's own: what is evaluated beside it changes nothing.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from moe.errors import UserError
from moe.evals.answers import Answers, digest
from moe.evals.fitting import fitting
from moe.evals.perplexity import FORWARD_TOKENS, sizes, windows_of
from moe.evals.rounds import Batch, Rounds
from moe.evals.spread import spread_experts
from moe.hf.loading import load_model, load_tokenizer
from moe.parallel.world import Ranks

AUTO = "auto"
Scored = tuple[Any, list[int], list[int]]  # texts, context and continuation in tokens


def alone() -> Ranks:
    """One process, on the device there is."""
    return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class BatchedLM(HFLM):
    """The harness's own Hugging Face model, a batch at a time and shared out among ranks."""

    rounds: Rounds
    softmax_dtype: torch.dtype | None  # the harness's own, as the next
    logits_cache: bool
    most: int | None  # sequences a batch; None: as many as fit

    def share_out(self, rounds: Rounds, batch_size: int | str) -> None:
        """To be called once, after the harness's own `__init__`."""
        self.rounds = rounds
        if batch_size != AUTO and not (str(batch_size).isdigit() and int(batch_size)):
            raise UserError(f"batch size {batch_size!r} is neither a number from 1 on nor {AUTO}.")
        self.most = None if batch_size == AUTO else int(batch_size)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return self._by_task(requests, super().loglikelihood)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        return self._by_task(requests, self._rolling)

    def sliding_windows(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, int]]:
        """Log-likelihood in nats and number of tokens of each request's (text, window, stride)."""
        return self._by_task(requests, self._sliding)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(requests, self._generated)

    def _by_task(
        self, requests: list[Instance], answer: Callable[[list[Instance], bool], list[Any]]
    ) -> list[Any]:
        places: dict[str | None, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name, []).append(place)
        found: dict[int, Any] = {}
        for task, own in places.items():
            self.label = task or ""
            values = answer([requests[place] for place in own], True)
            found.update(zip(own, values, strict=True))
        return [found[place] for place in range(len(requests))]

    label = ""  # of what is being answered

    def _answer(
        self, batches: Sequence[Batch], compute: Callable[[Batch], list[Any]]
    ) -> dict[int, Any]:
        return self.rounds.answer(batches, compute, self.label, not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest."""
        groups = list(_alike(requests))
        most = override_bs or self._most([len(before) + len(after) for _, before, after in groups])
        batches = []
        for start in range(0, len(groups), most):
            places = [place for own, _, _ in groups[start : start + most] for place in own]
            batches.append(self._scored("likelihood", requests, places))
        found = self._answer(batches, lambda b: self._scores([requests[i] for i in b.places]))
        return [(value, greedy) for value, greedy in (found[i] for i in range(len(requests)))]

    def _scored(self, kind: str, requests: list[Scored], places: Sequence[int]) -> Batch:
        tokens = [requests[place][1:] for place in places]
        return Batch(digest([kind, self.max_length, tokens]), places)

    def _scores(self, requests: list[Scored]) -> list[tuple[float, bool]]:
        """Of one batch, in one forward pass."""
        if not getattr(self.config, "causal", True):
            raise UserError(LOOKS_AHEAD)
        self.batch_size_per_gpu = len(requests)
        return super()._loglikelihood_tokens(requests, True, len(requests))

    def _rolling(self, requests: list[Instance], _: bool) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model takes."""
        length = self.max_length
        texts = [self._cut(request.args[0], length, length) for request in requests]
        lengths = [len(before) + len(after) for text in texts for _, before, after in text]
        found = self._of_windows("likelihood", texts, range(len(lengths)), self._most(lengths))
        return [sum(values) for values in found]

    def _sliding(self, requests: list[Instance], _: bool) -> list[tuple[float, int]]:
        """In windows that overlap, the longest first, in float32 whatever the model's dtype."""
        texts = []
        for text, window, stride in (request.args for request in requests):
            texts.append(self._cut(text, *sizes(self.max_length, window, stride)))
        lengths = [len(before) + len(after) for text in texts for _, before, after in text]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        most = self._most(lengths)
        if most == self.most:  # a number that was named knows nothing of lengths
            most = min(most, max(1, most * FORWARD_TOKENS // max(lengths, default=1)))
        with self._exactly():
            found = self._of_windows("sliding", texts, order, most)
        counts = [sum(len(after) for _, _, after in text) for text in texts]
        return [(math.fsum(values), n) for values, n in zip(found, counts, strict=True)]

    def _cut(self, text: str, window: int, stride: int) -> list[Scored]:
        tokens = self.tok_encode(text)
        return [(None, *w) for w in windows_of(tokens, self.prefix_token_id, window, stride)]

    def _of_windows(
        self, kind: str, texts: list[list[Scored]], order: Sequence[int], most: int
    ) -> list[list[float]]:
        """Of every text, the log-likelihoods of its windows; `order` is that of all in batches."""
        windows = [window for text in texts for window in text]
        batches = [
            self._scored(kind, windows, order[start : start + most])
            for start in range(0, len(order), most)
        ]
        found = self._answer(batches, lambda b: self._scores([windows[i] for i in b.places]))
        values = iter(found[place][0] for place in range(len(windows)))
        return [[next(values) for _ in text] for text in texts]

    @contextlib.contextmanager
    def _exactly(self) -> Iterator[None]:
        """Likelihoods in float32, and each window's own: of windows that differ only in where their
        prediction begins, the harness would read all at the places of the longest.
        """
        before = self.softmax_dtype, self.logits_cache
        self.softmax_dtype, self.logits_cache = torch.float32, False
        try:
            yield
        finally:
            self.softmax_dtype, self.logits_cache = before

    def _generated(self, requests: list[Instance], _: bool) -> list[str]:
        """What the model says to each context."""
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        batches: list[Batch] = []
        for options, places in alike.items():
            lengths = {i: len(self.tok_encode(requests[i].args[0])) for i in places}
            places.sort(key=lambda i: (-lengths[i], requests[i].args[0]))
            most = self._most([max(lengths.values()) + self._new_tokens(options)])
            for start in range(0, len(places), most):
                own = places[start : start + most]
                contexts = [requests[i].args[0] for i in own]
                # what is drawn for the same context a second time is to be something else
                number = len(batches) if json.loads(options).get("do_sample") else None
                key = digest(["generated", self.max_length, options, contexts, number])
                batches.append(Batch(key, own))
        say = super().generate_until

        def compute(batch: Batch) -> list[str]:
            torch.manual_seed(int(batch.key[:15], 16))  # on whichever rank it is drawn
            self.batch_size_per_gpu = len(batch.places)
            return say([requests[i] for i in batch.places], True)

        found = self._answer(batches, compute)
        return [found[place] for place in range(len(requests))]

    def _new_tokens(self, options: str) -> int:
        kwargs = normalize_gen_kwargs(json.loads(options), self.max_gen_toks)
        return int(kwargs["max_gen_toks"])

    def _model_generate(self, *given: Any, **more: Any) -> torch.Tensor:
        # with experts among ranks, all go on until the last of them has said everything
        return super()._model_generate(*given, synced_gpus=self.rounds.together, **more)

    def _most(self, lengths: Sequence[int]) -> int:
        """Sequences a batch, where the longest of them has so many tokens."""
        if self.most is not None:
            return self.most
        longest = min(self.max_length, max(lengths, default=1))
        key = digest(["batch size", longest])
        before = self.rounds.known([key])  # free memory may be another now, and batches as well
        if key in before:
            return int(before[key][0])
        most = min(self.rounds.ranks.gather(fitting(self.config, longest, self.device)))
        self.rounds.keep(key, [most])
        return most


LOOKS_AHEAD = (
    "this model is not causal while it scores a text (mlp.mode expert_choice or sequence): its "
    "likelihoods mean nothing. Use token_choice or threshold."
)


def _alike(requests: Sequence[Scored]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Places of the requests that one sequence answers, and its context and continuation, longest
    first: continuations that differ in their last token alone are read off the same logits.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (_, before, after) in enumerate(requests):
        groups.setdefault((*before, *after[:-1]), []).append(place)

    def rank(places: list[int]) -> tuple[int, list[int]]:
        _, before, after = requests[max(places, key=lambda i: len(requests[i][2]))]
        return -len(before) - len(after), before + after

    for places in sorted(groups.values(), key=rank):
        _, before, after = requests[max(places, key=lambda i: len(requests[i][2]))]
        yield places, before, after


class MoeLM(BatchedLM):
    """A model folder or checkpoint, whole on every rank or its experts divided among them."""

    def __init__(
        self,
        folder: Path,
        batch_size: int | str = 8,
        max_length: int | None = None,
        *,
        ranks: Ranks | None = None,
        answers: Answers | None = None,
        expert: int = 1,
    ) -> None:
        ranks = ranks or alone()
        model: Any = load_model(folder)
        if expert > 1:
            spread_experts(model, expert, ranks)
        super().__init__(
            pretrained=model.to(ranks.device),
            tokenizer=load_tokenizer(folder),
            backend="causal",  # RoutedLlama is not in transformers' own table
            max_length=max_length,
        )
        self.share_out(Rounds(ranks, answers, together=expert > 1), batch_size)
