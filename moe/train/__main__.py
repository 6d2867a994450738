"""`torchrun --nproc-per-node N -m moe.train CONFIG [key.path=value …]`, or
`deepspeed --module moe.train CONFIG [key.path=value …]`.
"""

import os
import sys

from moe.train import preempt


def main() -> None:
    """Run the command on this rank; end our own errors in one line and their exit code."""
    preempt.watch()  # before the imports, which take seconds
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars make a mess of a log
    from moe.errors import MoeError
    from moe.train.command import app

    # DeepSpeed's launcher says with an argument what torchrun says in LOCAL_RANK, and says it too
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    try:
        app(arguments, prog_name="python -m moe.train")
    except MoeError as error:
        rank = os.environ.get("RANK", "0")
        if str(error):
            place = f" on rank {rank}" if rank != "0" else ""
            print(f"{error.label}{place}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
