"""Compile kernels for GPUs that are not here, and read what the assembler made of them.

python tests/kernels/offline.py ARCH DTYPE prints an object per configuration: registers, spills,
shared memory, matrix instructions. A process of its own: the compiler may abort it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def build(fn: Any, arch: str, arguments: dict[str, Any], **options: int) -> dict[str, Any]:
    """Compile `fn`; `arguments`: "*bf16", "i32:16" (divisible by 16), "i32", or constants."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        value = arguments[name]
        kind, _, divisor = value.partition(":") if isinstance(value, str) else (None, "", "")
        if kind is None or kind in ("ieee", "tf32"):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = kind
        if kind.startswith("*") or divisor:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    found = {"shared": compiled.metadata.shared}
    return found | (_amd(compiled) if arch.startswith("gfx") else _nvidia(compiled))


def _nvidia(compiled: Any) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage

    def count(word: str) -> int:
        return len(re.findall(rf"\b{word}\b", code))

    return {
        "registers": int(found[1]),
        "spills": count("STL") + count("LDL"),
        "wgmma": count("HGMMA"),
        "mma": count("HMMA"),
        "asynchronous": count("LDGSTS") + count("UTMALDG"),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        assert found, name
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma", code)),
    }


def main(arch: str, dtype: str) -> None:
    from configurations import configurations

    for name, fn, arguments, options in configurations(arch, dtype):
        print(json.dumps({"name": name} | build(fn, arch, arguments, **options)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
