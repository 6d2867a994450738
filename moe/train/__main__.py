"""`torchrun --nproc-per-node N -m moe.train CONFIG [key.path=value …]`, or
`deepspeed --module moe.train CONFIG [key.path=value …]`.
"""

import os
import sys
from typing import Any

from moe.train import preempt


def main() -> None:
    """Run the command on this rank, and end the process with its exit code: errors of ours say it
    in one line.
    """
    preempt.watch()  # before the imports, which take seconds
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars make a mess of a log
    from moe.errors import MoeError
    from moe.train.command import app

    # DeepSpeed's launcher says with an argument what torchrun says in LOCAL_RANK, and says it too
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    code: Any = None
    try:
        app(arguments, prog_name="python -m moe.train")
    except MoeError as error:
        rank = os.environ.get("RANK", "0")
        if str(error):
            place = f" on rank {rank}" if rank != "0" else ""
            print(f"{error.label}{place}: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:  # of no file that a user named
            sys.excepthook(*sys.exc_info())
            code = 1
        else:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            code = 2
    except SystemExit as stop:
        code = stop.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    world = sys.modules.get("moe.parallel.world")  # not where a configuration was refused
    if world is not None and isinstance(code, int | None):
        world.end(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    main()
