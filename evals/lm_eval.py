"""The harness's own command line, with our models in it:

python -m moe.evals.lm_eval run --model moe --model_args pretrained=DIR --tasks hellaswag
torchrun --nproc-per-node 4 -m moe.evals.lm_eval run --model moe --model_args pretrained=DIR …

`pretrained` is a model folder or a step-N checkpoint of any engine. Further model_args:
tuning=FILE, scale=X, cache=DIR, expert=N, max_length=N.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any, ClassVar

from lm_eval import evaluator, utils
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

from moe.errors import MoeError, UserError, raise_all
from moe.evals.adapter import MoeLM
from moe.evals.answers import Answers
from moe.evals.run import ROOT, How, depends_on, unknown
from moe.parallel.world import Ranks, end, say_once, world
from moe.tune.intervene import tuned
from moe.tune.tuning import read_for

MISSING = "Tasks not found: "  # what the harness says of tasks that there are not


@register_model("moe")
class CommandLineLM(MoeLM):
    """A model made of the command line's words, on the ranks that there are."""

    ranks: ClassVar[Ranks]

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: Any = None,
        tuning: str | None = None,
        scale: Any = None,
        cache: str | None = None,
        expert: Any = 1,
        **unknown: Any,
    ) -> None:
        folder = Path(pretrained)
        # the harness adds some that are off, whoever asked for them
        strange = [f"{k}={v}" for k, v in unknown.items() if v]
        problems = [f"model_args {s}: --model moe has none of that name." for s in strange]
        if not pretrained:
            problems.append("--model moe needs a folder: --model_args pretrained=DIR.")
        if isinstance(expert, bool) or not isinstance(expert, int) or expert < 1:
            problems.append(f"model_args expert={expert} is not a number of ranks, from 1 on.")
        if not (max_length is None or (isinstance(max_length, int) and max_length > 0)):
            problems.append(f"model_args max_length={max_length} is not a number of tokens.")
        if not (scale is None or isinstance(scale, int | float)):
            problems.append(f"model_args scale={scale} is not a number.")
        raise_all(problems)
        change = read_for(Path(tuning), folder, scale, False) if tuning else None
        how = How(batch_size=batch_size or 1, ranks=self.ranks, expert=expert)
        answers = None
        if cache is not None and self.ranks.rank == 0:
            answers = Answers(Path(cache), depends_on(folder, how, change))
        super().__init__(
            folder, how.batch_size, max_length,
            ranks=self.ranks, answers=answers, expert=how.expert,
        )  # fmt: skip
        self.edits = contextlib.ExitStack()  # for as long as the model lives
        self.edits.enter_context(tuned(self.model, change))


def run() -> None:
    """Hand over to the harness."""
    utils.setup_logging()
    with world() as ranks:
        say_once(ranks, _run, ranks)


def _run(ranks: Ranks) -> None:
    CommandLineLM.ranks = ranks
    line = HarnessCLI()
    arguments = line.parse_args()
    if arguments.command != "run":
        line.execute(arguments)
        return
    chosen = check(arguments)
    try:
        line.execute(arguments)
    except ValueError as error:
        if str(error).startswith(MISSING):
            raise UserError(_unknown(str(error).removeprefix(MISSING), chosen)) from error
        raise
    except OSError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"a data set or file of {chosen.tasks} could not be read ({reason}). Run it once where "
            f"there is a network, or use tasks on local files: --include_path {ROOT / 'tasks'} "
            "--metadata data=DIR --tasks local_…."
        ) from error
    ranks.barrier()  # a launcher ends all ranks as soon as one has ended


def check(arguments: argparse.Namespace) -> EvaluatorConfig:
    """What the command line and its --config come to. Raises UserError where they fit no run, and
    for caches that hold pickles, and that ranks would not read alike.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the harness will print it
            chosen = EvaluatorConfig.from_cli(arguments)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    requests: Any = chosen.cache_requests
    for name, value in {"use_cache": chosen.use_cache, "cache_requests": requests}.items():
        if any(value.values()) if isinstance(value, dict) else value:
            raise UserError(
                f"{name}: the harness's own caches hold pickles. Use --model_args "
                "pretrained=DIR,cache=DIR, which keeps answers by the model that gave them."
            )
    return chosen


def _unknown(names: str, chosen: EvaluatorConfig) -> str:
    known = TaskManager(include_path=chosen.include_path).all_tasks
    return "\n".join(unknown(name.strip(), known) for name in names.split(","))


def call() -> None:
    """Run the command; end our own errors in one line and SystemExit of their exit code."""
    evaluator.get_git_commit_hash = lambda: None
    try:
        run()
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
