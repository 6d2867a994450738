"""Where a run starts: the newest sound checkpoint, a named one, or only the weights of one."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from injection import as_rank, free_port, fresh
from invoke import moe

from moe.checkpoint import damage, manifest, store
from moe.data.prepare import prepare
from moe.errors import Corrupt, UserError

OPTIONS = ("train.steps=6", "checkpoint.every=2", "schedule.kind=constant")


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    toy_run.run(toys.config(out, *OPTIONS))
    return out


@pytest.fixture
def out(straight, tmp_path) -> Path:
    return shutil.copytree(straight, tmp_path / "run")


def flip(path: Path, byte: int | None = None) -> None:
    """One bit, of a moment in the middle if no byte is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if byte is None else byte] ^= 4
    path.write_bytes(content)


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / store.FOLDER).glob("step-*"))


def weights_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return {n: t for n, t in toy_run.checkpoint(out, step).items() if n.startswith("parameter/")}


def test_run_goes_on_from_the_newest_sound_checkpoint(toys, straight, out) -> None:
    flip(out / "checkpoints/step-6/rank-00000.safetensors")
    (out / "checkpoints/step-4/rank-00000.safetensors").unlink()
    (hurt,) = store.check(out / "checkpoints/step-6")
    before = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    printed = toy_run.run(toys.config(out, *OPTIONS, "train.steps=2"))  # nothing to do
    assert f"{hurt}\n" in printed and hurt.tensors[0] in printed
    assert f"{out}/checkpoints/step-4/rank-00000.safetensors: missing: " in printed
    assert "damaged: step-6, step-4; the newest sound checkpoint is step-2" in printed
    assert {p: p.read_bytes() for p in before} == before, "what is damaged is left as it is"
    printed = toy_run.run(toys.config(out, *OPTIONS))
    assert f"going on from {out}/checkpoints/step-2" in printed
    assert names(out) == ["step-2", "step-4", "step-4.damaged", "step-6", "step-6.damaged"]
    assert not toy_run.differing(toy_run.checkpoint(out, 6), toy_run.checkpoint(straight, 6))
    aside = out / "checkpoints/step-6.damaged/rank-00000.safetensors"
    assert aside.read_bytes() == before[out / "checkpoints/step-6/rank-00000.safetensors"]
    printed = toy_run.run(toys.config(out, *OPTIONS))
    assert "damaged" not in printed


def test_retention_does_not_count_what_is_damaged(toys, out) -> None:
    flip(out / "checkpoints/step-6/rank-00000.safetensors")
    toy_run.run(toys.config(out, *OPTIONS, "checkpoint.every=1", "train.steps=5",
                            "checkpoint.keep=1"))  # fmt: skip
    assert names(out) == ["step-5", "step-6.damaged"]


def test_checkpoint_without_its_manifest_is_told_too(toys, out) -> None:
    (out / "checkpoints/step-6/manifest.json").unlink()
    printed = toy_run.run(toys.config(out, *OPTIONS))
    assert "step-6/manifest.json: " in printed and "newest sound checkpoint is step-4" in printed
    assert names(out) == ["step-2", "step-4", "step-6", "step-6.damaged"]


def test_damage_of_a_named_checkpoint_is_an_error_with_the_one_to_name(toys, out, tmp_path) -> None:
    folder = out / "checkpoints/step-6"
    flip(folder / "rank-00000.safetensors")
    named = f"train.resume={folder}"
    for place in (out, tmp_path / "other"):
        with pytest.raises(Corrupt, match=r"The newest sound one is .*step-4: name that") as error:
            toy_run.run(toys.config(place, *OPTIONS, named))
        assert "rank-00000.safetensors: not the bytes that were written: " in str(error.value)
    assert not (tmp_path / "other/checkpoints").exists()


def test_no_sound_checkpoint_is_an_error(toys, out) -> None:
    for folder in (out / "checkpoints").glob("step-*"):
        flip(folder / "rank-00000.safetensors")
    with pytest.raises(Corrupt, match="None of the 3 checkpoints is sound"):
        toy_run.run(toys.config(out, *OPTIONS))
    assert names(out) == ["step-2", "step-4", "step-6"]


@pytest.mark.slow
def test_ranks_find_damage_together_and_read_each_byte_once(toys, out) -> None:
    flip(out / "checkpoints/step-6/rank-00000.safetensors")
    expected = {f"step-{n}": manifest.Manifest.read(out / f"checkpoints/step-{n}") for n in (4, 6)}
    port, config = free_port(), toys.config(out, *OPTIONS)

    def one(rank: int) -> None:
        as_rank(rank, 2, port)
        log, right = out.parent / f"hashed {rank}", damage.hash_range

        def hash_range(file: Any, start: int, size: int) -> str:
            place = os.readlink(f"/proc/self/fd/{file.fileno()}")
            with log.open("a") as lines:
                lines.write(f"{place}\t{start}\t{size}\n")
            return right(file, start, size)

        damage.hash_range = hash_range
        (out.parent / f"printed {rank}").write_text(toy_run.run(config))

    assert fresh([lambda rank=rank: one(rank) for rank in (0, 1)]) == [0, 0]
    printed = [(out.parent / f"printed {rank}").read_text() for rank in (0, 1)]
    assert "damaged: step-6; the newest sound checkpoint is step-4" in printed[0]
    assert "damaged" not in printed[1]
    both = [(out.parent / f"hashed {rank}").read_text().splitlines() for rank in (0, 1)]
    hashed = sorted(both[0] + both[1])
    assert len(set(hashed)) == len(hashed) and min(map(len, both)) > 0
    total = sum(int(line.split("\t")[2]) for line in hashed)
    assert total == sum(f.bytes for m in expected.values() for f in m.files.values())


# Parts of a checkpoint.


def test_run_starts_from_the_weights_of_a_checkpoint(toys, straight, tmp_path) -> None:
    start, out = straight / "checkpoints/step-4", tmp_path / "new"
    options = (f"model={start}", "train.steps=1", "optimizer.lr=1e-9", "optimizer.weight_decay=0")
    printed = toy_run.run(toys.config(out, *options))
    assert "steps 0 to 1" in printed and "going on" not in printed
    found, expected = weights_of(out, 1), weights_of(straight, 4)
    assert found.keys() == expected.keys() and toy_run.distance(found, expected) < 1e-6
    assert toy_run.distance(found, weights_of(straight, 2)) > 1e-4, "negative control"
    progress = store.progress_of(out / "checkpoints/step-1")
    assert (progress.step, progress.updates) == (1, 1)
    assert [s["recipe"] for s in progress.origin] == ["train"]
    assert progress.origin[0]["options"]["steps"] == 4
    files = {p.name for p in (out / "checkpoints/step-1").iterdir()}
    assert {"config.json", "tokenizer.json", "manifest.json"} <= files
    assert not store.check(out / "checkpoints/step-1")


def test_damaged_checkpoint_is_no_start_model(toys, out, tmp_path) -> None:
    start = out / "checkpoints/step-4"
    flip(start / "rank-00000.safetensors")
    toy_run.run(toys.config(tmp_path / "moments", f"model={start}", "train.steps=1"))  # unread
    (piece,) = manifest.Manifest.read(start).tensors["parameter/model.norm.weight"].pieces
    flip(start / piece.file, piece.start)
    with pytest.raises(Corrupt, match=r"not the bytes that were written: parameter/model\.norm"):
        toy_run.run(toys.config(tmp_path / "new", f"model={start}"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damage_of_config_or_tokenizer_is_found_by_all_that_read_them(
    toys, out, tmp_path, name
) -> None:
    start = out / "checkpoints/step-4"
    commands = [
        ("inspect", start),
        ("generate", start, "--prompt", "a", "--max-new-tokens", 1),
        ("export", start, "--to", "hf", "--out", tmp_path / "exported"),
    ]
    assert [moe(*command).code for command in commands] == [0] * 3  # negative control
    shutil.rmtree(tmp_path / "exported")
    text = (start / name).read_text()
    changed = text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02').replace(
        '"a": 13', '"a": 12'
    )
    assert changed != text
    (start / name).write_text(changed)
    for command in commands:
        code, _, said = moe(*command)
        assert code == 3 and f"step-4/{name}: " in said, (command, said)
    with pytest.raises(Corrupt, match=f"step-4/{name}: not the bytes"):
        toy_run.run(toys.config(tmp_path / "new", f"model={start}"))


@pytest.fixture(scope="module")
def other_data(toys, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("other")
    source = folder / "text.jsonl"
    lines = (toys.data.parent / "text.jsonl").read_text().splitlines()
    source.write_text("\n".join(reversed(lines)) + "\n")
    prepare([str(source)], str(toys.model), folder / "data", workers=1, quiet=True)
    return f"data.train=[{{path: {folder / 'data'}}}]"


def samples(config: Any) -> tuple[str, list[torch.Tensor], int]:
    """What a run prints, the tokens of its steps, and the sample it began with."""
    from moe.train import loop

    seen, begun, right = [], [], loop.Batches

    class Watched(right):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            begun.append(options["consumed_samples"])
            super().__init__(*arguments, **options)

        def __next__(self) -> Any:
            batch = super().__next__()
            seen.append(batch["tokens"].clone())
            return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Batches", Watched)
        return toy_run.run(config), seen, begun[0]


def test_other_data_begin_with_their_first_sample(toys, out, tmp_path, other_data) -> None:
    _, first, _ = samples(toys.config(tmp_path / "fresh", other_data, "train.steps=8"))
    restart = (*OPTIONS, other_data, "data.restart=true", "train.steps=8", "checkpoint.keep=9")
    printed, seen, begun = samples(toys.config(out, *restart))
    assert begun == 0 and "with the first sample of its data (data.restart)" in printed
    assert len(seen) == 8 and all(map(torch.equal, seen, first))
    kept = store.progress_of(out / "checkpoints/step-8")
    assert (kept.consumed_samples, kept.data_step, kept.updates) == (16, 6, 8)
    shutil.rmtree(out / "checkpoints/step-8")
    _, _, begun = samples(toys.config(out, *restart))
    assert begun == 0, "killed before its first save, it begins again"
    printed, seen, begun = samples(toys.config(out, *restart, "train.steps=10"))
    assert begun == 16 and "data.restart)" not in printed, "once it has begun it goes on"
    batch = ("train.global_batch_size=4", "train.steps=12")
    with pytest.raises(UserError, match=r"train\.global_batch_size=8, not 4"):
        toy_run.run(toys.config(out, *restart, *batch))


def test_without_restart_other_data_go_on_where_the_old_ones_were(toys, out, other_data) -> None:
    """Negative control."""
    _, _, begun = samples(toys.config(out, *OPTIONS, other_data, "train.steps=8"))
    assert begun == 48
