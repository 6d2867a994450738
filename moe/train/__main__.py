"""`torchrun --nproc-per-node N -m moe.train CONFIG [key.path=value …]`."""

import os
import sys

from moe.errors import MoeError
from moe.train.command import app

if __name__ == "__main__":
    try:
        app(prog_name="python -m moe.train")
    except MoeError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{f' on rank {rank}' if rank != '0' else ''}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
