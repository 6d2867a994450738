"""A checkpoint folder is whole or no checkpoint, on any division of its tensors."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moe.checkpoint import manifest, store
from moe.engines.base import Entry
from moe.errors import Corrupt, UserError


def state(seed: int = 0) -> list[Entry]:
    """Tensors of every sort that a state may hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tied = draw(6, 5)
    return [
        Entry("embed", "parameter", tied),
        Entry("head", "parameter", tied),
        Entry("experts", "parameter", draw(3, 4, 2)),
        Entry("narrow", "parameter", draw(7).bfloat16()),
        Entry("turned", "parameter", draw(4, 6).T),
        Entry("scale", "parameter", draw()),
        Entry("nothing", "parameter", draw(0, 3)),
        Entry("bias", "buffer", draw(5).double()),
        Entry("embed", "exp_avg", draw(6, 5)),
        Entry("embed", "exp_avg_sq", draw(6, 5).square()),
    ]


def alone(value: Any) -> list[Any]:
    return [value]


def side_files(folder: Path) -> None:
    (folder / "config.json").write_text("{}\n")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ x }}")


def save(out: Path, step: int, entries: Iterable[Entry] | None = None) -> Path:
    progress = {"step": step, "float": 0.1}
    return store.save(out, step, entries or state(step), progress, 0, alone, side_files)


def blank(entries: list[Entry]) -> list[Entry]:
    return [Entry(e.name, e.kind, torch.full_like(e.tensor, 7)) for e in entries]


def differing(left: list[Entry], right: list[Entry]) -> list[str]:
    return [
        f"{a.kind}/{a.name}"
        for a, b in zip(left, right, strict=True)
        if a.tensor.dtype != b.tensor.dtype or not torch.equal(a.tensor, b.tensor)
    ]


def load(folder: Path, into: list[Entry]) -> None:
    with store.Reader(folder) as reader:
        reader.load(into)


def test_every_tensor_comes_back_to_the_last_bit(tmp_path) -> None:
    folder, read = save(tmp_path, 3), blank(state(3))
    assert len(differing(read, state(3))) == 9, "negative control: all but the empty one"
    load(folder, read)
    assert not differing(read, state(3))
    assert store.check(folder) == []
    assert store.progress_of(folder) == {"step": 3, "float": 0.1}
    whole = dict(store.weights(folder))
    expected = {e.name: e.tensor for e in state(3) if e.kind in ("parameter", "buffer")}
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in whole)
    with store.Reader(folder) as reader:
        assert torch.equal(reader.random_state(0), torch.get_rng_state())
        assert reader.random_state(1) is None


def test_other_tensors_or_shapes_are_refused_naming_them(tmp_path) -> None:
    folder = save(tmp_path, 1)
    less = [e for e in state() if e.kind != "exp_avg"]
    with pytest.raises(UserError, match=r"1 are not in the model \['exp_avg/embed'\]"):
        load(folder, less)
    more = [*state(), Entry("new", "parameter", torch.zeros(2))]
    with pytest.raises(UserError, match=r"1 tensors are not in the checkpoint \['parameter/new'\]"):
        load(folder, more)
    other = [Entry(e.name, e.kind, e.tensor[:-1] if e.name == "bias" else e.tensor) for e in more]
    with pytest.raises(UserError, match=r"buffer/bias is \(5,\), the model's \(4,\)"):
        load(folder, other[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.write_bytes(b"")],
    ids=["flipped", "missing", "truncated", "empty"],
)
def test_damaged_file_is_named_with_a_tensor_it_holds(tmp_path, damage) -> None:
    folder = save(tmp_path, 1)
    damage(folder / "rank-00000.safetensors")
    message = r"rank-00000\.safetensors, which holds 9 tensors such as parameter/embed: "
    with pytest.raises(Corrupt, match=message) as error:
        load(folder, blank(state()))
    assert error.value.exit_code == 3
    with pytest.raises(Corrupt, match=message):
        dict(store.weights(folder))
    assert len(store.check(folder)) == 1


def test_damaged_side_file_is_found(tmp_path) -> None:
    folder = save(tmp_path, 1)
    (folder / "templates" / "chat.jinja").write_text("{{ y }}")
    (problem,) = store.check(folder)
    assert "templates/chat.jinja: not the bytes that were written" in problem


def edited(folder: Path, edit: Callable[[dict], Any]) -> None:
    values = json.loads((folder / manifest.NAME).read_text())
    values = edit(values) or values
    (folder / manifest.NAME).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(format=9), "format 9, this version reads 1"),
        (lambda v: v.pop("files") and None, "not a manifest"),
        (lambda v: [v], "not a manifest"),
        (lambda v: v.update(tensors=[]), "not a manifest"),
        (lambda v: v["tensors"]["buffer/bias"].pop("shape") and None, "not a manifest"),
        (
            lambda v: v["tensors"]["buffer/bias"].update(pieces=[]),
            "pieces of buffer/bias hold 0 of 5 values",
        ),
        (
            lambda v: v["tensors"]["buffer/bias"]["pieces"][0].update(file="../other"),
            r"buffer/bias lies in '\.\./other', which is not in the checkpoint",
        ),
    ],
)
def test_manifest_that_is_none_is_corrupt(tmp_path, edit, message) -> None:
    folder = save(tmp_path, 1)
    edited(folder, lambda values: None)
    load(folder, blank(state()))  # negative control: written anew it still reads
    edited(folder, edit)
    with pytest.raises(Corrupt, match=message):
        load(folder, blank(state()))


def test_folder_without_manifest_is_no_checkpoint(tmp_path) -> None:
    folder = save(tmp_path, 1)
    assert store.is_checkpoint(folder)
    (folder / manifest.NAME).unlink()
    assert not store.is_checkpoint(folder)
    assert store.latest(tmp_path) is None
    with pytest.raises(Corrupt, match=r"step-1 has no manifest\.json"):
        store.Reader(folder)


def test_the_newest_are_kept_and_leftovers_go(tmp_path) -> None:
    for step in (5, 40, 100):
        save(tmp_path, step)
    folder = tmp_path / store.FOLDER
    for name in ("step-7.partial", "step-60", "step-best", "notes"):
        (folder / name).mkdir()
    store.retain(tmp_path, 2)
    assert {p.name for p in folder.iterdir()} == {"step-40", "step-100", "step-best", "notes"}
    assert [step for step, _ in store.steps(tmp_path)] == [40, 100], "by number, not by name"
    assert store.latest(tmp_path) == folder / "step-100"
    store.retain(tmp_path, 5)
    assert len(store.steps(tmp_path)) == 2


def test_full_disk_is_told_and_leaves_nothing_that_loads(tmp_path) -> None:
    save(tmp_path, 1)
    big = [Entry("big", "parameter", torch.zeros(100_000))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"step-2 cannot be written: .*File too large"):
            save(tmp_path, 2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert complete(tmp_path) == {"step-1"}
    assert save(tmp_path, 2, big) == store.latest(tmp_path)


# Kills. Each point is a function that patches the child process, which then saves step 2.


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(tensors: dict, path: Path) -> None:
    from safetensors.torch import save as as_bytes

    path.write_bytes(as_bytes(tensors)[:-100])
    die()


def torn_manifest(self: manifest.Manifest, folder: Path) -> None:
    (folder / manifest.NAME).write_text('{"tensors": {"parameter/emb')
    die()


def half_removed(folder: Path, **_: object) -> None:
    if folder.name == "step-2":
        next(folder.glob("rank-*")).unlink()
        die()


def before_publishing(path: Path) -> None:
    if path.name.endswith(".partial"):  # the folder's own sync is the last before the rename
        die()


POINTS: dict[str, tuple[Any, str, Callable]] = {
    "before the first tensor": (store, "_write_pieces", die),
    "in a tensor file": (store, "save_file", half_written),
    "after the tensor files": (store, "_merge", die),
    "in the manifest": (manifest.Manifest, "write", torn_manifest),
    "after the manifest": (store, "sync", die),
    "before the rename": (store, "sync", before_publishing),
    "at the rename": (Path, "rename", die),
    "while the old one is removed": (store.shutil, "rmtree", half_removed),
}


def kill_while_saving(out: Path, point: str) -> None:
    child = os.fork()
    if child == 0:
        try:
            setattr(*POINTS[point])
            save(out, 2)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it was not killed {point}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def complete(out: Path) -> set[str]:
    """Names of the folders that anything takes for a complete checkpoint."""
    found = set()
    for folder in (out / store.FOLDER).iterdir():
        try:
            dict(store.weights(folder))
            found.add(folder.name)
        except Corrupt:
            pass
        if store.is_checkpoint(folder):
            found.add(folder.name)
    return found | {path.name for _, path in store.steps(out)}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_kill_leaves_nothing_that_is_taken_as_complete(tmp_path, point, again) -> None:
    save(tmp_path, 1)
    if again or "old one" in point:
        save(tmp_path, 2, state(77))
    kill_while_saving(tmp_path, point)
    found = complete(tmp_path)
    assert "step-1" in found
    if "step-2" in found:  # the old one, whole
        assert again
        read = blank(state())
        load(tmp_path / store.FOLDER / "step-2", read)
        assert not differing(read, state(77))
    assert found <= {"step-1", "step-2"}
    save(tmp_path, 2)
    store.retain(tmp_path, 2)
    names = sorted(p.name for p in (tmp_path / store.FOLDER).iterdir())
    assert names == ["step-1", "step-2"]
    assert store.check(tmp_path / store.FOLDER / "step-2") == []


def test_a_manifest_that_comes_too_early_would_be_noticed(tmp_path) -> None:
    """Negative control of the kills: half a folder under its final name, with a manifest."""
    first = save(tmp_path, 1)
    kill_while_saving(tmp_path, "in a tensor file")
    assert complete(tmp_path) == {"step-1"}
    folder = (first.parent / "step-2.partial").rename(first.parent / "step-2")
    shutil.copy(first / manifest.NAME, folder)
    assert complete(tmp_path) == {"step-1", "step-2"}
    with pytest.raises(Corrupt, match="not the bytes that were written"):
        load(folder, blank(state()))


# Ranks.

LINE, ROWS, COLUMNS, WHOLE = (4,), Shard(0), Shard(1), Replicate()
DIVISIONS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": (LINE, (ROWS,)),
    "replicas": (LINE, (WHOLE,)),
    "replicas of rows": ((2, 2), (WHOLE, ROWS)),
    "rows of replicas": ((2, 2), (ROWS, WHOLE)),
    "columns of rows": ((2, 2), (COLUMNS, ROWS)),
}


def divided(division: str, entries: list[Entry]) -> list[Entry]:
    shape, placements = DIVISIONS[division]
    mesh = init_device_mesh("cpu", shape)
    return [
        Entry(e.name, e.kind, distribute_tensor(e.tensor, mesh, placements))
        if e.tensor.ndim >= 2
        else e
        for e in entries
    ]


def gather(value: Any) -> list[Any]:
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def save_and_read_divided(out: Path) -> dict[str, list[str]]:
    """Differences of every tensor read in every division from every division."""
    rank, found = distributed.get_rank(), {}
    for step, saved in enumerate(DIVISIONS):
        torch.manual_seed(rank)
        entries = divided(saved, state())
        folder = store.save(out, step, entries, {}, rank, gather, lambda folder: None)
        for read in DIVISIONS:
            target = divided(read, blank(state()))
            load(folder, target)
            local = [Entry(e.name, e.kind, _whole(e.tensor)) for e in target]
            found[f"{saved} to {read}"] = differing(local, state())
        with store.Reader(folder) as reader:
            if not torch.equal(reader.random_state(rank), torch.get_rng_state()):
                found[f"random state of {saved}"] = [str(rank)]
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.slow
def test_any_division_reads_what_any_other_wrote(tmp_path) -> None:
    for found in run_ranks(save_and_read_divided, 4, tmp_path):
        assert len(found) == len(DIVISIONS) ** 2
        assert not {name: tensors for name, tensors in found.items() if tensors}
    for step, saved in enumerate(DIVISIONS):
        folder = tmp_path / store.FOLDER / f"step-{step}"
        read = blank(state())
        load(folder, read)
        assert not differing(read, state())
        records = manifest.Manifest.read(folder).tensors
        expected = {"rows": 3, "replicas": 1, "replicas of rows": 2, "rows of replicas": 2}
        assert len(records["parameter/experts"].pieces) == expected.get(saved, 4)
    edited(folder, lambda v: v["tensors"]["parameter/experts"]["pieces"].pop() and None)
    with pytest.raises(Corrupt, match="pieces of parameter/experts hold"):  # negative control
        load(folder, blank(state()))
