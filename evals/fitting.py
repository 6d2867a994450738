"""How many sequences of a length fit into the memory that is free, by what a forward pass holds.

An estimate and not a trial: one rank that runs out of memory in the middle of a forward pass would
leave all others waiting.
"""

import os
from typing import Any

import torch

SHARE = 0.5  # of what is free
MOST = 64
MACHINE = "/proc/meminfo"


def fitting(config: Any, length: int, device: torch.device) -> int:
    """A power of two from 1 to MOST: sequences of `length` tokens for one forward pass."""
    room = SHARE * free_bytes(device) / (length * bytes_per_token(config))
    return next((n for n in (MOST >> i for i in range(MOST.bit_length())) if n <= room), 1)


def bytes_per_token(config: Any) -> int:
    """Of the largest moment: logits and their log-softmax, one layer at work, the KV cache."""
    itemsize = (getattr(config, "dtype", None) or torch.float32).itemsize
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    cache = 2 * layers * config.num_key_value_heads * width
    visited = getattr(config, "num_experts_per_tok", None)
    if visited is None and hasattr(config, "mlp_spec"):
        specs = [config.mlp_spec(i) for i in range(layers)]
        mean = [getattr(spec, "mean_experts", 0) for spec in specs]  # where none is fixed
        visited = max(getattr(spec, "top_k", 1) or m for spec, m in zip(specs, mean, strict=True))
    inner = 3 * config.intermediate_size * (visited or 1)
    attention = 4 * config.num_attention_heads * width
    # log-softmax is taken of all logits at once, in float32 inside where they are shorter
    return itemsize * (2 * config.vocab_size + inner + attention + 8 * hidden + cache) + 4 * hidden


def free_bytes(device: torch.device) -> int:
    """Of the device, or of this process's share of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        with open(MACHINE) as lines:
            kilobytes = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except OSError:  # not Linux: what is there at all
        kilobytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024
    return kilobytes * 1024 // processes
