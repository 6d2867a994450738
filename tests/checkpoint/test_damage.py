"""Damage is found wherever it is, and named: which file, which tensors, what is sound instead."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from injection import as_rank, fork, free_port
from invoke import moe
from stored import blank, differing, edited, load, progress, save, side_files, state
from torch.distributed.tensor import Shard, distribute_tensor

from moe.checkpoint import damage, manifest, store
from moe.engines.base import Entry
from moe.errors import Corrupt, UserError
from moe.parallel.world import world

FLIPS = 60


def flip(path: Path, byte: int, bit: int = 2) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def save_on(ranks: int, out: Path, step: int = 1) -> Path:
    """A checkpoint of several ranks, which share the rows of every matrix."""
    port = free_port()

    def one(rank: int) -> None:
        as_rank(rank, ranks, port)
        torch.manual_seed(rank)
        with world(60) as here:
            mesh = here.mesh(1)["shard"]
            entries = [
                Entry(e.name, e.kind, distribute_tensor(e.tensor, mesh, [Shard(0)]))
                if e.tensor.ndim == 2
                else e
                for e in state()
            ]
            store.save(out, step, entries, progress(step), rank, here.gather, side_files)

    statuses = fork([lambda rank=rank: one(rank) for rank in range(ranks)])
    assert statuses == [0] * ranks
    return out / store.FOLDER / f"step-{step}"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run with step 1 of two ranks and step 2 of four."""
    out = tmp_path_factory.mktemp("written") / "run"
    save_on(2, out)
    save_on(4, out, 2)
    return out


@pytest.fixture
def run(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "run")


def test_every_bit_flip_in_a_tensor_is_found_and_named(run) -> None:
    """In this many places, drawn over all tensors' bytes."""
    folder, draw = run / store.FOLDER / "step-2", random.Random(0)
    parts = [s for s in damage.stretches(manifest.Manifest.read(folder)) if s.tensor is not None]
    places = [(s, s.start + draw.randrange(s.size)) for s in draw.choices(parts, k=FLIPS)]
    found, loaded = 0, 0
    for part, byte in places:
        flip(folder / part.file, byte)
        (one,) = store.check(folder)
        found += one.file == folder / part.file and one.tensors == (part.tensor,)
        if not part.tensor.startswith("rng/"):
            with pytest.raises(Corrupt, match=f"{part.file}: not the bytes.*: {part.tensor}"):
                load(folder, blank(state()))
            read = blank(state())
            with store.Reader(folder, checked=True) as reader:  # negative control: no look
                reader.load(read)
            loaded += differing(read, state()) == [part.tensor]
        flip(folder / part.file, byte)
    assert found == FLIPS and loaded == sum(not s.tensor.startswith("rng/") for s, _ in places)
    assert store.check(folder) == []


def test_every_bit_flip_in_any_file_is_found(run) -> None:
    folder, draw = run / store.FOLDER / "step-2", random.Random(1)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in [*files, *draw.choices(files, k=FLIPS)]:
        byte, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, byte, bit)
        problems = store.check(folder)
        assert [p.file for p in problems] == [path], (path.name, byte, bit)
        flip(path, byte, bit)
    assert store.check(folder) == []


def swap(folder: Path) -> None:
    one, other = folder / "rank-00000.safetensors", folder / "rank-00001.safetensors"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def to_link(path: Path, target: Path) -> None:
    """The same bytes, through a link that leads out of the folder."""
    path.rename(target)
    path.symlink_to(target)


LAST = "rank-00003.safetensors"
# of step 2: how it is damaged, the file that is named, what is said
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda f: (f / LAST).unlink(), LAST, "missing: "),
    "empty": (lambda f: cut(f / LAST, 0), LAST, "0 bytes, "),
    "truncated": (lambda f: cut(f / LAST, (f / LAST).stat().st_size - 1), LAST, "cut off: rng/cpu"),
    "longer": (lambda f: (f / LAST).open("ab").write(b"more"), LAST, "were written"),
    "swapped": (swap, "rank-00000.safetensors", "not the bytes that were written"),
    "of another topology": (
        lambda f: shutil.copy(f.parent / "step-1/manifest.json", f), "rank-00000.safetensors", ""
    ),
    "a link": (lambda f: to_link(f / LAST, f.parents[2] / "out"), LAST, "a symbolic link"),
    "a linked folder": (
        lambda f: to_link(f / "templates", f.parents[2] / "out"), "templates/chat.jinja", "link"
    ),
    "a folder": (
        lambda f: ((f / LAST).unlink(), (f / LAST).mkdir()), LAST, "Is a directory"
    ),
    "a pipe": (lambda f: ((f / LAST).unlink(), os.mkfifo(f / LAST)), LAST, "not a file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json", "no manifest.json"),
    "a linked manifest": (
        lambda f: to_link(f / "manifest.json", f.parents[2] / "out"), "manifest.json", "no manifest"
    ),
    "a side file": (lambda f: flip(f / "config.json", 0), "config.json", "not the bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_whatever_is_wrong_is_named_with_the_newest_sound_one(run, kind) -> None:
    hurt, file, said = DAMAGES[kind]
    folder = run / store.FOLDER / "step-2"
    assert moe("verify", run).code == 0
    hurt(folder)
    problems = [str(p) for p in store.check(folder)]
    assert any(p.startswith(f"{folder / file}: ") and said in p for p in problems), problems
    assert all("\n" not in p for p in problems)
    before = set(run.parent.rglob("*"))
    for path in (run, folder):
        code, _, err = moe("verify", path)
        assert code == 3 and f"{folder / file}: " in err and "Traceback" not in err
        assert f"the newest sound checkpoint is {run / store.FOLDER / 'step-1'}" in err
        code, printed, _ = moe("verify", path, "--json")
        found = json.loads(printed)
        assert code == 3 and not found["sound"]
        assert found["fallback"] == str(run / store.FOLDER / "step-1")
        assert str(folder / file) in [d["file"] for d in found["damaged"]]
    assert set(run.parent.rglob("*")) == before, "nothing is written by looking"
    assert store.newest_sound(run).name == "step-1"


def test_lost_file_names_all_its_tensors(run) -> None:
    folder = run / store.FOLDER / "step-2"
    (folder / LAST).unlink()
    (lost,) = json.loads(moe("verify", run, "--json").out)["damaged"]
    records = manifest.Manifest.read(folder).tensors
    held = {k for k, r in records.items() if any(p.file == LAST for p in r.pieces)}
    assert set(lost["tensors"]) == held and "rng/cpu-00003" in held


def test_stale_latest_is_told(run) -> None:
    (run / store.FOLDER / "latest").write_text("step-9\n")
    code, _, err = moe("verify", run)
    assert code == 3 and "names 'step-9', which is no checkpoint; the newest is step-2" in err
    assert store.latest(run).name == "step-2"


def test_the_folder_of_checkpoints_points_to_its_run(run) -> None:
    code, _, err = moe("verify", run / store.FOLDER)
    assert code == 2 and f"give one of them, or the run: {run}." in err


def test_sound_run_and_checkpoint_are_said_to_be(run) -> None:
    code, printed, _ = moe("verify", run, "--json")
    assert code == 0 and json.loads(printed)["sound"]
    folder = run / "checkpoints/step-1"
    assert moe("verify", folder).out == f"{folder}: sound, checked against manifest.json\n"
    (folder / "notes").touch()
    assert "not in the manifest, so not checked: notes" in moe("verify", folder).out


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "a/../../outside", "~/x/../..", "a\\..\\b", "a\nb", "."],
)
def test_names_that_lead_out_of_the_folder_are_refused(run, name) -> None:
    folder = run / store.FOLDER / "step-2"
    (folder.parent / "outside").write_text("{}\n")

    def rename(values: dict) -> None:
        values["files"][name] = values["files"].pop("config.json")

    edited(folder, lambda values: None)
    assert store.check(folder) == [], "negative control: sealed anew it still reads"
    edited(folder, rename)
    (problem,) = store.check(folder)
    assert "lies outside the folder" in str(problem) and "\n" not in str(problem)
    edited(folder, lambda v: v["files"].update({"config.json": v["files"].pop(name)}))
    edited(
        folder,
        lambda v: v["tensors"]["parameter/experts"]["pieces"][0].update(file=name),
    )
    with pytest.raises(Corrupt, match="lies outside the folder"):
        load(folder, blank(state()))


def test_format_of_another_version_is_refused_with_what_to_do(tmp_path) -> None:
    folder = save(tmp_path, 1)
    edited(folder, lambda v: v.update(format=3))
    with pytest.raises(UserError, match="another version"):
        load(folder, blank(state()))
    old = {"tensors": {}, "files": {}, "progress": {}, "format": 1}
    (folder / manifest.NAME).write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"earlier version .*moe export --to hf"):
        store.check(folder)
    assert moe("verify", folder).code == 2


def test_ranks_share_out_every_byte_once(written) -> None:
    found = damage.stretches(manifest.Manifest.read(written / store.FOLDER / "step-2"))
    for size in (1, 2, 3, 64):
        shares = [damage.share(found, rank, size) for rank in range(size)]
        together = sorted(str(stretch) for part in shares for stretch in part)
        assert together == sorted(map(str, found))
        loads = [sum(s.size for s in share) for share in shares]
        assert max(loads) <= sum(loads) / size + max(s.size for s in found)
