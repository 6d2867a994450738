"""The harness's own command line, with our models in it:

python -m moe.evals.lm_eval run --model moe --model_args pretrained=DIR --tasks hellaswag
torchrun --nproc-per-node 4 -m moe.evals.lm_eval run --model moe --model_args pretrained=DIR …

`pretrained` is a model folder or a step-N checkpoint of any engine. Further model_args:
tuning=FILE, scale=X, cache=DIR, expert=N, max_length=N.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, ClassVar

from lm_eval import evaluator, utils
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model

from moe.errors import MoeError, UserError, raise_all
from moe.evals.adapter import MoeLM
from moe.evals.answers import Answers
from moe.evals.run import How, depends_on
from moe.parallel.world import Ranks, end, say_once, world
from moe.tune.intervene import tuned
from moe.tune.tuning import read_for

PICKLES = ("--use_cache", "-c", "--cache_requests")


@register_model("moe")
class CommandLineLM(MoeLM):
    """A model made of the command line's words, on the ranks that there are."""

    ranks: ClassVar[Ranks]

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        tuning: str | None = None,
        scale: float | None = None,
        cache: str | None = None,
        expert: int = 1,
        **unknown: Any,
    ) -> None:
        folder = Path(pretrained)
        # the harness adds some that are off, whoever asked for them
        strange = [f"{k}={v}" for k, v in unknown.items() if v]
        raise_all([f"model_args {s}: --model moe has none of that name." for s in strange])
        change = read_for(Path(tuning), folder, scale, False) if tuning else None
        how = How(batch_size=batch_size or 1, ranks=self.ranks, expert=int(expert))
        answers = None
        if cache is not None and self.ranks.rank == 0:
            answers = Answers(Path(cache), depends_on(folder, how, change))
        super().__init__(
            folder, how.batch_size, max_length,
            ranks=self.ranks, answers=answers, expert=how.expert,
        )  # fmt: skip
        self.edits = contextlib.ExitStack()  # for as long as the model lives
        self.edits.enter_context(tuned(self.model, change))


def check(arguments: list[str]) -> None:
    """Raise UserError for caches that hold pickles, and that ranks would not read alike."""
    for word in arguments:
        if word.split("=")[0] in PICKLES:
            raise UserError(
                f"{word}: the harness's own caches hold pickles. Use --model_args "
                "pretrained=DIR,cache=DIR, which keeps answers by the model that gave them."
            )


def run(arguments: list[str]) -> None:
    """Hand over to the harness."""
    check(arguments)
    utils.setup_logging()
    with world() as ranks:
        say_once(ranks, _run, ranks)


def _run(ranks: Ranks) -> None:
    CommandLineLM.ranks = ranks
    line = HarnessCLI()
    line.execute(line.parse_args())
    ranks.barrier()  # a launcher ends all ranks as soon as one has ended


def call() -> None:
    """Run the command; end our own errors in one line and SystemExit of their exit code."""
    evaluator.get_git_commit_hash = lambda: None
    try:
        run(sys.argv[1:])
    except MoeError as error:
        if str(error):
            print(f"{error.label}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def main() -> None:
    """Run the command, and end this process with its exit code."""
    try:
        call()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # argparse's own way to say something
            print(stop.code, file=sys.stderr)
        end(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    end(0)


if __name__ == "__main__":
    main()
