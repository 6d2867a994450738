"""The `moe` command: parse, call, print. Everything heavy is imported inside the commands.

Exit codes: 0 done, 2 the request is wrong, 3 data is damaged, 85 preempted (start again to go on).
"""

import json
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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


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


def _emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result: one JSON object, or text for people."""
    print(json.dumps(result) if as_json else text)


def main() -> None:
    """Run the command; end our own errors in one line and their exit code."""
    try:
        app()
    except MoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `moe ... | head`: the reader has gone, which is fine
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
