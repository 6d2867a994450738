"""The `moe` command: each subcommand lives in its room and is imported only when it is called.

Exit codes: 0 done, 1 training met numbers that are not finite, 2 the request is wrong, 3 data is
damaged, 85 training was preempted and has saved.
"""

import atexit
import gc
import importlib
import os
import sys
from typing import Annotated, Any

import typer

from moe import __version__
from moe.errors import MoeError

app = typer.Typer(
    name="moe",
    help="Upcycle dense LLaMA-style checkpoints into mixtures; train and evaluate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# name: (module that holds a typer application called `app`, one line of help)
COMMANDS = {
    "import": (
        "moe.hf.command",
        "GGUF file, model folder (native mixtures too) or hub id to safetensors.",
    ),
    "upcycle": ("moe.upcycle.command", "Turn a dense checkpoint into a mixture and prove it."),
    "data": ("moe.data.command", "Tokenise text into the files that training reads."),
    "plan": ("moe.plan.command", "What a training run takes on N ranks, without having them."),
    "train": ("moe.train.command", "Continue-train a model; under torchrun: -m moe.train."),
    "export": (
        "moe.hf.export_command",
        "Checkpoint or model to a Hugging Face folder, native or with its code.",
    ),
    "eval": ("moe.evals.command", "Evaluate with lm-evaluation-harness, beside baselines."),
    "bench": ("moe.evals.bench_command", "Speed, memory and cache beside the dense parent."),
    "report": ("moe.evals.report.command", "One HTML page that compares runs and evaluations."),
    "generate": ("moe.tune.generate_command", "Responses of a model, with a tuning if you like."),
    "tune": ("moe.tune.command", "Look at what a mixture's experts do, and tune it."),
    "inspect": ("moe.hf.inspect_command", "Architecture, parameters, routing and receipt."),
    "kernels": ("moe.hf.kernels_command", "Tune the Triton kernels' tilings for a model."),
    "doctor": ("moe.doctor.command", "What would keep a run from working here, and what to do."),
    "verify": ("moe.upcycle.verify_command", "Whether a folder still is what was written."),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moe-stack {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def _register(name: str, module: str, help_line: str) -> None:
    """A command that hands its arguments to another application, imported at that moment."""

    def run(context: typer.Context) -> None:
        # collecting while modules load, and what they left at the end, is a quarter of a start
        gc.disable()
        command = importlib.import_module(module).app
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)
        # standalone_mode would end the process inside; here errors must reach main()
        code = command(context.args, prog_name=f"moe {name}", standalone_mode=False)
        if isinstance(code, int) and code:
            raise typer.Exit(code)

    app.command(
        name,
        help=help_line,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(run)


for _name, (_module, _help) in COMMANDS.items():
    _register(_name, _module, _help)


def call() -> None:
    """Run the command; end our own errors in one line and SystemExit of their exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we fork workers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a page of retries without a network
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars make a mess of a log
    try:
        app()
    except MoeError as error:
        if str(error):
            print(f"{error.label}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `moe ... | head`: the reader has gone, which is fine
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:  # of no file that a user named
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Run the command, and end this process with its exit code."""
    code: Any = None
    try:
        call()
    except SystemExit as stop:
        code = stop.code
    world = sys.modules.get("moe.parallel.world")  # where it was needed
    if world is not None and isinstance(code, int | None):
        world.end(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    main()
