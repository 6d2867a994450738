"""Which tiles a kernel works in: looked up in a table, never tuned inside a step.

Tuning while training makes ranks disagree, changes the order of sums from run to run, and takes
memory when there is none. The tables are JSON: architecture, dtype, kernel and rows of a tile,
which follow from the tokens per expert (for attention: the head size), then sizes HxI or "*".
`MOE_KERNELS_TABLE` names a file of the same form, which comes first.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.kernels.device import interpreted, num_processors

SHIPPED = Path(__file__).parent / "tables" / "kernels.json"


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut and launched; sizes in elements."""

    block_n: int
    block_k: int
    warps: int
    stages: int  # loads in flight
    group: int = 8  # tiles that go through the columns side by side
    resident: int = 1  # programs per multiprocessor
    block_m: int | None = None  # where the kernel does not take the routing's tiles
    parts: int = 4  # that an epilogue takes a tile's columns in
    registers: int | None = None  # per thread at most, for more resident programs

    def checked(self, kernel: str) -> "Tiling":
        """Itself. Raises ValueError where it cannot be a tiling of this kernel."""
        sizes = {n: getattr(self, n) for n in ("block_n", "warps", "stages", "group", "resident")}
        if wrong := [n for n, value in sizes.items() if not isinstance(value, int) or value < 1]:
            raise ValueError(f"{', '.join(wrong)} must be at least 1")
        own = kernel.startswith(("attend", "weight"))
        if own != (self.block_m is not None):
            raise ValueError("block_m is for attention and weight gradients, and these need it")
        return self

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit

    def grid(self, items: int, device: torch.device) -> tuple[int]:
        """Programs for so many work items."""
        return (max(1, min(items, self.resident * num_processors(device))),)


def architecture(device: torch.device) -> str:
    """The table's name for a device: of the nearest one with no more shared memory."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9 or (major, minor) in ((10, 0), (10, 3)):
        return "sm_90"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def tiling(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, sizes: tuple[int, int]
) -> Tiling:
    """The tiling of a kernel for tiles of so many rows and experts of sizes (H, I)."""
    named = os.environ.get("MOE_KERNELS_TABLE")
    return _find(
        kernel, architecture(device), str(dtype).removeprefix("torch."), rows, sizes, named
    )


@functools.cache
def _find(
    kernel: str, arch: str, dtype: str, rows: int, sizes: tuple[int, int], named: str | None
) -> Tiling:
    for path in (named, str(SHIPPED)):
        if path is None:
            continue
        try:
            by_rows = table(path).get(arch, {}).get(dtype, {}).get(kernel, {})
            by_size = by_rows.get(str(rows)) or by_rows.get("*") or {}
            if found := by_size.get(f"{sizes[0]}x{sizes[1]}") or by_size.get("*"):
                return Tiling(**found).checked(kernel)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {arch}, {dtype}, {kernel}: {error}") from error
    raise ValueError(f"no tiling of {kernel} for {arch}, {dtype}, {rows} rows in {SHIPPED.name}.")


@functools.cache
def table(path: str) -> dict[str, Any]:
    """A table file. Raises ValueError where there is none."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"MOE_KERNELS_TABLE={path} is no table of tilings: {error}") from error
