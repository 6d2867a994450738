"""On a CUDA device: packing and whole models on Triton kernels against the specification.

python -m pytest -m gpu tests/gpu
"""

import pytest
import tiny
import torch

from moe.kernels import ops
from moe.kernels.exchange import naive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
MOH_HALF = {"kind": "moh", "shared_heads": [0, 1], "top_k": 2}
SPECS = {
    "moe": (None, tiny.MOE),
    "moh": ({"kind": "moh", "shared_heads": [0, 1], "top_k": 5}, None),
    "moh half": (MOH_HALF, tiny.MOE),
    "uoe": ({"kind": "uoe", "num_experts": 4, "top_k": 2}, None),
    "bam": ({"kind": "bam", "num_experts": 2}, None),
}


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "hidden", "k"), [(1, 64, 1), (513, 72, 3), (4096, 512, 8)])
def test_packing_is_the_specification(ranks, tokens, hidden, k):
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16()
    scores, indices = torch.rand(tokens, 16, device="cuda", generator=generator).topk(k)
    indices[::7, 0] = 16  # a choice without an expert
    packed, expected = (
        ops.pack(x, indices, scores, 16, ranks),
        naive.pack(x, indices, scores, 16, ranks),
    )
    count = len(expected.rows_NH)
    assert torch.equal(packed.rows_NH[:count], expected.rows_NH)
    assert torch.equal(packed.offset_W1, expected.offset_W1)
    back = ops.unpack(packed.rows_NH, packed)
    theirs = naive.unpack(expected.rows_NH, expected.place_TK)
    assert torch.equal(back, theirs)
    assert not torch.equal(ops.unpack(packed.rows_NH.flip(0), packed), theirs) or tokens == 1


def losses_and_gradients(monkeypatch, backend, dtype, spec, padded):
    monkeypatch.setenv("MOE_KERNELS", backend)
    # one layer: what a second one's router sees of rounding makes it choose other parts
    model = tiny.routed_model(tiny.dense_model("llama", num_hidden_layers=1, **SIZES), *spec)
    model = model.to("cuda", torch.bfloat16).to(dtype).train()
    ids = tiny.tokens(4, 200).cuda()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :50] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 50] = -100  # what is made of padding is nobody's business
    output = model(input_ids=ids, labels=labels, attention_mask=mask if padded else None)
    output.loss.backward()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return output.loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_model_in_bf16_is_as_near_as_plain_torch(monkeypatch, name, padded):
    given = SPECS[name], padded
    loss, gradient = losses_and_gradients(monkeypatch, "naive", torch.float32, *given)
    errors = {}
    for backend in ("naive", "triton"):
        near, other = losses_and_gradients(monkeypatch, backend, torch.bfloat16, *given)
        assert abs(near - loss) < 0.03, backend
        errors[backend] = ((gradient - other).norm() / gradient.norm()).item()
    assert errors["triton"] < 1.5 * errors["naive"] + 1e-3, errors
    assert errors["naive"] > 1e-4  # bf16 is what is compared


@pytest.mark.parametrize("name", ["moh half", "uoe"])
def test_cached_decoding_is_the_specification(monkeypatch, name):
    spec = SPECS[name][0], tiny.MOE
    model = tiny.routed_model(tiny.dense_model("llama", num_hidden_layers=1, **SIZES), *spec)
    model = model.to("cuda", torch.bfloat16).eval()
    ids = tiny.tokens(2, 40).cuda()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    made = []
    for backend in ("triton", "naive"):
        monkeypatch.setenv("MOE_KERNELS", backend)
        how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        made.append(model.generate(ids, attention_mask=mask, **how)[:, 40:])
    assert (made[0] == made[1]).float().mean() > 0.8  # near ties may fall the other way
