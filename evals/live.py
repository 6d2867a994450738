"""Tasks on a model that is being trained: all ranks in step, through whatever holds its weights.

suite = Suite("smoke", data, config, tokenizer, "model=DIR")     # refuses what cannot be answered
found = suite.measure(forward, config, ranks, tokens=4096, stopped=asked)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.errors import UserError, raise_all
from moe.evals.adapter import BatchedLM
from moe.evals.fitting import MOST
from moe.evals.harness import Prompting, answers_of, ask, check, load
from moe.evals.measures import measure, rows
from moe.evals.perplexity import domain_tasks
from moe.evals.rounds import Rounds, Stopped
from moe.evals.run import find_tasks
from moe.evals.suites import read
from moe.parallel.world import Ranks

Forward = Callable[..., Any]  # input_ids= to an output with logits [B, T, V]; all ranks call it


class Suite:
    """A suite of tasks, loaded once; `name` is what the model is called in a refusal."""

    def __init__(
        self, chosen: str, data: Path | None, config: Any, tokenizer: Any, name: str
    ) -> None:
        self.tokenizer = tokenizer
        suite = read(chosen, data)
        self.limit = suite.limit
        with domain_tasks(suite.tasks, data, divide=False) as (tasks, folders):
            given = tasks, suite.include, data, folders, suite, suite.windows
            self.loaded = load(tasks, find_tasks(*given))
        answers = answers_of(self.loaded, suite.limit)
        check(self.loaded, config, tokenizer, Prompting(), name, answers)
        raise_all(
            [
                f"task {task} draws its answers: a model in training is asked for the likeliest."
                for task, held in self.loaded["tasks"].items()
                if held.OUTPUT_TYPE == "generate_until"
                and (held.config.generation_kwargs or {}).get("do_sample")
            ]
        )

    def measure(
        self,
        forward: Forward,
        config: Any,
        ranks: Ranks,
        tokens: int,
        stopped: Callable[[], bool],
    ) -> dict[str, dict[str, Any]] | None:
        """{"task/metric": {"value", "error", "interval"}}, all errors on the first rank alone, and
        `why` where the value is no number but null; None where all ranks are asked to leave, which
        `stopped` says before each forward pass.

        A forward pass has at most `tokens`, unless a single prompt has more. Python's, numpy's and
        torch's random state are other ones afterwards.
        """
        lm = LiveLM(forward, config, self.tokenizer, ranks, tokens, stopped)
        try:
            found = measure([ask(lm, self.loaded, self.limit, Prompting())], self.loaded["groups"])
        except Stopped:
            return None
        return {
            f"{row['task']}/{row['metric']}": {
                "value": row["values"][0],
                "error": row["errors"][0],
                "interval": row["intervals"][0],
                **({"why": row["why"][0]} if row["why"][0] else {}),
            }
            for row in rows(found)
        }


class Live:
    """What the harness wants to see of a model."""

    name_or_path = ""

    def __init__(self, forward: Forward, config: Any, device: torch.device) -> None:
        self.forward, self.config, self.device = forward, config, device

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V], whole where a tensor axis has a part of the vocabulary on each rank."""
        logits: Tensor = self.forward(input_ids=input_ids).logits
        return logits.full_tensor() if isinstance(logits, DTensor) else logits


class LiveLM(BatchedLM):
    """A model behind a forward function. It decodes without a cache, for engines have none."""

    def __init__(
        self,
        forward: Forward,
        config: Any,
        tokenizer: Any,
        ranks: Ranks,
        tokens: int,
        stopped: Callable[[], bool],
    ) -> None:
        if not config.causal:
            raise UserError(
                "eval.suite needs a causal model: experts that choose among all tokens of a text "
                "(mlp.mode expert_choice or sequence) know what follows. Remove eval.suite."
            )
        live: Any = Live(forward, config, ranks.device)
        super().__init__(pretrained=live, tokenizer=tokenizer, backend="causal")
        self.tokens = tokens
        self.share_out(Rounds(ranks, together=True, stopped=stopped), MOST)

    def _most(self, lengths: Any) -> int:
        """A memory that training fits into is to do."""
        longest = min(self.max_length, max(lengths, default=1))
        return min(MOST, max(1, self.tokens // longest))

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.model(inps)

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The likeliest continuation of contexts [B, T] padded on the left, all ranks until the
        last of them has done. What follows its end in a row means nothing.
        """
        assert attention_mask is not None
        ranks, rows = self.rounds.ranks, torch.arange(len(context), device=context.device)
        padding_B = (attention_mask == 0).sum(1)
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context))
        ends = torch.tensor(self._ends(), device=context.device)
        ended_B = torch.zeros_like(rows, dtype=torch.bool)
        going = context.shape[1] < max_length
        while ranks.any(going):
            if self.rounds.stopped():
                raise Stopped
            width = context.shape[1]
            # padding on the right instead, where causal models do not see it
            places = torch.arange(width, device=context.device) + padding_B[:, None]
            given = context.gather(1, places.clamp(max=width - 1))
            logits_BV = self.model(given)[rows, width - padding_B - 1]
            if not going:
                continue
            chosen_B = logits_BV.argmax(-1).masked_fill(ended_B, self.tokenizer.pad_token_id)
            context = torch.cat([context, chosen_B[:, None]], 1)
            ended_B |= torch.isin(chosen_B, ends)
            done = bool(ended_B.all()) or any(criterion(context, None) for criterion in stops)
            going = not done and context.shape[1] < max_length
        return context

    def _ends(self) -> list[int]:
        given = self.config.eos_token_id
        ends = given if isinstance(given, list) else [given]
        return [e for e in {*ends, self.tokenizer.eos_token_id} if e is not None]
