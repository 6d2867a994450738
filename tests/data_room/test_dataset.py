"""Packed sequences hold the prepared tokens, in an order that data, seed and weights decide."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from harness import run_ranks
from torch import Tensor, distributed
from transformers import LlamaConfig, LlamaForCausalLM

from moe.data.dataset import Sample, build_dataset
from moe.data.manifest import path_of, read_manifest
from moe.data.prepare import prepare
from moe.data.sampler import Batches
from moe.errors import Corrupt, UserError

SEQUENCE = 64


def build(sources, cache: Path, **options):
    settings = {"sequence_length": SEQUENCE, "num_samples": None, "seed": 3, "cache": cache}
    return build_dataset(sources, **{**settings, **options})


def copy_of(prefix: Path, folder: Path) -> Path:
    for extension in ("bin", "idx", "json"):
        shutil.copy(path_of(prefix, extension), path_of(folder / prefix.name, extension))
    return folder / prefix.name


def digest(sample: Sample) -> bytes:
    return sample["tokens"].numpy().tobytes()


def order(dataset, count: int) -> list[bytes]:
    return [digest(dataset[index]) for index in range(count)]


def test_samples_of_one_pass_are_the_documents_cut_into_sequences(maths_prefix, tmp_path) -> None:
    from moe.data.indexed import IndexedDataset

    dataset = build([(maths_prefix, 1.0)], tmp_path)
    manifest = read_manifest(maths_prefix)
    assert len(dataset) == (manifest.tokens - 1) // SEQUENCE
    indexed = IndexedDataset(str(maths_prefix))
    stream = numpy.concatenate([indexed[int(index)] for index in dataset.document_index])
    expected = {
        stream[start : start + SEQUENCE + 1].astype(numpy.int64).tobytes()
        for start in range(0, len(dataset) * SEQUENCE, SEQUENCE)
    }
    found = set()
    for sample in map(dataset.__getitem__, range(len(dataset))):
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        found.add(torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy().tobytes())
    assert found == expected


def test_every_pass_has_the_same_samples_in_another_order(maths_prefix, tmp_path) -> None:
    size = len(build([(maths_prefix, 1.0)], tmp_path))
    dataset = build([(maths_prefix, 1.0)], tmp_path, num_samples=3 * size)
    samples = order(dataset, 3 * size)
    passes = [samples[start : start + size] for start in range(0, 3 * size, size)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert order(dataset, size) == passes[0], "going back must not depend on what was read since"


def test_longer_run_begins_with_the_shorter_one(maths_prefix, code_prefix, tmp_path) -> None:
    sources = [(maths_prefix, 0.7), (code_prefix, 0.3)]
    short = order(build(sources, tmp_path, num_samples=500), 500)
    assert order(build(sources, tmp_path / "other", num_samples=2000), 500) == short
    assert order(build(sources, tmp_path, num_samples=500, seed=4), 500) != short
    reweighted = [(maths_prefix, 0.5), (code_prefix, 0.5)]
    assert order(build(reweighted, tmp_path, num_samples=500), 500) != short


@pytest.mark.parametrize("weights", [(0.7, 0.3), (9.0, 1.0)])
def test_blend_keeps_its_weights_from_the_first_sample_on(
    maths_prefix, code_prefix, tmp_path, weights
) -> None:
    maths = set(
        order(build([(maths_prefix, 1.0)], tmp_path), len(build([(maths_prefix, 1.0)], tmp_path)))
    )
    sources = list(zip((maths_prefix, code_prefix), weights, strict=True))
    samples = order(build(sources, tmp_path, num_samples=1000), 1000)
    share = weights[0] / sum(weights)
    for count in (10, 100, 1000):
        drawn = sum(sample in maths for sample in samples[:count])
        assert abs(drawn - share * count) <= 1


def test_validation_holds_every_sample_of_every_source_once(
    maths_prefix, code_prefix, tmp_path
) -> None:
    parts = [build([(prefix, 1.0)], tmp_path) for prefix in (maths_prefix, code_prefix)]
    both = build([(maths_prefix, 1.0), (code_prefix, 1.0)], tmp_path)
    expected = [sample for part in parts for sample in order(part, len(part))]
    assert sorted(order(both, len(both))) == sorted(expected)


def documents_of(positions: Tensor) -> list[slice]:
    """The stretches between the places where positions restart."""
    starts = [*torch.nonzero(positions == 0)[:, 0].tolist(), len(positions)]
    return [slice(a, b) for a, b in pairwise(starts)]


def test_positions_restart_and_loss_is_masked_after_each_document(maths_prefix, tmp_path) -> None:
    dataset = build([(maths_prefix, 1.0)], tmp_path, document_boundaries="attention")
    plain = build([(maths_prefix, 1.0)], tmp_path)
    eos = read_manifest(maths_prefix).tokenizer.eos_id
    boundaries = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        ends = sample["tokens"] == eos
        assert torch.equal(sample["loss_mask"], 1.0 - ends.float())
        for document in documents_of(sample["position_ids"]):
            positions = sample["position_ids"][document]
            assert torch.equal(positions, torch.arange(len(positions)))
            assert not ends[document][:-1].any()
        boundaries += int(ends.sum())
        assert digest(plain[index]) == digest(sample)
        assert torch.equal(plain[index]["position_ids"], torch.arange(SEQUENCE))
        assert plain[index]["loss_mask"].sum() == SEQUENCE
    assert boundaries > 100


def test_eos_inside_a_document_is_no_boundary(tokenizer, tmp_path) -> None:
    turns = "question</s>answer</s>" * 20
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name + turns)
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    prepare(sources, tokenizer, tmp_path / "chat", quiet=True)
    length = read_manifest(tmp_path / "chat").tokens - 1
    dataset = build(
        [(tmp_path / "chat", 1.0)],
        tmp_path,
        sequence_length=length,
        document_boundaries="attention",
    )
    sample = dataset[0]
    # 40 a document, which ends in one and gets no other; the very last is a label only
    assert int((sample["tokens"] == 1).sum()) == 79
    assert int((sample["position_ids"] == 0).sum()) == 2
    assert int((sample["loss_mask"] == 0).sum()) == 1


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.mul_(8)  # attention that matters
    return model


def logits_error(model, dataset, use_cache: bool = False) -> float:
    """Largest difference of a packed batch's logits from each document's own, relative to them."""
    samples = [dataset[index] for index in range(4)]
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    with torch.no_grad():
        packed = model(
            batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("attention_mask"),
            use_cache=use_cache,
        ).logits
        worst = 0.0
        for row, tokens in enumerate(batch["tokens"]):
            boundary = tokens[:-1] == 1
            starts = [0, *(torch.nonzero(boundary)[:, 0] + 1).tolist(), len(tokens)]
            for a, b in pairwise(starts):
                alone = model(tokens[None, a:b]).logits[0]
                error = (packed[row, a:b] - alone).abs().max() / alone.abs().max()
                worst = max(worst, float(error))
    return worst


def test_packed_documents_get_the_logits_they_get_alone(llama, maths_prefix, tmp_path) -> None:
    def error(boundaries: str, **options) -> float:
        dataset = build([(maths_prefix, 1.0)], tmp_path, document_boundaries=boundaries)
        return logits_error(llama, dataset, **options)

    assert error("attention") < 1e-5
    assert error("none") > 0.1, "without boundaries documents must see each other"
    assert error("positions") > 0.1, "restarted positions alone do not separate documents"
    assert error("attention", use_cache=True) > 0.1, "transformers packs only without a cache"


def test_damaged_missing_or_unfit_data_is_refused(
    maths_prefix, code, other_tokenizer, tokenizer, tmp_path
) -> None:
    other = tmp_path / "other"
    prepare([str(code)], other_tokenizer, other, limit_documents=3, quiet=True)
    sources = [(maths_prefix, 1.0)]
    with pytest.raises(UserError, match=r"different tokenizers \(512 and 400 tokens"):
        build([*sources, (other, 1.0)], tmp_path)
    with pytest.raises(UserError, match=f"{other_tokenizer} have different tokenizers"):
        build(sources, tmp_path, tokenizer=other_tokenizer)
    build(sources, tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="fewer than one sequence of 10,000,000"):
        build(sources, tmp_path, sequence_length=10_000_000)
    with pytest.raises(UserError, match=r"weight=0\.0 must be positive"):
        build([(maths_prefix, 0.0)], tmp_path, num_samples=10)
    with pytest.raises(UserError, match="not prepared data"):
        build([(tmp_path / "nothing", 1.0)], tmp_path)
    with pytest.raises(UserError, match="at least one source"):
        build([], tmp_path)
    copy = copy_of(maths_prefix, tmp_path)
    path_of(copy, "bin").write_bytes(b"short")
    with pytest.raises(Corrupt, match=r"maths\.bin has 5 bytes"):
        build([(copy, 1.0)], tmp_path)


def test_data_prepared_anew_at_the_same_place_gets_new_indices(
    maths_prefix, code_prefix, tmp_path
) -> None:
    place = copy_of(maths_prefix, tmp_path)
    before = build([(place, 1.0)], tmp_path / "cache")
    for extension in ("bin", "idx", "json"):
        shutil.copy(path_of(code_prefix, extension), path_of(place, extension))
    after = build([(place, 1.0)], tmp_path / "cache")
    fresh = build([(code_prefix, 1.0)], tmp_path / "fresh")
    assert len(before) != len(after) == len(fresh)
    assert order(after, len(after)) == order(fresh, len(fresh))


def test_unfinished_indices_are_never_used(maths_prefix, tmp_path) -> None:
    expected = order(build([(maths_prefix, 1.0)], tmp_path / "whole"), 20)
    (indices,) = (tmp_path / "whole").iterdir()
    torn = tmp_path / "torn" / f"building-{indices.name}"
    shutil.copytree(indices, torn)
    for path in torn.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:64])
    assert order(build([(maths_prefix, 1.0)], tmp_path / "torn"), 20) == expected


def test_cache_that_cannot_be_written_is_an_error(maths_prefix, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the data indices to .*Not a directory"):
        build([(maths_prefix, 1.0)], tmp_path / "file" / "cache")


def _stream_of_rank(sources, cache: Path, micro_batch_size: int) -> list[tuple[int, bytes]]:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    dataset = build_dataset(sources, sequence_length=SEQUENCE, num_samples=48, seed=3, cache=cache)
    batches = Batches(
        dataset,
        global_batch_size=12,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )
    return [batch["tokens"].numpy().tobytes() for batch in batches]


@pytest.mark.slow
def test_two_real_ranks_read_the_stream_that_one_reads(maths_prefix, code_prefix, tmp_path) -> None:
    sources = [(str(maths_prefix), 0.7), (str(code_prefix), 0.3)]
    dataset = build(sources, tmp_path / "one", num_samples=48)
    alone = [
        batch["tokens"] for batch in Batches(dataset, global_batch_size=12, micro_batch_size=3)
    ]
    expected = [micro_batch.numpy().tobytes() for micro_batch in alone]
    ranks = run_ranks(_stream_of_rank, 2, sources, tmp_path / "two", 3)
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == expected
    assert len(list((tmp_path / "two").iterdir())) == 2, "rank 0 alone builds, once a source"
