"""What the machine is: versions, devices, kernels, memory that is shared, limits, disk, clock."""

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.doctor.finding import Finding
from moe.kernels import ops

SHOWN = ("torch", "triton", "transformers", "deepspeed", "megatron-core", "lm-eval")
SIZES = {
    "tokens": 8192,
    "hidden": 2048,
    "experts": 8,
    "width": 1024,
    "top_k": 2,
}  # usual
SHARED_MEMORY = 2**30  # what NCCL and data workers of one node want; containers often have 64 MB
OPEN_FILES = 1024
PROBE_BYTES = 64 * 2**20
SLOW_DISK = 50e6  # bytes a second
SKEW = 5.0  # seconds


def versions() -> Finding:
    """Versions of everything a run depends on, against what this package asks for."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in SHOWN:
        found[name] = _version(name)
    nccl: Any = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    found["cuda"] = torch.version.cuda
    found["nccl"] = ".".join(map(str, nccl)) if nccl else None
    problems = []
    for text in importlib.metadata.requires("moe-stack") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _version(wanted.name)
        if have is None or not wanted.specifier.contains(have, prereleases=True):
            problems.append(f"{wanted.name} {have or 'is not installed'}: {wanted} is needed")
    said = ", ".join(f"{name} {version or '-'}" for name, version in found.items())
    if problems:
        return Finding("versions", "fails", "; ".join(problems), "pip install -e .", dict(found))
    if torch.cuda.is_available() and found["triton"] is None:
        advice = "pip install 'triton>=3.6': without it slower kernels run."
        return Finding("versions", "doubtful", said, advice, dict(found))
    return Finding("versions", "fine", said, values=dict(found))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Finding:
    """GPUs with memory and capability; a driver that torch cannot use fails."""
    if torch.cuda.is_available():
        found: list[dict[str, Any]] = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found.append({
                "name": properties.name, "capability": [properties.major, properties.minor],
                "bytes": total, "free": free,
            })  # fmt: skip
        said = ", ".join(
            f"{d['name']} ({d['bytes'] / 1e9:.0f} GB, {d['free'] / 1e9:.0f} free, "
            f"sm_{d['capability'][0]}{d['capability'][1]})"
            for d in found
        )
        busy = [i for i, d in enumerate(found) if d["free"] < 0.9 * d["bytes"]]
        if busy:
            advice = "Others use them: nvidia-smi shows who; choose with CUDA_VISIBLE_DEVICES."
            return Finding("devices", "doubtful", f"{said}; not free: {busy}", advice,
                           {"gpus": found})  # fmt: skip
        return Finding("devices", "fine", said, values={"gpus": found})
    cores = len(os.sched_getaffinity(0))
    values = {"gpus": [], "cores": cores}
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        text = f"there is an NVIDIA driver, and torch {torch.__version__} sees no GPU"
        advice = "Install a torch for the driver's CUDA, or set CUDA_VISIBLE_DEVICES= for the CPU."
        return Finding("devices", "fails", text, advice, values)
    return Finding("devices", "fine", f"no GPU; {cores} cores", values=values)


def kernels() -> Finding:
    """Which backend each operation takes here, by dtype, at the sizes of a usual layer."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    table: dict[str, dict[str, str]] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for dtype in (torch.float32, torch.bfloat16):
                table[str(dtype).removeprefix("torch.")] = _backends(device, dtype)
    except ValueError as error:
        return Finding("kernels", "fails", str(error), "Unset MOE_KERNELS, or choose another one.")
    said = "; ".join(
        f"{dtype}: " + ", ".join(f"{name} {chosen}" for name, chosen in row.items())
        for dtype, row in table.items()
    )
    return Finding("kernels", "fine", said, values=dict(table))


def _backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    tokens, hidden, width, experts = (SIZES[n] for n in ("tokens", "hidden", "width", "experts"))

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    layer = empty(tokens, hidden), empty(experts, 2 * width, hidden), empty(experts, hidden, width)
    routes = ops.routes_at_once(empty(tokens, experts, of=torch.float32))
    attends = ops.attends_heads(empty(1, tokens, 16, hidden // 16))
    return {
        "route": "triton" if routes else "torch",
        "routed_mlp": ops.backend(*layer, SIZES["top_k"]),
        "attend_heads": "triton" if attends else "torch",
        "exchange": "triton" if ops.triton_runs(device, dtype) else "torch",
    }


def shared_memory() -> Finding:
    """Free bytes of /dev/shm, through which NCCL and data workers talk."""
    place = Path("/dev/shm")
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    said, values = f"{free / 1e9:.2f} GB of shared memory free", {"free": free}
    if free < SHARED_MEMORY:
        advice = "Give a container more: docker run --shm-size=8g, or --ipc=host."
        return Finding("shared memory", "doubtful", said, advice, values)
    return Finding("shared memory", "fine", said, values=values)


def open_files() -> Finding:
    """How many files a process may have open: a run has shards, data, sockets and pipes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said, values = f"{soft} open files (at most {hard})", {"soft": soft, "hard": hard}
    if 0 <= soft < OPEN_FILES:
        verdict: Any = "fails" if soft < 128 else "doubtful"
        return Finding("open files", verdict, said, "ulimit -n 65536 before the run.", values)
    return Finding("open files", "fine", said, values=values)


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def disk(folder: Path) -> list[Finding]:
    """How fast the disk of a run's folder takes what has to be safe on it, and its clock."""
    place = existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".moe-doctor-") as file:
            block = os.urandom(2**20)
            small = _timed(file.fileno(), block[:4096])
            skew = os.stat(file.name).st_mtime - time.time()
            seconds = _timed(file.fileno(), *[block] * (PROBE_BYTES // len(block)))
    except OSError as error:
        advice = "Choose another out, or mend its permissions and make room."
        return [Finding("disk", "fails", f"{place}: {error.strerror}", advice)]
    rate = PROBE_BYTES / seconds
    values = {"folder": str(place), "bytes_per_second": rate, "fsync_seconds": small}
    said = f"{place}: {rate / 1e6:.0f} MB/s safely on disk, {small * 1e3:.1f} ms an fsync"
    speed = Finding("disk", "fine", said, values=values)
    if rate < SLOW_DISK:
        advice = "A save takes long: choose a faster disk for out, or save less often."
        speed = Finding("disk", "doubtful", said, advice, values)
    return [speed, _clock(skew)]


def _timed(descriptor: int, *blocks: bytes) -> float:
    begin = time.perf_counter()
    for block in blocks:
        os.write(descriptor, block)
    os.fsync(descriptor)
    return time.perf_counter() - begin


def _clock(skew: float) -> Finding:
    said = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}, the disk's {skew:+.1f} s"
    if abs(skew) > SKEW:
        advice = "The file server's clock is another: run an NTP client on both."
        return Finding("clock", "doubtful", said, advice, {"skew": skew})
    return Finding("clock", "fine", said, values={"skew": skew})
