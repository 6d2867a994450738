"""The harness's tasks: loaded once, checked against the model before anything runs, and asked.

loaded = load(["local_piqa"], manager)
check(loaded, config, tokenizer, prompting, "model")
results = ask(lm, loaded, limit=100, prompting=prompting)
"""

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from moe.errors import UserError, problem, raise_all
from moe.evals import perplexity
from moe.evals.adapter import BatchedLM
from moe.evals.suites import Tasks

# the harness asks git for the revision of the folder we stand in, which says "fatal" in any other
evaluator.get_git_commit_hash = lambda: None
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
            built += _loaded(name, manager)
        except UserError as error:
            problems += str(error).split("\n")
    raise_all(problems)
    try:
        loaded = manager.load(built)
    except ValueError as error:  # of tasks that are there twice
        raise UserError(f"{', '.join(names)}: {_first_line(error)}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _loaded(name: str, manager: Tasks) -> list[Any]:
    """What a name stands for: a task, a group with its tasks in it, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except TemplateError as error:
        raise UserError(f"a template of {name} fails: {error}.") from error
    except ValueError as error:  # of files that make no task
        raise UserError(f"{name} cannot be loaded: {_first_line(error)}") from error
    except OSError as error:
        raise UserError(_offline(error, name, manager)) from error
    if manager.suite is not None:
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=manager.suite.shots[name])
    inside = {child for children in loaded["group_map"].values() for child in children}
    found = {**loaded["tasks"], **loaded["groups"]}
    return [value for key, value in found.items() if key not in inside]


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


def check(loaded: Any, config: Any, tokenizer: Any, prompting: Prompting, name: str) -> None:
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
    for task in tasks.values():
        if task.OUTPUT_TYPE == perplexity.REQUEST and positions is not None:
            problems += problem(perplexity.sizes, positions, *task.windows)
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
