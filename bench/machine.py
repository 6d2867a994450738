"""The machine and the versions behind a measurement: no host names, no paths.

python bench/machine.py
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "moe-stack")


def describe(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """CPU, cores, memory, system, Python, and the versions of `packages`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "CPU": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": _system(),
        "Python": platform.python_version(),
    }
    return facts | {name: _version(name) for name in packages}


def _cpu() -> str:
    """Model name, and family and model numbers, which tell apart what clouds name alike."""
    values = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    name = values.get("model name", platform.machine())
    return f"{name} (family {values.get('cpu family', '?')}, model {values.get('model', '?')})"


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    for key, value in describe().items():
        print(f"{key:>14}  {value}")
