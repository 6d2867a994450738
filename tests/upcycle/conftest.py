"""Dense checkpoints on disk with a tokenizer, and one call to upcycle them."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from invoke import Result, moe
from safetensors.torch import load_file

from moe.upcycle.recipes import Recipe
from moe.upcycle.run import Request, run


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`dense("qwen3")`: a read-only folder with a tiny model of that family and a tokenizer."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str) -> Path:
        if not (path := root / family).exists():
            tiny.dense_model(family).save_pretrained(path)
            tiny.tokenizer().save_pretrained(path)
            (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        return path

    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of several files, as large checkpoints come."""
    path = tmp_path_factory.mktemp("sharded") / "llama"
    tiny.dense_model("llama").save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture(scope="session")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """`branches("llama")`: three folders of one family, their weights apart."""
    root = tmp_path_factory.mktemp("branches")

    def folders(family: str) -> list[Path]:
        made = [root / f"{family}-{seed}" for seed in range(3)]
        for seed, path in enumerate(made):
            if not path.exists():
                tiny.dense_model(family, seed=seed).save_pretrained(path)
                tiny.tokenizer().save_pretrained(path)
        return made

    return folders


@pytest.fixture
def source(dense: Callable[[str], Path], tmp_path: Path) -> Path:
    """A private copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(dense("llama"), tmp_path / "source"))


@pytest.fixture
def moe_upcycle() -> Callable[..., Result]:
    """`moe_upcycle("moh", "--source", …)`: the command as users type it."""
    return functools.partial(moe, "upcycle")


@pytest.fixture
def refused(moe_upcycle, tmp_path) -> Callable[..., str]:
    """Call, demand the exit code and that nothing was left behind; returns the message."""

    def call(code: int, *arguments: object) -> str:
        out = tmp_path / "out"
        result = moe_upcycle(*arguments, "--out", out)
        assert result.code == code, result.err
        assert not out.exists() and not (tmp_path / "out.partial").exists()
        assert "Traceback" not in result.err
        return result.err

    return call


@pytest.fixture(scope="session")
def upcycle() -> Callable[..., Path]:
    """`upcycle(recipe, source, out, seed=…)`: the command, unverified unless told otherwise."""

    def call(recipe: Recipe, source: Path, out: Path, **options: Any) -> Path:
        defaults: dict[str, Any] = {
            "seed": 0,
            "layers": None,
            "dtype": None,
            "text": None,
            "verify": False,
            "dry_run": False,
            "as_json": False,
        }
        run(recipe, Request(source=[source], out=out, **{**defaults, **options}))
        return out

    return call


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Every tensor of a folder, read by the safetensors library."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(file))
        return tensors

    return read
