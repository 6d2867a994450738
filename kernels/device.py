"""What a launch has to know about the device it runs on."""

import functools

import torch
import triton


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. In the interpreter 3: enough that programs divide the work."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def accumulator(dtype: torch.dtype) -> triton.language.dtype:
    """What sums of products are kept in."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def upcast(dtype: torch.dtype) -> bool:
    """Whether tiles are widened before they are multiplied.

    The interpreter holds bfloat16 as 16-bit integers and multiplies those.
    """
    return interpreted() and dtype == torch.bfloat16


def precision() -> str:
    """How float32 tiles are multiplied: as torch's own matmul is told to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
