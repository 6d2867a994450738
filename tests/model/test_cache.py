"""What decoding keeps of a union, row by row: selected, repeated, and never any padding."""

import pytest
import torch
from tiny import dense_model, routed_model, tokens
from transformers import DynamicCache

from moe.model.cache import CACHE

UNION = {"kind": "uoe", "num_experts": 3, "top_k": 1, "sink_tokens": 1}
SEQUENCE = {"kind": "uoe", "num_experts": 4, "top_k": 1, "mode": "sequence"}
LENGTH = 9
# where each keeps its rows: a ragged layer's experts, or beside the keys of an ordinary one
HOLDERS = {
    "ragged": ("cpu", UNION, None),
    "kept, selected keys": ("naive", UNION, None),
    "kept, expert sets": ("cpu", None, SEQUENCE),
}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def after(monkeypatch):
    """`after(holder)`: a model and a function from ids [B, 9] to their logits and cache."""

    def build(holder: str):
        path, attention, mlp = HOLDERS[holder]
        monkeypatch.setenv("MOE_KERNELS", path)
        model = routed_model(dense_model().double(), attention, mlp)

        def read(ids: torch.Tensor, cache=None) -> tuple[torch.Tensor, DynamicCache]:
            cache = DynamicCache(config=model.config) if cache is None else cache
            return model(ids, use_cache=True, **{CACHE: cache}).logits, cache

        return read

    return build


CHANGES = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("holder", HOLDERS)
@torch.no_grad()
def test_a_cache_whose_rows_were_changed_is_that_of_those_rows(change, holder, after):
    """As contrastive search and beams do, in the middle of a sequence."""
    alter, rows = CHANGES[change]
    read, ids = after(holder), tokens(3, LENGTH + 4)
    prompt, (next_ids, last_ids) = ids[:, :LENGTH], ids[rows, LENGTH:].split(2, 1)
    _, cache = read(prompt)
    alter(cache)
    _, fresh = read(prompt[rows])
    for step in (next_ids, last_ids):
        actual, expected = read(step, cache)[0], read(step, fresh)[0]
        assert actual.shape == expected.shape and relative(actual, expected) < 1e-13
    _, wrong = read(prompt[[2, 1, 0, 2, 1, 0][: len(rows)]])  # negative control
    assert relative(read(next_ids, wrong)[0], read(next_ids, read(prompt[rows])[1])[0]) > 1e-3


@torch.no_grad()
def test_a_padded_batch_is_remembered_as_its_tokens_alone():
    """Keys and values of padding are never stored, on the left or in between, nor their bytes."""
    model = routed_model(dense_model().double(), UNION)
    ids = tokens(2, 12)
    valid = torch.ones_like(ids)
    valid[0, :7] = 0
    valid[1, 4:6] = 0
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": valid, "position_ids": positions}
    together = model(ids, use_cache=True, **options)[CACHE].layers
    alone = []
    for row in range(2):
        held = valid[row].bool()
        where = {"position_ids": positions[row, held][None]}
        alone.append(model(ids[row, held][None], use_cache=True, **where)[CACHE].layers)
    for index, layer in enumerate(together):
        for expert, (keys, _, slots) in layer.experts.items():
            rows = [each[index].experts.get(expert) for each in alone]
            counts = [0 if row is None else row[0].shape[1] for row in rows]
            assert (slots >= 0).sum(1).tolist() == counts and keys.shape[1] == max(counts)
            for row, count in enumerate(counts):
                kept = valid[row].nonzero().flatten()
                assert set(slots[row, :count].tolist()) <= set(kept.tolist())
                if count:
                    torch.testing.assert_close(keys[row, :count], rows[row][0][0])
    unmasked = model(ids, use_cache=True, position_ids=positions)[CACHE].layers  # negative control
    assert all(more.nbytes() > less.nbytes() for more, less in zip(unmasked, together, strict=True))
