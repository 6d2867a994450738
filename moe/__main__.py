"""`python -m moe`: the `moe` command."""

from moe.cli import main

main()
