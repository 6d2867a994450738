"""What a run configuration asks of this machine: that it is legal, and room for its checkpoints."""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch

from moe.config import RunConfig
from moe.doctor.finding import Finding
from moe.doctor.machine import existing
from moe.errors import MoeError, UserError
from moe.parallel.world import launched
from moe.plan.plan import CHECKPOINT_BYTES


def world_size() -> int:
    """Ranks to check for: the launcher's, else one for each GPU here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return max(1, launched("WORLD_SIZE", gpus))


def look(config: RunConfig) -> list[Finding]:
    """All that has to do with one configuration."""
    from moe.data.manifest import read_manifest
    from moe.engines.imagine import blueprint
    from moe.hf.families import routed_config
    from moe.plan.meshes import check
    from moe.train.starting import open_model

    try:
        size = world_size()
    except UserError as error:
        return [Finding("configuration", "fails", "it is not known for how many ranks", str(error))]
    sizes: list[int] = []

    def model() -> None:
        shape = routed_config(open_model(config).config)
        imagined = blueprint(shape)
        sizes.append(sum(p.numel() for p in imagined.parameters()))
        check(config, imagined, size)

    problems = _said(model)
    for part in (*config.data.train, *config.data.validation):
        problems += _said(read_manifest, part.path)
    if config.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        problems.append("engine=deepspeed: pip install 'moe-stack[deepspeed]'.")
    found = [_run(config, size, problems)]
    if sizes:
        found.append(checkpoints(config, sizes[0]))
    return found


def _said(check: Callable[..., Any], *arguments: Any) -> list[str]:
    """What a check has to say, damage included."""
    try:
        check(*arguments)
    except MoeError as error:
        return str(error).split("\n")
    return []


def _run(config: RunConfig, size: int, problems: list[str]) -> Finding:
    values = {"ranks": size, "problems": problems}
    if problems:
        text = f"{len(problems)} problem(s) on {size} rank(s)"
        return Finding("configuration", "fails", text, "\n".join(problems), values)
    text = f"legal on {size} rank(s); `moe plan CONFIG --world N --memory GB`: whether it fits"
    return Finding("configuration", "fine", text, values=values)


def checkpoints(config: RunConfig, parameters: int) -> Finding:
    """Room for `keep` checkpoints and the one that is written before the oldest goes."""
    place = existing(config.out)
    free = shutil.disk_usage(place).free
    each = parameters * CHECKPOINT_BYTES
    there = sum(p.stat().st_size for p in (config.out / "checkpoints").glob("step-*/*")
                if p.is_file())  # fmt: skip
    needed = max(each, (config.checkpoint.keep + 1) * each - there)
    values = {"each": each, "keep": config.checkpoint.keep, "needed": needed, "free": free}
    text = (
        f"{_gb(each)} each; {config.checkpoint.keep} kept, one being written: {_gb(needed)} more, "
        f"{_gb(free)} free in {place}; in the host's memory a copy of it, shared by the ranks"
    )
    if needed > free:
        advice = "Make room, choose another out, or a smaller checkpoint.keep."
        return Finding("checkpoints", "fails", text, advice, values)
    return Finding("checkpoints", "fine", text, values=values)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
