"""What DeepSpeed is told, and what it is not asked to do."""

import json
from pathlib import Path

import pytest
import tiny
from conformance import Case, take_steps
from harness import RankFailed, run_ranks

from moe.config import RunConfig, parse
from moe.engines import deepspeed_json
from moe.errors import UserError


def settings(**sections) -> RunConfig:
    values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}, "engine": "deepspeed"}
    return parse({**values, **sections}, "test")


def overlaid(folder, text: str) -> dict:
    path = folder / "overlay.json"
    path.write_text(text)
    return deepspeed_json.generate(settings(deepspeed={"overlay": str(path)}), 2, "cpu")


def test_batches_follow_from_the_run():
    config = settings(train={"global_batch_size": 24, "micro_batch_size": 3, "dtype": "bfloat16"})
    made = deepspeed_json.generate(config, 4, "cuda")
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (3, 2)
    assert made["bf16"]["enabled"] and made["gradient_clipping"] == 0.0
    assert made["zero_optimization"]["stage"] == 1
    config = settings(deepspeed={"stage": 3, "offload": "parameters"})
    zero = deepspeed_json.generate(config, 1, "cuda")["zero_optimization"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {
        "device": "cpu", "pin_memory": True
    }  # fmt: skip


def test_an_overlay_is_laid_over(tmp_path):
    values = {
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
        "zero_optimization": {"overlap_comm": True, "stage": "auto", "reduce_bucket_size": 1000},
    }
    made = overlaid(tmp_path, json.dumps(values))
    assert made["wall_clock_breakdown"] is True and "train_batch_size" not in made
    zero = made["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"], zero["stage"]) == (True, 1000, 1)


@pytest.mark.parametrize(("text", "message"), [
    ('{"train_batch_size": 8}', "train_batch_size is decided by train.global_batch_size"),
    ('{"gradient_clipping": 1.0}', "gradient_clipping is decided by train.clip"),
    ('{"bf16": {"enabled": true}}', "bf16 is decided by train.dtype"),
    ('{"optimizer": {"type": "Adam"}}', "optimizer is decided by optimizer.lr"),
    ('{"zero_optimization": {"stage": 2}}', "zero_optimization.stage is decided by deepspeed.stag"),
    ('{"wall_clock_breakdwn": true}', "Did you mean wall_clock_breakdown?"),
    ('{"steps_per_print": 0}', "steps_per_print is unknown or has no place"),
    ('{"zero_optimization": {"overlap_com": true}}', "Did you mean overlap_comm?"),
    ('{"curriculum_learning": {}}', "curriculum_learning is unknown or has no place"),
    ('{"zero_optimization": 3}', "does not hold an object"),
    ("[]", "does not hold an object"),
    ("{", "is not JSON"),
])  # fmt: skip
def test_an_overlay_that_says_what_we_say_is_refused(tmp_path, text, message):
    with pytest.raises(UserError) as refusal:
        overlaid(tmp_path, text)
    assert message in str(refusal.value)


def test_shipped_overlays_are_accepted():
    shipped = sorted((Path(__file__).parents[2] / "configs/deepspeed").glob("*.json"))
    assert shipped
    for path in shipped:
        assert deepspeed_json.read(path) == json.loads(path.read_text())


def test_all_that_is_wrong_with_an_overlay_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as refusal:
        overlaid(tmp_path, '{"fp16": {}, "scheduler": {}, "zero_optimization": {"stage": 1}}')
    assert len(str(refusal.value).split("\n")) == 3
    with pytest.raises(UserError, match="cannot be read"):
        deepspeed_json.read(tmp_path / "none.json")


@pytest.mark.parametrize(("sections", "message"), [
    ({"parallel": {"expert": 2}, "deepspeed": {"stage": 3}}, "no expert parallelism with divided"),
    ({"parallel": {"tensor": 2}}, "parallel.tensor=2: the tensor axis is the native engine's"),
    ({"parallel": {"replicate": 2}}, "parallel.replicate=2: ZeRO divides"),
    ({"deepspeed": {"stage": 0}}, "small updates are lost"),
    ({"deepspeed": {"stage": 3}, "train": {"compile": True}}, "train.compile with deepspeed.stage"),
    ({"deepspeed": {"offload": "parameters", "stage": 2}}, "only stage 3 divides weights"),
    ({"deepspeed": {"offload": "optimizer", "stage": 0}}, "offload needs deepspeed.stage 1"),
    ({"parallel": {"expert": 3}}, "parallel.expert=3 does not divide the experts"),
])  # fmt: skip
def test_what_deepspeed_gets_wrong_is_refused(sections, message):
    model = tiny.routed_model(tiny.dense_model(), None, tiny.MOE)
    with pytest.raises(UserError) as refusal:
        deepspeed_json.check(model, settings(**sections), 4)
    assert message in str(refusal.value)
    deepspeed_json.check(model, settings(parallel={"expert": 2}), 4)  # that is fine


def broken_overlay(path) -> None:
    case = Case("moe", engine="deepspeed", width="float32")
    values = case.values()
    values["deepspeed"]["overlay"] = str(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "values", lambda case: values)
        take_steps(case)


@pytest.mark.slow
@pytest.mark.parametrize("text", [
    '{"zero_optimization": {"reduce_bucket_size": -4}}',
    '{"zero_optimization": {"allgather_bucket_size": 1}}',
    '{"flops_profiler": 5}',
])  # fmt: skip
def test_a_value_that_deepspeed_refuses_is_said_in_a_line(tmp_path, text):
    path = tmp_path / "overlay.json"
    path.write_text(text)
    with pytest.raises(RankFailed, match="UserError: DeepSpeed refuses its settings"):
        run_ranks(broken_overlay, 1, path)
