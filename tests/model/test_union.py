"""A union of experts in whole models: both of its paths, its cache, its modes."""

import pytest
import torch
from tiny import dense_model, routed_model, tokens
from transformers import DynamicCache

from moe.errors import UserError
from moe.kernels import ops
from moe.model.cache import CACHE, RaggedLayer

UNION = {"kind": "uoe", "num_experts": 3, "top_k": 1, "sink_tokens": 1}
SLICES = {"kind": "uoe", "num_experts": 4, "top_k": 2}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def build(family="llama", attention=UNION, mlp=None, dtype=torch.float64, **overrides):
    return routed_model(dense_model(family).to(dtype), attention, mlp, **overrides)


@pytest.fixture
def masked(monkeypatch):
    """`masked(model, …)`: the output of the specification, dense keys under a mask."""

    def call(model, *inputs, **options):
        with monkeypatch.context() as patch:
            patch.setenv("MOE_KERNELS", "naive")
            return model(*inputs, **options)

    return call


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_both_paths_agree_in_every_family(family, masked):
    """mistral and qwen2 slide over 7 and 6 tokens."""
    model, ids = build(family, [UNION, {"kind": "dense"}, UNION]), tokens(3, 24)
    expected = masked(model, ids).logits
    assert relative(model(ids).logits, expected) < 1e-12
    model.model.layers[2].self_attn.router.weight.neg_()  # negative control
    assert relative(model(ids).logits, expected) > 1e-3


PADDING = torch.tensor([[0] * 5 + [1] * 19, [1] * 24])


@pytest.mark.parametrize("given", [
    {}, {"attention_mask": PADDING}, {"attention_mask": PADDING.flip(1)},
    {"position_ids": (torch.arange(24) % 9)[None].expand(2, -1)},
], ids=["plain", "padding on the left", "padding on the right", "documents"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_kernel_over_compacted_keys_agrees(family, given, masked, monkeypatch):
    """Every expert's tokens in one row, in Triton: outputs, gradients, and no other attention."""
    model = build(family, [UNION, {"kind": "uoe", "num_experts": 3, "top_k": 2}, UNION])
    model.train()
    calls, attend = [], ops.attend_heads
    monkeypatch.setattr(ops, "attend_heads", lambda *g: calls.append(len(g[0][0])) or attend(*g))
    there = given.get("attention_mask", torch.ones_like(PADDING)).bool()[..., None]
    direction, found = torch.linspace(-1, 1, 97, dtype=torch.float64), []
    monkeypatch.setenv("MOE_KERNELS", "triton")
    for run in (model, lambda *g, **o: masked(model, *g, **o)):
        model.zero_grad()
        logits = run(tokens(2, 24), use_cache=False, **given).logits * there
        (logits * direction).sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(calls) == 9 and sum(calls) >= 4 * there.sum()
    for actual, expected in zip(*found, strict=True):
        assert relative(actual, expected) < 1e-10


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_both_paths_agree_on_padding_and_documents(implementation, masked):
    model, ids = build(), tokens(2, 20)
    model.set_attn_implementation(implementation)
    padding = torch.ones_like(ids)
    padding[0, :6] = 0
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": padding, "position_ids": positions}
    left, right = model(ids, **options).logits, masked(model, ids, **options).logits
    assert relative(left[padding > 0], right[padding > 0]) < 1e-12
    document = torch.arange(20) // 8
    allowed = (document[:, None] == document) & torch.ones(20, 20).tril().bool()
    mask = allowed.expand(2, 1, 20, 20)
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    options = {"attention_mask": mask, "position_ids": (torch.arange(20) % 8)[None]}
    left, right = model(ids, **options).logits, masked(model, ids, **options).logits
    assert relative(left, right) < 1e-12
    assert relative(model(ids[:, 8:16]).logits, left[:, 8:16]) < 1e-12  # a document is alone


@pytest.mark.parametrize("path", ["naive", "cpu"])
@torch.no_grad()
def test_every_expert_is_the_dense_model_bit_for_bit(path, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", path)
    dense, ids = dense_model(), tokens(2, 24)
    model = routed_model(dense, {**UNION, "top_k": 3})
    if path == "naive":
        assert torch.equal(model(ids).logits, dense(ids).logits)
    assert relative(model(ids).logits, dense(ids).logits) < 1e-5
    fewer = routed_model(dense, {**UNION, "top_k": 2})  # negative control
    assert relative(fewer(ids).logits, dense(ids).logits) > 1e-3


@torch.no_grad()
def test_slices_of_one_ffn_are_the_whole():
    dense, ids = dense_model().double(), tokens(2, 24)
    model = routed_model(dense, None, {**SLICES, "top_k": 4})
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        gate, up, down = (getattr(source.mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
        layer.mlp.experts.gate_up_proj.data = torch.cat(
            [gate.view(4, 16, 72), up.view(4, 16, 72)], 1
        )
        layer.mlp.experts.down_proj.data = down.view(72, 4, 16).transpose(0, 1).contiguous()
    assert relative(model(ids).logits, dense(ids).logits) < 1e-13
    model.model.layers[0].mlp.experts.down_proj[1] *= 1.02  # negative control
    assert relative(model(ids).logits, dense(ids).logits) > 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("path", ["naive", "cpu"])
@torch.no_grad()
def test_a_prompt_in_chunks_and_then_token_by_token(path, family, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", path)
    model, ids = build(family, [UNION, {"kind": "dense"}, UNION]), tokens(2, 26)
    whole = model(ids).logits
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    for length in (9, 5, 1, 1, 6, 1, 1, 1, 1):
        step = model(ids[:, start : start + length], use_cache=True, **{CACHE: cache})
        pieces.append(step.logits)
        start += length
    assert relative(torch.cat(pieces, 1), whole) < 1e-12


@torch.no_grad()
def test_the_cache_holds_the_chosen_tokens_alone():
    model, ids = build(), tokens(1, 64)
    output = model(ids, use_cache=True)
    dense = routed_model(dense_model().double())(ids, use_cache=True)[CACHE].layers
    for index, layer in enumerate(output[CACHE].layers):
        assert isinstance(layer, RaggedLayer)
        kept = sum(int((slots >= 0).sum()) for _, _, slots in layer.experts.values())
        chosen = output.routing[index].attention.counts.sum() + 2  # the sink visits two more
        assert kept == chosen == 66
        assert layer.nbytes() == (dense[index].keys.nbytes + dense[index].values.nbytes) * 66 / 192


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@torch.no_grad()
def test_generation_of_a_padded_batch_is_that_of_each_alone(options, masked, monkeypatch):
    model = build(mlp={**SLICES, "mode": "threshold"})
    prompts = [tokens(1, 7), tokens(1, 12, seed=1)]
    batch = torch.zeros(2, 12, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 12 - prompt.shape[1] :] = prompt
        mask[row, 12 - prompt.shape[1] :] = 1
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **options}
    torch.manual_seed(0)
    together = model.generate(batch, attention_mask=mask, **settings)
    monkeypatch.setenv("MOE_KERNELS", "naive")
    torch.manual_seed(0)
    assert torch.equal(model.generate(batch, attention_mask=mask, **settings), together)
    if "do_sample" not in options:
        for row, prompt in enumerate(prompts):
            assert torch.equal(model.generate(prompt, **settings)[0, -8:], together[row, -8:])


@pytest.mark.parametrize("mode", ["expert_choice", "sequence"])
@torch.no_grad()
def test_modes_that_look_ahead_say_so(mode):
    """Negative control of the prefix test: these must fail it."""
    model, ids = build(attention=None, mlp={**SLICES, "mode": mode, "top_k": 1}), tokens(2, 24)
    assert not model.config.causal
    whole = model(ids).logits
    changed = [relative(model(ids[:, :n]).logits, whole[:, :n]) for n in (3, 9, 15)]
    assert max(changed) > 1e-3
    assert build(attention=None, mlp=SLICES).config.causal


@torch.no_grad()
def test_expert_choice_does_not_generate_and_a_sequence_keeps_its_set():
    ids = tokens(2, 9)
    with pytest.raises(UserError, match=r"expert_choice is not causal.*token_choice"):
        build(mlp={**SLICES, "mode": "expert_choice"}).generate(ids, max_new_tokens=2)
    model = build(attention=None, mlp={**SLICES, "mode": "sequence"})
    cache = DynamicCache(config=model.config)
    model(ids, use_cache=True, **{CACHE: cache})
    kept = [layer.kept["expert_set"].clone() for layer in cache.layers]
    model(tokens(2, 1, seed=5), use_cache=True, **{CACHE: cache})
    cache.reorder_cache(torch.tensor([1, 0]))
    for before, layer in zip(kept, cache.layers, strict=True):
        assert torch.equal(layer.kept["expert_set"], before.flip(0))
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(ids, **settings)
    for row in range(2):
        assert torch.equal(model.generate(ids[row : row + 1], **settings)[0], together[row])


def test_legal_numbers_of_attention_experts_are_listed():
    with pytest.raises(UserError, match=r"num_experts=2 does not divide the 3 KV groups.*1, 3\."):
        build(attention={**UNION, "num_experts": 2})
    with pytest.raises(UserError, match=r"attention\.kv is not a field of kind uoe"):
        build(attention={**UNION, "kv": "shared"})
