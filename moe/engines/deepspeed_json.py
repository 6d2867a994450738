"""What DeepSpeed is asked for: a JSON, generated from the run's configuration, and nothing that it
does wrong.

A user's own JSON is laid over it, where it says what no section of ours says.
"""

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from moe.config import RunConfig
from moe.engines.parameters import check_experts
from moe.errors import UserError, problem, raise_all
from moe.jsonfile import read_json

# keys that a section of the configuration decides, and which
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.clip",
    "optimizer": "optimizer.lr, .betas, .eps and .weight_decay",
    "scheduler": "schedule.kind, .warmup_steps and .final_ratio",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype; gradients are summed in float32",
    "communication_data_type": "train.dtype; gradients are sent in float32",
    "expert_parallel": "parallel.expert",
    "tensor_parallel": "parallel.expert",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "checkpoint": "checkpoint.every and checkpoint.keep",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload",
    "zero_optimization.offload_param": "deepspeed.offload",
    "zero_optimization.cpu_offload": "deepspeed.offload",
}
# what may be set: how ranks talk, how much is held at once, what is printed
ALLOWED = [
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "flops_profiler",
    "comms_logger",
    "aio",
    "disable_allgather",
]
ALLOWED_ZERO = [
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "sub_group_size",
    "round_robin_gradients",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_model_persistence_threshold",
    "stage3_max_reuse_distance",
    "stage3_allgather_sequential",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
]
BUCKET = 50_000_000  # elements: DeepSpeed's own default takes 2 GB for it


def generate(config: RunConfig, world_size: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a run on `world_size` ranks of a device type.

    Raises UserError with everything that is wrong with `deepspeed.overlay`.
    """
    train = config.train
    per_pass = train.micro_batch_size * world_size
    zero: dict[str, Any] = {
        "stage": config.deepspeed.stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    where = {"device": "cpu", "pin_memory": device == "cuda"}
    if config.deepspeed.offload != "none":
        zero["offload_optimizer"] = where
    if config.deepspeed.offload == "parameters":
        zero["offload_param"] = dict(where)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": max(1, train.global_batch_size // per_pass),
        "gradient_clipping": 0.0,  # train.clip is applied before, to one norm for all engines
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as in every engine
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.deepspeed.overlay is not None:
        overlay = read(config.deepspeed.overlay)
        zero.update(overlay.pop("zero_optimization", {}))
        settings.update(overlay)
    return settings


def read(path: Path) -> dict[str, Any]:
    """The overlay without what is "auto". Raises UserError with every key that is not for it."""
    try:
        values = read_json(path)
    except OSError as error:
        raise UserError(f"deepspeed.overlay={path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"deepspeed.overlay={path} is not JSON: {error}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise UserError(f"deepspeed.overlay={path} does not hold an object of settings.")
    zero, kept, problems = {}, {}, []
    for key, value in values.pop("zero_optimization", {}).items():
        problems += _refusal(f"zero_optimization.{key}", value, ALLOWED_ZERO)
        if value != "auto":
            zero[key] = value
    for key, value in values.items():
        problems += _refusal(key, value, ALLOWED)
        if value != "auto":
            kept[key] = value
    raise_all([f"deepspeed.overlay={path}: {line}" for line in problems])
    return kept | ({"zero_optimization": zero} if zero else {})


def _refusal(place: str, value: Any, allowed: list[str]) -> list[str]:
    key = place.split(".")[-1]
    if place in OWNED:
        if value == "auto":  # as our sections say: that is what it means to other trainers too
            return []
        return [f"{place} is decided by {OWNED[place]}. Remove it there."]
    if key in allowed:
        return []
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Possible: {', '.join(allowed)}."
    return [f"{place} is unknown or has no place in a run of this trainer. {hint}"]


def check(model: nn.Module, config: RunConfig, size: int) -> None:
    """Raise UserError for what DeepSpeed cannot do on `size` ranks, or does wrong."""
    problems = problem(check_experts, model, config.parallel.expert, size)
    stage, parallel, train = config.deepspeed.stage, config.parallel, config.train
    if parallel.replicate > 1:
        problems.append(
            f"parallel.replicate={parallel.replicate}: ZeRO divides among all ranks. Use 1, or "
            "engine=native."
        )
    if parallel.tensor > 1:
        problems.append(
            f"parallel.tensor={parallel.tensor}: the tensor axis is the native engine's. Use "
            "engine=native, or deepspeed.stage=3 where one rank cannot hold the model."
        )
    if stage == 3 and parallel.expert > 1:
        problems.append(
            f"deepspeed.stage=3 with parallel.expert={parallel.expert}: DeepSpeed has no expert "
            "parallelism with divided weights. Use stage 1 or 2, or parallel.expert=1, which "
            "divides experts like all other weights."
        )
    if stage == 0 and train.dtype != "float32":
        problems.append(
            "deepspeed.stage=0 in bfloat16: DeepSpeed keeps no float32 weights then, and small "
            "updates are lost. Use stage 1, or train.dtype=float32."
        )
    if stage == 3 and train.compile:
        problems.append(
            "train.compile with deepspeed.stage=3: torch compiles DeepSpeed's hooks too, again and "
            "again. Use stage 2, or train.compile=false."
        )
    if config.deepspeed.offload != "none" and stage == 0:
        problems.append("deepspeed.offload needs deepspeed.stage 1, 2 or 3.")
    if config.deepspeed.offload == "parameters" and stage < 3:
        problems.append(
            f"deepspeed.offload=parameters with stage={stage}: only stage 3 divides weights. Use "
            "stage 3, or offload=optimizer."
        )
    raise_all(problems)
