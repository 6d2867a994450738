"""`moe upcycle copy` against mergekit-moe on the same checkpoint: wall time and peak memory.

python bench/upcycle_copy.py --source FOLDER --moe .venv/bin/moe --mergekit VENV/bin/mergekit-moe

Four copies of a dense LLaMA as experts, two per token, random router, dtype as stored, verification
off. mergekit-moe takes SmolLM2 (9 heads over 3 KV heads, tied embeddings) with `architecture:
mixtral` and its tokenizer beside it. Both run as fresh processes, in turn, with a warm page cache;
peak memory is the kernel's ru_maxrss of that process. What they wrote is compared afterwards.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from report import Goal, publish

EXPERTS, TOP_K = 4, 2
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # nothing is to be asked for
NOTES = (
    f"{EXPERTS} experts, top {TOP_K}, random router, dtype as stored, no verification; fresh "
    "processes in turn, start-up included, source in the page cache. `moe` hashes the source and "
    "what it writes, checks every value for finiteness, writes a receipt and waits for the disk "
    "(fsync); mergekit-moe does none of these. Peak memory is ru_maxrss of the process.",
    "The expert weights of both outputs are bitwise equal.",
)


@dataclass(slots=True)
class Side:
    """One command and what its runs took."""

    command: list[str]
    output: Path
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    def run(self) -> None:
        """One fresh process, measured. Raises SystemExit with its output where it fails."""
        shutil.rmtree(self.output, ignore_errors=True)
        os.sync()  # what the run before left to write is not this one's
        log = self.output.with_suffix(".log")
        start = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command, stdout=file, stderr=file, env=os.environ | OFFLINE
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(self.command)} failed:\n{log.read_text()[-3000:]}")
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(usage.ru_utime + usage.ru_stime)
        self.peak_bytes.append(usage.ru_maxrss * 1024)


def sides(options: argparse.Namespace) -> dict[str, Side]:
    """The two commands. The config of mergekit-moe is written beside the outputs."""
    work, source = options.work.resolve(), options.source.resolve()
    work.mkdir(parents=True, exist_ok=True)
    config = work / "mergekit.yaml"
    lines = [
        f"base_model: {source}",
        "gate_mode: random",
        "architecture: mixtral",
        f"experts_per_token: {TOP_K}",
        f"dtype: {options.dtype}",
        "experts:",
        *[f"  - source_model: {source}"] * EXPERTS,
    ]
    config.write_text("\n".join(lines) + "\n")
    copy = ["upcycle", "copy", "--source", str(source), "--out", str(work / "moe")]
    sizes = ["--num-experts", str(EXPERTS), "--top-k", str(TOP_K)]
    return {
        "moe upcycle copy": Side([str(options.moe), *copy, *sizes, "--no-verify"], work / "moe"),
        "mergekit-moe": Side(
            [str(options.mergekit), "--quiet", str(config), str(work / "mergekit")],
            work / "mergekit",
        ),
    }


def compare(ours: Path, theirs: Path) -> None:
    """Raises SystemExit unless both folders hold the same expert weights, bit for bit."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= {n: file.get_tensor(n) for n in file.keys() if ".experts." in n}  # noqa: SIM118
        return found

    mine, other = tensors(ours), tensors(theirs)
    for name, tensor in mine.items():
        expected = _stacked(other, name, len(tensor))
        if tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
            raise SystemExit(f"{name} differs between the two outputs")
    if not mine:
        raise SystemExit(f"{ours} holds no experts")


def _stacked(tensors: dict, name: str, experts: int):  # noqa: ANN202  (torch is imported late)
    """A stacked tensor of mergekit-moe's output, from its parts where it kept one per expert."""
    import torch

    if name in tensors:
        return tensors[name]
    at, _, kind = name.rpartition(".")
    parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    return torch.stack(
        [torch.cat([tensors[f"{at}.{e}.{p}.weight"] for p in parts]) for e in range(experts)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="dense model folder")
    parser.add_argument("--moe", type=Path, required=True, help="our command")
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-moe command")
    parser.add_argument("--work", type=Path, required=True, help="folder for the outputs")
    parser.add_argument("--dtype", default="float32", help="what the source is stored in")
    parser.add_argument("--out", type=Path, help="folder for upcycle_copy.json and .md")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    runs = sides(options)
    for round_ in range(options.repeats + 1):
        for side in runs.values():
            side.run()
            if round_ == 0:  # reads the source and both installations into the page cache
                side.seconds, side.cpu_seconds, side.peak_bytes = [], [], []
    compare(*(side.output for side in runs.values()))
    rows = [
        {
            "command": name,
            "seconds": round(statistics.median(side.seconds), 1),
            "CPU seconds": round(statistics.median(side.cpu_seconds), 1),
            "peak MB": round(statistics.median(side.peak_bytes) / 1e6),
        }
        for name, side in runs.items()
    ]
    ours, theirs = runs.values()
    ratio = statistics.median(ours.seconds) / statistics.median(theirs.seconds)
    memory = statistics.median(ours.peak_bytes) / statistics.median(theirs.peak_bytes)
    goals = [Goal("time, ours/mergekit", ratio, "≤", 0.5)]
    goals.append(Goal("peak memory, ours/mergekit", memory, "≤", 0.5))
    listing = [str(options.mergekit.parent / "pip"), "list", "--format=freeze"]
    versions = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    peers = [v for v in versions if v.split("==")[0] in ("mergekit", "torch", "transformers")]
    notes = [*NOTES, f"mergekit-moe's environment: {', '.join(peers)}."]
    publish("upcycle_copy", "Copying an MLP into experts", rows, goals, notes, options.out)
    for side in runs.values():
        shutil.rmtree(side.output)


if __name__ == "__main__":
    main()
