"""Batches of requests among ranks, in rounds: the same answers on any number of them.

rounds = Rounds(ranks, answers)
found = rounds.answer(batches, compute)        # place of a request -> its answer, on every rank

What stands beside a request in its batch, and how far all are padded, shows in the last bits of its
answer. So batches are made up of all requests, as one process would, and only then shared out; and
a batch is answered whole or not at all, where an evaluation goes on that was killed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe.evals.answers import Answers
from moe.parallel.world import Ranks
from moe.progress import Progress


class Stopped(Exception):
    """All ranks have been asked to leave an evaluation."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that one forward pass answers, by their places; `key` says all that decides how."""

    key: str
    places: Sequence[int]


Compute = Callable[[Batch], list[Any]]  # one answer a place, each of them plain JSON


class Rounds:
    """Who answers what. `together`: a forward pass takes all ranks, so those with nothing left take
    part in another's. `stopped` is asked before every round, on all ranks.
    """

    def __init__(
        self,
        ranks: Ranks,
        answers: Answers | None = None,
        *,
        together: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ranks, self.answers = ranks, answers  # rank 0's alone are read and written
        self.together, self.stopped = together, stopped

    def answer(
        self, batches: Sequence[Batch], compute: Compute, label: str = "", quiet: bool = True
    ) -> dict[int, Any]:
        """The answer to every request of the batches. Raises Stopped."""
        known = self.known([batch.key for batch in batches])
        waiting = list({b.key: b for b in batches if b.key not in known}.values())
        size, own = self.ranks.data_size, self.ranks.data_rank
        quiet = quiet or self.ranks.rank > 0 or not waiting
        with Progress(label, len(waiting), "batches", quiet) as progress:
            for first in range(0, len(waiting), size):
                if self.stopped():
                    raise Stopped
                turn = waiting[first : first + size]
                found = None
                if own < len(turn):
                    found = turn[own].key, compute(turn[own])
                elif self.together:
                    compute(turn[0])
                self._share(found, known)
                progress.advance(len(turn))
        return {
            place: value
            for batch in batches
            for place, value in zip(batch.places, known[batch.key], strict=True)
        }

    def known(self, keys: Sequence[str]) -> dict[str, list[Any]]:
        """What has been answered before."""
        held = self.answers.get(keys) if self.answers is not None else {}
        return self.ranks.gather(held)[0]

    def keep(self, key: str, values: list[Any]) -> None:
        """Something else to know again."""
        if self.answers is not None:
            self.answers.put({key: values})

    def _share(self, mine: tuple[str, list[Any]] | None, known: dict[str, list[Any]]) -> None:
        new = dict(pair for pair in self.ranks.gather(mine) if pair is not None)
        if self.answers is not None:
            self.answers.put(new)
        known.update(new)
