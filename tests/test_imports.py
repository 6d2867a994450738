"""The import rules of the house, read off the syntax trees of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = set(sys.stdlib_module_names)

ALLOWED = {  # room: what its files may import besides the standard library and themselves
    "moe.kernels": {"torch", "triton"},
    "moe.model": {"moe.errors", "moe.kernels", "torch", "transformers"},
}
FORBIDDEN = {  # room: what none of its files may import
    "moe": {"tests", "kernels", "evals"},
    "moe.model": {"torch.distributed"},
    "moe.upcycle": {"moe.engines", "moe.train", "moe.parallel", "torch.distributed"},
    "moe.hf": {"moe.engines", "moe.train", "moe.parallel", "torch.distributed"},
    "moe.checkpoint": {"moe.engines", "moe.train"},
    "moe.parallel": {"moe.engines", "moe.train", "moe.model"},
    "moe.engines": {"moe.train"},
    "moe.evals": {"moe.engines", "moe.train"},
    "moe.tune": {"moe.engines", "moe.train", "moe.parallel", "torch.distributed"},
}
EXCEPT = {  # module: what it may import all the same
    "moe.upcycle.calibrate.ranks": {"moe.parallel"},  # where torchrun started several processes
}
ONLY_IN = {  # library: the rooms that may import it
    "deepspeed": ("moe.engines.deepspeed",),
    "megatron": ("moe.data", "moe.engines.megatron"),
    "lm_eval": ("moe.evals",),
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "evals"):
        parts.insert(0, "moe")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str) -> set[str]:
    """Everything a file imports, relative imports resolved, at whatever depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def violations(module: str, imported: set[str]) -> list[str]:
    """The rules that a module of this name breaks by importing these names."""
    found = []
    for room, allowed in ALLOWED.items():
        if within(module, room):
            found += [
                f"{module} imports {name}: {room} may use {sorted(allowed)}"
                for name in imported
                if name.split(".")[0] not in STDLIB
                and not any(within(name, a) for a in (*allowed, room))
                and not any(a.startswith(name + ".") for a in (*allowed, room))
            ]
    for room, forbidden in FORBIDDEN.items():
        if within(module, room):
            forbidden = forbidden - EXCEPT.get(module, set())
            found += [
                f"{module} imports {name}, which {room} must not"
                for name in imported
                if any(within(name, f) for f in forbidden)
            ]
    for library, rooms in ONLY_IN.items():
        used = any(within(name, library) for name in imported)
        if used and not any(within(module, room) for room in rooms):
            found.append(f"{module} imports {library}, which belongs in {rooms}")
    if within(module, "moe.train") and any(
        within(n, "moe.engines") and n not in ("moe.engines", "moe.engines.base")
        and not n.startswith("moe.engines.base.")
        for n in imported
    ):  # fmt: skip
        found.append(f"{module} imports a concrete engine; moe.train sees moe.engines.base only")
    return found


def sources() -> list[Path]:
    return [p for room in ("moe", "kernels", "evals") for p in sorted((ROOT / room).rglob("*.py"))
            if not any(q.is_symlink() for q in p.parents)]  # fmt: skip


def test_every_file_keeps_the_import_rules():
    found = []
    for path in sources():
        module = module_name(path)
        found += violations(module, imports(ast.parse(path.read_text()), module))
    assert len(sources()) > 20 and not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("moe.kernels.ops", "import transformers"),
        ("moe.model.llama", "from torch import distributed"),
        ("moe.model.llama", "import deepspeed"),
        ("moe.model.llama", "from moe.upcycle import recipes"),
        ("moe.upcycle.writer", "import torch.distributed as dist"),
        ("moe.upcycle.calibrate.fitting", "from moe.parallel.world import world"),
        ("moe.upcycle.calibrate.ranks", "from torch import distributed"),
        ("moe.hf.families", "import evals.adapter"),
        ("moe.train.loop", "from moe.engines.native import NativeEngine"),
        ("moe.data.sampler", "import lm_eval"),
        ("moe.tune.record", "from moe.train import loop"),
        ("moe.train.loop", "from megatron.core import datasets"),
        ("moe.checkpoint.store", "from ..engines import native"),
    ],
)
def test_a_broken_rule_is_found(module, line):
    """Negative controls."""
    assert violations(module, imports(ast.parse(line), module))


def test_namespace_folders_have_no_init():
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "evals/__init__.py").exists()


def test_no_python_in_launch_and_no_code_in_configs():
    for folder, suffixes in (
        ("launch", {".sh", ".sbatch"}),
        ("configs", {".yaml", ".json", ".md"}),
    ):
        strange = [
            p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in suffixes
        ]
        assert not strange, strange


def test_files_and_functions_stay_short():
    long = []
    for path in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 60:
                    long.append(f"{path}:{node.lineno} {node.name}")
    assert not long, "\n".join(long)


def test_importing_the_package_needs_no_heavy_library():
    code = (
        "import sys, moe, moe.cli; "
        "heavy = {'torch', 'transformers', 'deepspeed', 'megatron', 'lm_eval'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_model_needs_neither_deepspeed_nor_megatron_and_registers_itself():
    code = (
        "import sys; sys.modules['deepspeed'] = sys.modules['megatron'] = None; "
        "import moe.model; from transformers import AutoConfig; "
        "assert type(AutoConfig.for_model('routed_llama')).__name__ == 'RoutedLlamaConfig'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
