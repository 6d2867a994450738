"""What the documents say exists, and what exists is in the documents."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from moe.cli import COMMANDS
from moe.config import RunConfig, load
from moe.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs/train").glob("*.yaml"))


def keys(section: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all keys of the configuration."""
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, (*path, name))
        else:
            found.append((*path, name))
    return found


def undocumented(text: str) -> list[str]:
    """Keys that no cell of the table names, in full or as `.key` after their section."""
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    missing = []
    for path in keys(RunConfig):
        full, short = ".".join(path), f"`.{path[-1]}`"
        cells = [c for c in table if f"`{full}`" in c or (short in c and f"`{path[0]}." in c)]
        if not cells:
            missing.append(full)
    return missing


def test_the_readme_names_every_key_of_the_configuration():
    assert len(keys(RunConfig)) > 30
    assert undocumented(README) == []


def test_a_key_left_out_of_the_table_is_found():
    assert undocumented(README.replace("`train.clip`", "`train.clap`")) == ["train.clip"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_legal(path):
    load(path, ["model=m", "out=o", "data.train=[{path: p}]"])


def test_an_illegal_configuration_is_not(tmp_path):
    (tmp_path / "x.yaml").write_text(CONFIGS[0].read_text().replace("steps:", "stepz:"))
    with pytest.raises(UserError, match="Did you mean `steps`"):
        load(tmp_path / "x.yaml", ["model=m", "out=o", "data.train=[{path: p}]"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_readme_and_architecture(command):
    for name in ("README.md", "ARCHITECTURE.md"):
        assert f"moe {command} " in (ROOT / name).read_text(), name


def test_commands_in_the_readme_exist():
    used = set(re.findall(r"^(?:\$ )?moe ([a-z]+)", README, re.M))
    assert used and used <= set(COMMANDS)


def test_ci_runs_what_the_readme_names():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    called = [line for line in lines if line.startswith(("exec", "make"))]
    assert called == ["exec make test"] and "`.ci/run` calls `make test`" in README


def test_nothing_is_left_to_fill_in():
    for path in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"):
        assert not re.search(r"@@|TODO|TBD|FIXME|XXX", path.read_text()), path
