"""`moe upcycle` killed at any moment: nothing that loads as complete, and the next run goes on."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import tiny
from invoke import Result, moe
from safetensors.torch import load_file

from moe.upcycle.source import hash_file

ROOT = Path(__file__).resolve().parents[2]
COPY = ("--num-experts", 4, "--top-k", 2, "--no-verify")
SHARD_BYTES = 150_000  # some eight files


def die_at(step: int, folder: Path, log: Path) -> None:
    """Kill this process before it does its `step`-th thing to a file of the result.

    A thing is what the interpreter audits (opening, renaming, removing, linking) or one block of
    weights; what has been begun is noted in `log`.
    """
    from moe.upcycle import writer

    names = {str(folder), str(folder.with_name(folder.name + ".partial"))}
    count = 0

    def hit(what: str) -> None:
        nonlocal count
        count += 1
        with open(log, "a") as file:
            file.write(f"{what}\n")
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        touched = event.startswith(("open", "os.rename", "os.remove", "os.mkdir", "os.link"))
        if touched and any(str(a).startswith(tuple(names)) for a in arguments[:2]):
            hit(f"{event} {Path(str(arguments[0])).name}")

    bytes_of = writer.bytes_of

    def block(rows: Any) -> Any:
        hit("block")
        return bytes_of(rows)

    writer.bytes_of = block
    sys.addaudithook(audit)


def convert(source: Path, out: Path, step: int, log: Path) -> None:
    """In a process of its own: the real command, killed at `step` (0: not at all)."""
    from moe.upcycle import writer

    writer.SHARD_BYTES = SHARD_BYTES
    die_at(step, out, log)
    sys.exit(moe("upcycle", "copy", "--source", source, "--out", out, *COPY).code)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "source"
    tiny.dense_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(source) -> Callable[..., int]:
    """`start(out, step)`: run it in a fresh process that is killed at `step`; its exit code."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["moe.upcycle.command", "invoke", "tiny"])

    def run(out: Path, step: int = 0) -> int:
        log = out.with_name("log")
        log.unlink(missing_ok=True)
        process = context.Process(target=convert, args=(source, out, step, log))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The result of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert start(out) == 0
    assert len(list(out.glob("*.safetensors"))) > 4
    return out


def state(folder: Path) -> dict[str, str]:
    """Hash of every file but the receipt, which holds the time."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "receipt.json")
    return {p.name: hash_file(p) for p in files}


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Where the weight files noted in a journal lie, and when they were written."""
    if not (folder / "journal.json").is_file():
        return {}
    finished = json.loads((folder / "journal.json").read_text())["files"]
    return {n: (s.st_ino, s.st_mtime_ns) for n in finished for s in [(folder / n).stat()]}


def refusals(path: Path, scratch: Path) -> Iterator[tuple[str, Result]]:
    """What every command that could take the folder for a model says to it."""
    yield "inspect", moe("inspect", path)
    yield "verify", moe("verify", path)
    yield "upcycle", moe("upcycle", "moh", "--source", path, "--out", scratch, "--no-verify")
    yield "import", moe("import", path, "--out", scratch)
    yield "eval", moe("eval", path, "--tasks", "local_perplexity", "--out", scratch)


def assert_refused(path: Path, scratch: Path) -> None:
    for name, result in refusals(path, scratch):
        assert result.code in (2, 3), (name, path, result)
        assert "error: " in result.err and not scratch.exists(), (name, result)


def steps_of(start, folder: Path) -> list[str]:
    out = folder / "all"
    assert start(out) == 0
    return (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    "stride", [pytest.param(5, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.full)]
)
def test_killed_before_any_step_it_leaves_nothing_that_loads(stride, start, whole, tmp_path):
    """Killed before the n-th step, then run again undisturbed: the same bytes."""
    steps = steps_of(start, tmp_path)
    assert len(steps) > 40 and {"block", "os.rename all.partial"} < set(steps)
    resumed = 0
    for step in sorted({*range(1, len(steps), stride), *range(len(steps) - 4, len(steps) + 1)}):
        what = steps[step - 1]
        out = tmp_path / f"out{step}"
        partial = out.with_name(out.name + ".partial")
        assert start(out, step) == -signal.SIGKILL, what
        if out.exists():  # killed after the rename, so complete
            assert what.startswith("os.remove journal.json") or step == len(steps), what
            assert moe("verify", out).code == 0 and moe("inspect", out).code == 0
            continue
        if step % 10 == 0 or step > len(steps) - 3:
            assert_refused(partial, tmp_path / "scratch")
        kept = places(partial)
        assert start(out) == 0, what
        assert state(out) == state(whole), what
        assert not partial.exists()
        for name, place in kept.items():
            found = (out / name).stat()
            assert (found.st_ino, found.st_mtime_ns) == place, f"{name} was written again"
        resumed += bool(kept)
    assert resumed > 50 / stride


def test_what_does_not_exist_is_refused(tmp_path):
    assert_refused(tmp_path / "out", tmp_path / "scratch")


@pytest.mark.slow
def test_killed_between_the_last_shard_and_its_name(start, whole, tmp_path):
    """All is written, hashed and sealed; only the name says that nobody has finished it."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    step = steps_of(start, tmp_path).index("os.rename all.partial") + 1
    assert start(out, step) == -signal.SIGKILL
    assert not out.exists() and (partial / "receipt.json").is_file()
    assert_refused(partial, tmp_path / "scratch")
    message = moe("inspect", partial).err
    assert "unfinished" in message and "same command again" in message
    assert start(out) == 0 and state(out) == state(whole)
    assert moe("verify", out).code == 0


@pytest.mark.slow
def test_a_finished_file_that_was_damaged_is_written_again(start, whole, tmp_path):
    """Negative control: going on must not trust a name."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    blocks = [i for i, s in enumerate(steps_of(start, tmp_path), 1) if s == "block"]
    assert start(out, blocks[-1]) == -signal.SIGKILL
    name = min(places(partial))
    data = bytearray((partial / name).read_bytes())
    data[-1] ^= 1
    (partial / name).write_bytes(data)
    assert hash_file(partial / name) != hash_file(whole / name)
    assert start(out) == 0 and state(out) == state(whole)


@pytest.mark.slow
def test_another_command_does_not_go_on_with_it(start, source, whole, tmp_path):
    """Negative control: what another plan has left is no beginning of this one."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    blocks = [i for i, s in enumerate(steps_of(start, tmp_path), 1) if s == "block"]
    assert start(out, blocks[-1]) == -signal.SIGKILL and places(partial)
    result = moe("upcycle", "copy", "--source", source, "--out", out, *COPY, "--seed", 1)
    assert result.code == 0 and "starting over" in result.err
    name = "model.layers.0.mlp.router.weight"
    shard = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"][name]
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / shard)
    assert (ours[name] != theirs[name]).any()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moe.cli", *map(str, arguments)]


@pytest.mark.slow
def test_the_installed_command_killed_from_outside_goes_on(tmp_path):
    """A shell's view: a quarter of a gigabyte is being written when the kill comes."""
    source, out, partial = (tmp_path / n for n in ("source", "out", "out.partial"))
    sizes = {"hidden_size": 576, "intermediate_size": 3072, "num_hidden_layers": 3}
    tiny.dense_model("llama", **sizes).save_pretrained(source)
    arguments = command("upcycle", "copy", "--source", source, "--out", out, *COPY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE) as process:
        begin = time.monotonic()
        while process.poll() is None and time.monotonic() - begin < 120:
            if sum(p.stat().st_size for p in partial.glob("*.safetensors")) > 20e6:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists() and partial.exists()
    assert_refused(partial, tmp_path / "scratch")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "continuing in" in done.stderr
    assert moe("verify", out).code == 0
    undisturbed = tmp_path / "undisturbed"
    assert moe("upcycle", "copy", "--source", source, "--out", undisturbed, *COPY).code == 0
    assert state(out) == state(undisturbed)


FULL_DISK = """
    import shutil, sys
    sys.path[:0] = [{tests!r}]
    from pathlib import Path
    from invoke import moe
    from moe.upcycle import writer

    disk, source = Path({disk!r}), {source!r}
    arguments = ("--out", disk / "out")
    convert = ("upcycle", "copy", "--source", source, *arguments, *{copy!r})
    asked = moe(*convert)  # asks first
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40)
    writer.SHARD_BYTES = {shard}
    for label, result in (
        ("asked", asked),
        ("upcycle", moe(*convert)),
        ("import", moe("import", {gguf!r}, *arguments)),
    ):
        print(label, result.code, (disk / "out").exists(), result.err.splitlines()[-1], sep="|")
"""


@pytest.mark.slow
def test_a_really_full_disk_is_one_line(source, tmp_path):
    """On a file system of 1 MB, mounted for this test's process alone."""
    from toy_gguf import write_toy_gguf

    disk = tmp_path / "disk"
    disk.mkdir()
    write_toy_gguf(tmp_path / "toy.gguf")
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*namespace, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a file system of its own: unshare and mount are not allowed here")
    driver = tmp_path / "driver.py"
    values = {
        "tests": str(ROOT / "tests"), "disk": str(disk), "source": str(source),
        "copy": ("--num-experts", 16, *COPY[2:]), "shard": SHARD_BYTES,
        "gguf": str(tmp_path / "toy.gguf"),
    }  # fmt: skip
    driver.write_text(textwrap.dedent(FULL_DISK).format(**values))
    done = subprocess.run(
        [*namespace, f"{mount} && exec {sys.executable} {driver}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        ["asked", "2", "False"], ["upcycle", "2", "False"], ["import", "2", "False"]
    ], done.stdout  # fmt: skip
    assert "GB free" in lines[0][3]
    assert all("no space left" in line[3] for line in lines[1:])
