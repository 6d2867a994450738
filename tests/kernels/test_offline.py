"""Every configuration that ships, compiled for GPUs that are not here: nothing is spilled.

The figures are kept per version of Triton: python tests/kernels/test_offline.py writes those of the
one that is installed anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
GOLDEN = HERE / "offline.json"
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "gfx942": 65_536}
# Measured with Triton 3.6, which spills nothing here, it takes half the time of what no version
# spills: two programs to a multiprocessor, one of which multiplies while the other stores. Later
# versions keep some values of the epilogue in local memory.
SPILLED = {f"down_dgrad {dtype} 128 *": 26 for dtype in ("bfloat16", "float16")}
DTYPES = ("bfloat16", "float16", "float32")


def figures(arch: str, dtype: str) -> dict[str, dict[str, int]]:
    """What the assembler made of each configuration, from a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = subprocess.run(
        [sys.executable, HERE / "offline.py", arch, dtype],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    found = [json.loads(line) for line in process.stdout.splitlines()]
    return {f.pop("name"): f for f in found}


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", [
    pytest.param("bfloat16", marks=pytest.mark.slow),
    pytest.param("float16", marks=pytest.mark.full),
    pytest.param("float32", marks=pytest.mark.slow),
])  # fmt: skip
def test_nothing_is_spilled_and_tensor_cores_are_used(arch, dtype):
    found = figures(arch, dtype)
    assert len(found) > 15
    for name, figure in found.items():
        newer = arch == "sm_90" and not triton.__version__.startswith("3.6.")
        assert figure["spills"] <= (SPILLED.get(name, 0) if newer else 0), name
        assert figure["shared"] <= SHARED[arch], name
        assert figure["registers"] <= (512 if arch == "gfx942" else 255), name
        multiplies = ("up_swiglu", "down", "dx ", "weight_gradient", "attend")
        if not name.startswith(multiplies):
            continue
        if arch == "sm_90" and name.split()[2] not in ("16", "32"):
            assert figure["wgmma"] > 0 and figure["mma"] == 0, name
        else:
            assert figure["mma"] > 0, name
        if arch.startswith("sm"):
            assert figure["asynchronous"] > 0, name
    kept = json.loads(GOLDEN.read_text()).get(triton.__version__)
    for name, figure in found.items() if kept else ():  # another compiler makes other code
        assert figure == kept[arch][name], f"{name}: {figure}, kept {kept[arch][name]}"


@pytest.mark.slow
def test_a_tile_that_is_too_large_is_found():
    """Negative control: the unsplit, 256-wide tile of the fused backward does not fit."""
    code = (
        "import offline, configurations as c\n"
        "from moe.kernels.routed_mlp import gradients\n"
        "fn, arguments = c.routed_mlp('down_dgrad', '*bf16')\n"
        "import triton.language as tl\n"
        "arguments |= dict(BM=128, BN=256, BK=64, GROUP=8, PARTS=1, UPCAST=False, PRECISION='tf32',"
        " ACC=tl.float32)\n"
        "print(offline.build(fn, 'sm_90', arguments, num_warps=4, num_stages=4)['spills'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{HERE.parents[1]}{os.pathsep}{HERE}"
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(process.stdout) > 0


if __name__ == "__main__":
    kept = json.loads(GOLDEN.read_text())
    kept[triton.__version__] = {
        arch: {n: f for d in DTYPES for n, f in figures(arch, d).items()} for arch in SHARED
    }
    GOLDEN.write_text(json.dumps(kept, indent=0) + "\n")
