"""Whether ranks reach each other: two that are started here, and what a launcher says of more."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from moe.doctor.finding import Finding

LIMIT = 30.0  # seconds from when all else is done; a slow disk takes most of it to load torch
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Ranks:
    """Two ranks that add up a megabyte, started at once so that other checks go on meanwhile."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="moe-doctor-")
        command = [sys.executable, "-m", "moe.doctor.probe", str(self._path("meeting"))]
        own = {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")}
        with self._path("said").open("w") as said:
            self.process = subprocess.Popen(
                command, env={**os.environ, **own}, stdout=said, stderr=said
            )

    def _path(self, name: str) -> Path:
        return Path(self.folder.name) / name

    def finding(self) -> Finding:
        """Wait for them, not long."""
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = -1
            self.process.kill()
            self.process.wait()
        reason = "no answer in time" if code < 0 else self._last()
        backend = next((b for b in ("nccl", "gloo") if self._path(b).exists()), "no backend yet")
        self.folder.cleanup()
        set_to = {n: os.environ[n] for n in INTERFACES if n in os.environ}
        values = {"backend": backend, "interfaces": set_to}
        if code == 0:
            text = f"2 ranks here reach each other ({backend})"
            return Finding("ranks", "fine", text, values=values)
        shown = "; ".join(f"{k}={v}" for k, v in set_to.items())
        advice = (
            f"{'It is told to use ' + shown + '. ' if shown else ''}Name the network interface in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (`ip addr` lists them; lo for one machine)."
        )
        text = f"2 ranks here do not reach each other ({backend}): {reason}"
        return Finding("ranks", "fails", text, advice, values)

    def _last(self) -> str:
        text = self._path("said").read_text(errors="replace").strip()
        lines = [line for line in text.splitlines() if "Error" in line] or text.splitlines()
        return lines[-1][:300] if lines else "they died without a word"


def launcher() -> Finding | None:
    """What SLURM and torchrun say of a run that is larger than this machine; None without them."""
    names = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_NODELIST", "WORLD_SIZE",
             "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
    found = {n: os.environ[n] for n in names if n in os.environ}
    if not found:
        return None
    said = ", ".join(f"{k}={v}" for k, v in found.items())
    address = found.get("MASTER_ADDR")
    if address:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            text = f"{said}: {address} is no name that this machine knows ({error.strerror})"
            advice = "Give the first node's address in MASTER_ADDR, or in --rendezvous."
            return Finding("launcher", "fails", text, advice, dict(found))
    return Finding("launcher", "fine", said, values=dict(found))
