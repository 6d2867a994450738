"""The doctor's two ranks: `python -m moe.doctor.probe FILE`.

NCCL where there is a GPU for each, else gloo: a file of that name beside FILE says which.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

SIZE = 2
SECONDS = 8.0


def add_up(file: Path, rank: int) -> None:
    """Join through a file, add up a megabyte, check the sum."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = "nccl" if gpus >= SIZE else "gloo"
    file.with_name(backend).touch()
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        timeout=timedelta(seconds=SECONDS),
        init_method=f"file://{file}",
        rank=rank,
        world_size=SIZE,
    )
    values = torch.full((2**18,), rank + 1.0, device=device)
    distributed.all_reduce(values)
    assert bool((values == SIZE * (SIZE + 1) / 2).all()), "the sum is wrong"
    distributed.destroy_process_group()


def main(file: Path) -> None:
    """Both ranks, of one load of torch: forked before it has looked for a GPU."""
    child = os.fork()
    code = 1
    try:
        add_up(file, 1 if child == 0 else 0)
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if child:
        code = max(code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
