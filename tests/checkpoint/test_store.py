"""A checkpoint folder is whole or no checkpoint, on any division of its tensors."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from injection import Call, fork, inject, kill_at
from stored import blank, differing, edited, load, progress, save, state
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moe.checkpoint import manifest, store
from moe.engines.base import Entry
from moe.errors import Corrupt, UserError


def test_every_tensor_comes_back_to_the_last_bit(tmp_path) -> None:
    folder, read = save(tmp_path, 3), blank(state(3))
    assert len(differing(read, state(3))) == 9, "negative control: all but the empty one"
    load(folder, read)
    assert not differing(read, state(3))
    assert store.check(folder) == []
    assert store.progress_of(folder) == progress(3)
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
    with pytest.raises(UserError, match=r"buffer/bias is \(5,\) .*, the model's \(4,\)"):
        load(folder, other[:-1])


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
    for name in ("step-7.1f-2.partial", "step-8.deleted", "step-60", "step-best", "notes"):
        (folder / name).mkdir()
    store.retain(tmp_path, 2)
    assert {p.name for p in folder.iterdir()} == {
        "step-40", "step-100", "step-best", "notes", "latest", "step-60"
    }, "what has lost its manifest is not ours to delete"  # fmt: skip
    assert [step for step, _ in store.steps(tmp_path)] == [40, 100], "by number, not by name"
    assert store.latest(tmp_path) == folder / "step-100"
    store.retain(tmp_path, 5)
    assert len(store.steps(tmp_path)) == 2


def test_multiples_are_kept_for_good(tmp_path) -> None:
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step)
    store.retain(tmp_path, 1, keep_every=10)
    assert [step for step, _ in store.steps(tmp_path)] == [10, 20, 25]
    store.retain(tmp_path, 1)  # negative control
    assert [step for step, _ in store.steps(tmp_path)] == [25]


def test_latest_names_the_newest(tmp_path) -> None:
    for step in (5, 40):
        folder = save(tmp_path, step)
        assert (tmp_path / store.FOLDER / "latest").read_text() == f"{folder.name}\n"
    assert store.stale(tmp_path) is None
    (tmp_path / store.FOLDER / "latest").write_text("step-7\n")
    assert "names 'step-7', which is no checkpoint; the newest is step-40" in store.stale(tmp_path)
    assert store.latest(tmp_path) == folder


def test_every_byte_of_a_checkpoint_has_one_hash(tmp_path) -> None:
    folder = save(tmp_path, 1)
    found = manifest.Manifest.read(folder)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(found.files) == names - {manifest.NAME}
    with pytest.raises(Corrupt, match="do not make up its"):  # negative control
        edited(folder, lambda v: v["tensors"].pop("rng/cpu-00000") and None)
        manifest.Manifest.read(folder)


def test_others_read_the_files_as_safetensors(tmp_path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(save(tmp_path, 1) / "rank-00000.safetensors")
    expected = {f"{e.kind}/{e.name}": e.tensor for e in state(1) if e.tensor.numel()}
    assert tensors.keys() == expected.keys() | {"rng/cpu-00000"}
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# Kills, at every single call that changes the disk.


def complete(out: Path) -> set[str]:
    """Names of the folders that anything takes for a complete checkpoint."""
    found = set()
    for folder in (p for p in (out / store.FOLDER).iterdir() if p.is_dir()):
        try:
            dict(store.weights(folder))
            found.add(folder.name)
        except Corrupt:
            pass
        if store.is_checkpoint(folder):
            found.add(folder.name)
    return found | {path.name for _, path in store.steps(out)}


def calls_of_a_save(out: Path, again: bool) -> list[Call]:
    """What the save of step 2 does, after that of step 1, or of an older step 2 besides."""
    calls: list[Call] = []
    save(out, 1)
    if again:
        save(out, 2, state(77))
    with inject(out, calls.append):
        save_and_retain(out)
    return calls


def save_and_retain(out: Path) -> None:
    save(out, 2)
    store.retain(out, 2)


@pytest.mark.parametrize("half", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_a_kill_at_any_call_leaves_whole_checkpoints_only(tmp_path, again, half) -> None:
    calls = calls_of_a_save(tmp_path / "undisturbed", again)
    assert len(calls) > 30
    seen = set()
    for call in calls[:: 1 if not half else 3]:
        out = tmp_path / f"{call.number}"
        save(out, 1)
        if again:
            save(out, 2, state(77))
        with inject(out, kill_at(call.number, half)):
            (status,) = fork([lambda out=out: save_and_retain(out)])
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, call
        names = complete(out)
        assert "step-1" in names, call
        assert not again or any(n.startswith("step-2") for n in names), f"a moment without: {call}"
        for name in names:
            assert not store.check(out / store.FOLDER / name), call
            read = blank(state())
            load(out / store.FOLDER / name, read)
            held = [n for n in (1, 2, 77) if not differing(read, state(n))]
            assert len(held) == 1, f"{call}: a mixture"
            seen.add((name, held[0]))
        save_and_retain(out)
        left = sorted(p.name for p in (out / store.FOLDER).iterdir())
        assert left == ["latest", "step-1", "step-2"], call
        assert not store.stale(out)
    expected = {("step-1", 1), ("step-2", 2)}
    assert seen >= expected | ({("step-2", 77), ("step-2.replaced", 77)} if again else set())


def test_a_save_that_publishes_too_early_would_be_noticed(tmp_path, monkeypatch) -> None:
    """Negative control of the kills: the old one goes before the new one has its name."""
    from moe.checkpoint import folders

    calls = calls_of_a_save(tmp_path / "undisturbed", True)
    old = [c.number for c in calls if (c.function, c.path) == ("rename", "checkpoints/step-2")]
    right = folders.publish

    def wrong(partial: Path, target: Path, damaged: Any) -> None:
        folders.discard(target)
        right(partial, target, damaged)

    monkeypatch.setattr(folders, "publish", wrong)
    out = tmp_path / "run"
    save(out, 1)
    save(out, 2, state(77))
    with inject(out, kill_at(old[0] + 2)):
        fork([lambda: save_and_retain(out)])
    assert complete(out) == {"step-1"}


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
        folder = store.save(out, step, entries, progress(step), rank, gather, lambda folder: None)
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
