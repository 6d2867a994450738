"""The harness's tasks: loaded once, checked against the model before anything runs, and asked.

loaded = load(["local_piqa"], manager)
check(loaded, config, tokenizer, prompting, "model", answers_of(loaded, limit=100))
results = ask(lm, loaded, limit=100, prompting=prompting)
"""

import itertools
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval import evaluator
from lm_eval.api import metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import normalize_gen_kwargs

from moe.errors import UserError, problem, raise_all
from moe.evals import perplexity
from moe.evals.adapter import BatchedLM
from moe.evals.suites import Tasks

# the harness asks git for the revision of the folder we stand in, which says "fatal" in any other
evaluator.get_git_commit_hash = lambda: None
Answers = list[tuple[int, str]]  # with the number of the item
BOOTSTRAP = 1000  # draws, for metrics whose error has no formula
NAMED = re.compile(r"[Dd]ataset '([\w.-]+/?[\w.-]*)'|reach '([\w.-]+/?[\w.-]*)'")


@dataclass(frozen=True, slots=True)
class Prompting:
    """How requests become prompts: as they are, or as messages of a chat."""

    chat: bool = False
    multiturn: bool = True  # few-shot examples as turns of the chat, not in one message
    system: str | None = None  # what the system says


def load(names: Sequence[str], manager: Tasks) -> Any:
    """The tasks, with their data and the suite's shots, as the harness holds them.

    Raises UserError with every task whose data is not there, and what to put where.
    """
    built: list[Any] = []
    problems = []
    for name in names:
        try:
            found = _loaded(name, manager)
        except UserError as error:
            problems += str(error).split("\n")
            continue
        if manager.suite is not None:
            for task in found["tasks"].values():
                task.set_config(key="num_fewshot", value=manager.suite.shots[name])
        inside = {child for children in found["group_map"].values() for child in children}
        whole = {**found["tasks"], **found["groups"]}
        built += [value for key, value in whole.items() if key not in inside]
    raise_all(problems)
    try:
        loaded = manager.load(built)
    except ValueError as error:  # of tasks that are there twice
        raise UserError(f"{', '.join(names)}: {_first_line(error)}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        _never_overflow(task)
    return loaded


def _loaded(name: str, manager: Tasks) -> Any:
    """What a name stands for: a task, a group with its tasks in it, or the tasks of a tag."""
    try:
        return manager.load([name])
    except UserError:
        raise
    except TemplateError as error:
        raise UserError(f"a template of {name} fails: {error}.") from error
    except (LookupError, TypeError) as error:  # of the first item, that the harness looks at
        raise UserError(
            f"{name} cannot be loaded: its first item has an empty answer, or lacks what its "
            f"templates name ({type(error).__name__}: {_first_line(error)}). Mend its data."
        ) from error
    except ValueError as error:  # of files that make no task
        raise UserError(f"{name} cannot be loaded: {_first_line(error)}") from error
    except OSError as error:
        raise UserError(_offline(error, name, manager)) from error


def _never_overflow(task: Any) -> None:
    """One word that is too unlikely for a float would end an evaluation after all its work."""
    for metric, aggregate in getattr(task, "_aggregation_list", {}).items():
        if aggregate in (metrics.perplexity, metrics.weighted_perplexity):
            task._aggregation_list[metric] = partial(_bounded, aggregate)


def _bounded(aggregate: Callable[[Any], float], items: Any) -> float:
    try:
        return aggregate(items)
    except OverflowError:
        return sys.float_info.max


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _offline(error: Exception, name: str, manager: Tasks) -> str:
    """Which data set is missing, and what to put where."""
    reason = _first_line(error)
    instead = manager.suite.stand_ins(name) if manager.suite is not None else []
    said = f"the data set of {name} could not be fetched ({reason}). Without a network "
    said += "".join(f"put {files} into the folder of --data; or " for files in instead)
    named = NAMED.search(reason)
    if named is None:
        return said + "use tasks that read local files: local_… with --data, or --include-path."
    *owner, last = (named[1] or named[2]).split("/")
    folder = "___".join([*owner, datasets.naming.camelcase_to_snakecase(last)])
    return said + (
        f"run the same command once where there is one, and copy {folder} from its "
        f"~/.cache/huggingface/datasets into {datasets.config.HF_DATASETS_CACHE}; or use tasks "
        "that read local files: local_… with --data, or --include-path."
    )


def check(
    loaded: Any,
    config: Any,
    tokenizer: Any,
    prompting: Prompting,
    name: str,
    answers: dict[str, Answers],
) -> None:
    """Raise UserError with all that the model cannot answer, before it is asked anything."""
    tasks = loaded["tasks"]
    problems = problem(_check_chat, tokenizer, prompting, name)
    if not getattr(config, "causal", True):
        scored = [n for n, t in tasks.items() if t.OUTPUT_TYPE != "generate_until"]
        if scored:
            problems.append(
                f"{', '.join(scored)} score texts, and {name} is not causal while it scores one "
                "(mlp.mode expert_choice or sequence): its likelihoods mean nothing. Use "
                "token_choice or threshold."
            )
    positions = getattr(config, "max_position_embeddings", None)
    for task in tasks.values() if positions is not None else ():
        if task.OUTPUT_TYPE == perplexity.REQUEST:
            problems += problem(perplexity.sizes, positions, *task.windows)
    for title, task in tasks.items():
        own = answers.get(title, [])
        problems += problem(_check_lengths, title, task, own, name, positions, tokenizer)
    said = [n for n, t in tasks.items() if t.OUTPUT_TYPE == "generate_until"]
    layers = range(config.num_hidden_layers) if hasattr(config, "mlp_spec") else ()
    modes = {getattr(config.mlp_spec(i), "mode", "") for i in layers}
    if said and "expert_choice" in modes:
        problems.append(
            f"{', '.join(said)} need generation, and {name} has mlp.mode expert_choice: an expert "
            "picks among tokens that are yet to come. Use token_choice or threshold."
        )
    unsafe = [n for n, t in tasks.items() if getattr(t, "UNSAFE_CODE", False)]
    if unsafe:
        problems.append(
            f"{', '.join(unsafe)} run code that a model has written. Where that is safe: python "
            "-m moe.evals.lm_eval run --model moe … --confirm_run_unsafe_code."
        )
    raise_all(problems)


def _check_lengths(
    title: str, task: Any, answers: Answers, name: str, positions: int | None, tokenizer: Any
) -> None:
    """The harness cuts questions that are too long, and asserts that answers are not."""
    if task.OUTPUT_TYPE == "generate_until" and positions is not None:
        most = normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))["max_gen_toks"]
        if most >= positions:
            raise UserError(
                f"{title} generates up to {most} tokens, and {name} has {positions} positions: "
                f"none is left for the question. Use a task file that includes it, with "
                f"generation_kwargs max_gen_toks: {positions - 1} or less (--include-path)."
            )
    for item, answer in answers:
        # a token is a byte or more
        if answer.strip() and (positions is None or len(answer.encode()) <= positions):
            continue
        length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if length == 0:
            raise UserError(f"{title}: an answer of item {item} is empty. Mend its data.")
        if positions is not None and length > positions:
            raise UserError(
                f"{title}: an answer of item {item} has {length} tokens, and {name} has "
                f"{positions} positions. Use a model with more, or leave the task."
            )


def answers_of(loaded: Any, limit: int | None) -> dict[str, Answers]:
    """What each task scores after its questions, whichever model is asked."""
    found: dict[str, Answers] = {}
    for title, task in loaded["tasks"].items():
        kinds = ("multiple_choice", "loglikelihood")
        if task.OUTPUT_TYPE not in kinds or not isinstance(task, ConfigurableTask):
            continue
        before = task.config.target_delimiter
        own = found[title] = []
        try:
            for item, document in enumerate(itertools.islice(task.eval_docs, limit), 1):
                if task.OUTPUT_TYPE == "loglikelihood" or task.multiple_input:
                    own.append((item, str(task.doc_to_target(document))))
                else:
                    own += [(item, f"{before}{c}") for c in task.doc_to_choice(document)]
        except TemplateError as error:
            raise UserError(f"a template of {title} fails: {error}.") from error
    return found


def _check_chat(tokenizer: Any, prompting: Prompting, name: str) -> None:
    if not prompting.chat:
        return
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"the tokenizer of {name} has no chat template: put the model's chat_template.jinja "
            "into the folder, or leave --apply-chat-template."
        ) from error
    if prompting.system is None:
        return
    messages = [{"role": r, "content": r} for r in ("system", "user")]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:  # the harness would leave the system out, and say nothing
        raise UserError(
            f"the chat template of {name} takes no system message ({error}): leave "
            "--system-instruction."
        ) from error


def ask(lm: BatchedLM, loaded: Any, limit: int | None, prompting: Prompting) -> Any:
    """The harness's own result, on every rank; errors of metrics on the first alone.

    Python's, numpy's and torch's random state are set, as the harness does.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    first = lm.rounds.ranks.rank == 0
    try:
        # one process: it would fork as many as there are cores, beside what a device is doing
        with mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"):
            return evaluator.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP if first else 0,
                system_instruction=prompting.system,
                apply_chat_template=prompting.chat,
                fewshot_as_multiturn=prompting.chat and prompting.multiturn,
            )
    except TemplateError as error:
        names = ", ".join(loaded["tasks"])
        raise UserError(f"a template of {names} fails: {error}.") from error
    finally:
        for task in loaded["tasks"].values():
            task._instances = None  # requests, and the answers to them
