"""The local tasks are the harness's own on local files: its configuration, our data, every item."""

from pathlib import Path
from typing import Any

import pytest
from data import shared
from lm_eval import tasks as harness
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from moe.evals import run

HARNESS = Path(harness.__file__).parent
PARADIGMS = (
    "anaphor_number_agreement", "causative", "determiner_noun_agreement_1",
    "existential_there_object_raising", "irregular_past_participle_verbs", "npi_present_1",
    "regular_plural_subject_verb_agreement_1", "wh_island",
)  # fmt: skip
TASKS = {  # ours: (the harness's file, its split where ours has another name, a file that we read)
    "local_piqa": ("piqa/piqa.yaml", {}, "piqa/valid.jsonl"),
    "local_gsm8k": ("gsm8k/gsm8k.yaml", {}, "gsm8k/train.jsonl"),
    "local_wikitext2": ("wikitext/wikitext.yaml", {}, "wikitext2/test.txt"),
} | {
    f"local_blimp_{p}": (f"blimp/{p}.yaml", {"train": "validation"}, f"blimp/{p}.jsonl")
    for p in PARADIGMS
}
SPLITS = "training_split", "validation_split", "test_split"


def ours(name: str, file: str) -> ConfigurableTask:
    data = shared(file).parents[1]
    return run.find_tasks([name], None, data).load([name])["tasks"][name]


def theirs(file: str, renamed: dict[str, str], own: ConfigurableTask, **changes: Any) -> Any:
    """The harness's task with our data in the place of the hub's."""
    config = load_yaml(HARNESS / file) | changes
    config = {k: v for k, v in config.items() if k not in ("tag", "dataset_path", "dataset_name")}
    for split in SPLITS:
        config[split] = renamed.get(config.get(split), config.get(split))
        if config[split] not in own.dataset:  # a split that is no part of what is scored
            config[split] = None
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: own.dataset})


def rendered(task: ConfigurableTask, limit: int | None = None) -> list[Any]:
    """What would be asked of a model for each item, and what counts as right."""
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=limit)
    targets = [task.doc_to_target(doc) for doc in task.eval_docs]
    return [(i.request_type, i.doc_id, i.idx, i.args) for i in task.instances] + targets


def differences(
    own: ConfigurableTask, harness: ConfigurableTask, limit: int | None = None
) -> list[str]:
    """All that tells two tasks apart: requests, metrics, how they are added up, filters."""
    found = []
    if rendered(own, limit) != rendered(harness, limit):
        found.append("requests")
    for part in ("_metric_fn_list", "_metric_fn_kwargs", "_aggregation_list", "_higher_is_better"):
        if getattr(own, part) != getattr(harness, part):
            found.append(part)
    filters = [
        [(f.name, [vars(step()) for step in f.filters]) for f in task._filters]
        for task in (own, harness)
    ]
    if str(filters[0]) != str(filters[1]):
        found.append("filters")
    doc = own.eval_docs[0]
    for part in ("generation_kwargs", "num_fewshot", "repeats", "target_delimiter"):
        if (getattr(own.config, part) or 0) != (getattr(harness.config, part) or 0):
            found.append(part)
    if own.OUTPUT_TYPE == "loglikelihood_rolling" and (
        own.process_results(doc, [-7.0]) != harness.process_results(doc, [-7.0])
    ):
        found.append("process_results")
    return found


@pytest.mark.slow  # every item of every task
@pytest.mark.parametrize("name", list(TASKS))
def test_a_local_task_asks_what_the_harnesss_asks(name):
    file, renamed, data = TASKS[name]
    own = ours(name, data)
    assert len(own.eval_docs) >= 60
    assert differences(own, theirs(file, renamed, own)) == []


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("local_piqa", {"doc_to_text": "Q: {{goal}}\nAnswer:"}, "requests"),
        ("local_piqa", {"target_delimiter": ""}, "requests"),
        ("local_piqa", {"metric_list": [{"metric": "acc"}]}, "_metric_fn_list"),
        ("local_gsm8k", {"num_fewshot": 8}, "requests"),
        ("local_gsm8k", {"filter_list": None}, "filters"),
        ("local_gsm8k", {"generation_kwargs": {"until": ["\n"]}}, "generation_kwargs"),
        ("local_wikitext2", {"doc_to_target": "{{page}}"}, "requests"),
        ("local_wikitext2", {"process_results": lambda d, r: {"bits_per_byte": r}}, "process"),
        ("local_blimp_causative", {"doc_to_target": 1}, "requests"),
    ],
)
def test_a_task_that_asks_otherwise_is_found(name, change, found):
    """Negative controls."""
    file, renamed, data = TASKS[name]
    own = ours(name, data)
    changed = theirs(file, renamed, own, **change)
    assert any(found in part for part in differences(own, changed, limit=9))


def test_the_group_adds_up_as_the_harnesss():
    manager = TaskManager(include_path=Path(run.ROOT / "tasks"), include_defaults=False)
    own = load_yaml(manager.task_index["local_blimp"].yaml_path, resolve_func=False)
    harness = load_yaml(HARNESS / "blimp/_blimp.yaml", resolve_func=False)
    assert {task.removeprefix("local_") for task in own["task"]} < set(harness["task"])
    assert own["aggregate_metric_list"] == harness["aggregate_metric_list"]
