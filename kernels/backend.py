"""Which implementation of an operation runs: by device and shape, or as `MOE_KERNELS` says."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

BACKENDS = ("naive", "cpu", "grouped_mm", "triton")


def forced() -> str | None:
    """What `MOE_KERNELS` asks for, None where it asks for nothing."""
    wanted = os.environ.get("MOE_KERNELS") or None
    if wanted and wanted not in BACKENDS:
        raise ValueError(f"MOE_KERNELS={wanted!r} is unknown. Use one of {', '.join(BACKENDS)}.")
    return wanted


def triton_module(name: str) -> Any:
    """A module that imports Triton. By name: what needs Triton must not be needed where it is not,
    nor come along when the model's code is exported.
    """
    return importlib.import_module(f"moe.kernels.{name}")


@functools.cache
def has_triton() -> bool:
    try:
        return all(map(importlib.util.find_spec, ("triton", "moe.kernels.device")))
    except ModuleNotFoundError:  # exported code, without this package
        return False


def takes_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton's kernels cannot take such tensors; empty where they can."""
    if not has_triton():
        return "triton is not installed. Install it, or use cpu"
    interpreted = triton_module("device").interpreted()
    if device.type != "cuda" and not interpreted:
        return f"on {device.type} it needs Triton's interpreter: set TRITON_INTERPRET=1, or use cpu"
    wide = dtype == torch.float64 and not interpreted
    if wide or dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} has no Triton kernels: use cpu"
    return ""


@torch.compiler.assume_constant_result
def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an operation that Triton has goes there: on a GPU by default, elsewhere if forced."""
    wanted = forced()
    if wanted == "triton":
        if problem := takes_triton(device, dtype):
            raise ValueError(f"MOE_KERNELS=triton: {problem}.")
        return True
    return wanted is None and device.type == "cuda" and not takes_triton(device, dtype)
