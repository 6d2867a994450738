"""The wheel, installed away from the tree: the command runs and a toy conversion works."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tiny import dense_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_works_without_the_tree(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("moe_stack-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"moe/evals/report/page.{x}" for x in ("css", "html.jinja")} <= set(names)
    tops = {n.split("/")[0] for n in names}
    assert tops == {"moe", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}, tops
    assert "moe/kernels/ops.py" in names and "moe/evals/adapter.py" in names
    assert any(n.startswith("moe/evals/") and n.endswith(".yaml") for n in names)
    # an environment with our dependencies (this one's, last on the path) but not our tree
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin/python"
    install = [python, "-m", "pip", "install", "--no-deps", "--quiet", wheel]
    subprocess.run(install, check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = venv / "lib" / version / "site-packages"
    libraries = Path(sysconfig.get_paths()["purelib"])
    (own / "libraries.pth").write_text(f"{libraries}\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def moe(*arguments: object) -> str:
        return subprocess.run(
            [venv / "bin/moe", *map(str, arguments)], check=True, text=True, cwd=tmp_path,
            capture_output=True, env=environment,
        ).stdout  # fmt: skip

    where = [python, "-c", "import moe; print(moe.__file__)"]
    found = subprocess.run(where, check=True, text=True, capture_output=True, cwd=tmp_path).stdout
    assert str(own) in found
    assert "upcycle" in moe("--help")
    dense_model().save_pretrained(tmp_path / "dense")
    moe("upcycle", "copy", "--source", "dense", "--out", "moe", "--num-experts", 4, "--top-k", 2,
        "--no-verify")  # fmt: skip
    assert "2 of 4 experts" in moe("inspect", "moe")
