"""Attention with a gate per head in Triton against its specification in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe.kernels import ops
from moe.kernels.heads import attention, decoding, gating, listing, naive
from moe.kernels.heads import triton as kernels

NAMES = ("out", "dq", "dk", "dv", "dgate")
SHAPES = {  # B, S, L, N, G, d: tiles of 32 rows and 32 keys
    "grouped": (2, 70, 70, 4, 2, 16),
    "9 over 3, odd size": (1, 41, 41, 9, 3, 24),
    "one head a key": (2, 33, 33, 3, 3, 8),
    "one KV head": (1, 50, 50, 8, 1, 16),
    "a cached prefix": (2, 17, 60, 4, 2, 8),
    "one token": (1, 1, 1, 4, 2, 8),
    "decoding": (2, 1, 65, 4, 2, 16),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "triton")


def case(shape, mask="causal", keep=None, dtype=torch.float64) -> dict[str, Tensor | None]:
    """Queries as a model has them, [B, N, S, d] seen as [B, S, N, d]; keys a slice of a cache."""
    batch, length, keys, heads, groups, size = shape
    place = torch.arange(length) + keys - length
    first = {
        "causal": torch.zeros(length),
        "window": (place - 12).clamp(min=0),
        "documents": torch.where(place >= 20, 20, 0),
        "padding": torch.full((length,), min(5, keys)),  # the first five see nothing
        "anything": (torch.rand(batch, length) * (place + 2)).floor(),
    }[mask]
    on = None
    if keep:
        chosen = torch.rand(batch, length, heads).topk(keep, 2).indices
        on = torch.zeros(batch, length, heads, dtype=torch.bool).scatter_(2, chosen, True)
    return {
        "q": torch.randn(batch, heads, length, size).to(dtype).transpose(1, 2),
        "k": torch.randn(batch, groups, keys + 3, size).to(dtype)[:, :, :keys].transpose(1, 2),
        "v": torch.randn(batch, keys, groups, size).to(dtype),
        "gate": torch.rand(batch, length, heads).to(torch.promote_types(dtype, torch.float32)),
        "first": first.expand(batch, length).to(torch.int32),
        "on": on,
        "dout": torch.randn(batch, length, heads, size).to(dtype),
    }


def results(function, given, wide=None, gated=True) -> dict[str, Tensor]:
    names = ("q", "k", "v", "gate") if gated else ("q", "k", "v")
    leaves = [given[n].detach().to(wide or given[n].dtype).requires_grad_() for n in names]
    q, k, v, *gate = leaves
    out = function(q, k, v, given["first"], q.shape[-1] ** -0.5, gate[0] if gate else None,
                   given["on"])  # fmt: skip
    gradients = torch.autograd.grad(out, leaves, given["dout"].to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=False))


def assert_close(given, bound, gated=True) -> None:
    expected = results(naive.attend_heads, given, torch.float64, gated)
    for name, actual in results(ops.attend_heads, given, gated=gated).items():
        error = (actual.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error < bound, f"{name}: {error:.1e}"


SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("documents", "padding", "anything")]


@pytest.mark.parametrize("mask", ["causal", "window", *SLOW])  # fmt: skip
@pytest.mark.parametrize("keep", [None, 1, 2], ids=["all", "one", "two"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_the_specifications(shape, keep, mask):
    assert_close(case(shape, mask, keep), 1e-12)


@pytest.mark.parametrize("mask", ["causal", "window", "anything"])
@pytest.mark.parametrize("keep", [None, 1, 2])
@pytest.mark.parametrize(
    "shape", [(2, 1, 65, 4, 2, 16), (3, 1, 70, 9, 3, 24), (1, 1, 1, 4, 4, 8), (1, 1, 700, 4, 1, 16)]
)
def test_one_token_after_a_cache(shape, keep, mask, monkeypatch):
    """Without gradient a kernel of its own: keys in parts, KV heads that are off not read."""
    given = case(shape, mask, keep)
    given["on"] = given["on"] if keep is None else given["on"] & (torch.rand(shape[0], 1, 1) < 0.8)
    names = "q", "k", "v", "first"
    with torch.no_grad():
        arguments = [*(given[n] for n in names), 0.3, given["gate"], given["on"]]
        expected = naive.attend_heads(*arguments)
        if keep is not None:  # what is not read may be anything
            group = given["on"].unflatten(2, (shape[4], -1)).any(-1)[:, 0]
            given["v"][~group[:, None].expand(given["v"].shape[:3])] = torch.nan
        monkeypatch.setattr(kernels, "forward", None)
        out = ops.attend_heads(*arguments)
    assert (out - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("keep", [None, 2])
def test_without_a_gate(keep):
    assert_close(case(SHAPES["grouped"], keep=keep), 1e-12, gated=False)


@pytest.mark.parametrize("keep", [None, 3])
def test_float32_is_within_its_rounding(keep):
    assert_close(case(SHAPES["9 over 3, odd size"], "window", keep, torch.float32), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_are_as_close_as_plain_torch(dtype):
    given = case(SHAPES["grouped"], keep=2, dtype=dtype)
    exact = results(naive.attend_heads, given, torch.float64)
    plain, ours = results(naive.attend_heads, given), results(ops.attend_heads, given)
    for name in NAMES:
        errors = [(r[name].double() - exact[name]).norm() for r in (ours, plain)]
        assert errors[0] <= 1.5 * errors[1], name


def test_what_is_off_is_zero_and_gets_nothing():
    given = case(SHAPES["grouped"], keep=1)
    found = results(ops.attend_heads, given)
    for name in ("out", "dq", "dgate"):
        assert found[name][~given["on"]].abs().sum() == 0, name
    for name in ("out", "dgate"):  # dq is zero at the first token, which sees one key alone
        assert found[name][given["on"]].reshape(140, -1).norm(dim=1).min() > 0, name


def test_every_head_may_be_on_or_off_anywhere():
    """Segments of any length, empty ones among them; room for more rows than there are."""
    given = case(SHAPES["grouped"])
    given["on"] = torch.rand(2, 70, 4) < torch.tensor([0.9, 0.1, 0.0, 0.0])
    given["on"][1] = False
    assert_close(given, 1e-12)


def test_a_mask_with_more_rows_than_there_is_room_for_stays_within_it():
    """As gates of nan make one: a step that is thrown away must not write past its memory."""
    rows = kernels.rows_of(torch.ones(2, 30, 6, dtype=torch.bool), 3, 50)
    assert len(rows.row_R) == 50
    assert rows.segment.max() == 50 and rows.start.max() == 50 and rows.segment.min() == 0


def test_autocast_casts_as_a_matmul_does():
    given = case(SHAPES["grouped"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attend_heads(given["q"], given["k"], given["v"].bfloat16(), given["first"], 0.25)
    expected = naive.attend_heads(*(given[n] for n in ("q", "k", "v", "first")), 0.25)
    assert out.dtype == torch.bfloat16 and (out - expected).norm() / expected.norm() < 2e-2


def test_rows_are_sorted_within_their_segments():
    on = torch.rand(2, 30, 6) < 0.4
    rows = kernels.rows_of(on, 3, on.numel())
    for segment in range(6):
        batch, group = divmod(segment, 3)
        begin, end = rows.segment[segment : segment + 2].tolist()
        wanted = on[batch, :, 2 * group : 2 * group + 2].flatten().nonzero().flatten()
        assert rows.row_R[begin:end].tolist() == wanted.tolist()
        for position in (0, 7, 29):
            later = wanted[wanted >= 2 * position]
            assert end - rows.start[segment, position] == len(later)


def test_the_gate_of_a_head_with_weight_zero_has_a_gradient():
    """A straight-through router asks what a head would have been worth that it switched off."""
    given = case(SHAPES["grouped"])
    given["gate"][:, :, 1] = 0
    assert_close(given, 1e-12)
    assert results(ops.attend_heads, given)["dgate"][:, :, 1].abs().min() > 0


def test_gradcheck():
    given = case((1, 9, 11, 4, 2, 4), "window", keep=3)
    leaves = [given[n].clone().requires_grad_() for n in ("q", "k", "v", "gate")]

    def function(q, k, v, gate):
        return ops.attend_heads(q, k, v, given["first"], 0.5, gate, given["on"])

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_bits_repeat():
    given = case(SHAPES["grouped"], keep=2, dtype=torch.float32)
    first = results(ops.attend_heads, given)
    for _ in range(3):
        again = results(ops.attend_heads, given)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_opcheck_of_a_gate_apart():
    heads, gate = torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3)
    arguments = heads.requires_grad_(), gate.requires_grad_()
    torch.library.opcheck(torch.ops.moe.gate_heads.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gate_apart(dtype):
    given = [torch.randn(2, 70, 9, 24), torch.randn(2, 70, 9)]
    dout, found = torch.randn(2, 9, 70, 24).transpose(1, 2).to(dtype), []
    for function in (ops.gate_heads, lambda h, g: h.double() * g.double()[..., None]):
        leaves = [given[0].to(dtype).requires_grad_(), given[1].clone().requires_grad_()]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for actual, expected in zip(*found, strict=True):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-6 if dtype == torch.float64 else 4e-3)
    assert torch.equal(ops.gate_heads(given[0], torch.ones(2, 70, 9)), given[0])
    with pytest.raises(ValueError, match=r"Expected \[B, S, N\]"):
        ops.gate_heads(given[0], torch.ones(2, 70))


def test_rows_over_several_parts():
    """Each program of the list counts what lies in the parts before its own."""
    on = torch.rand(2, 1500, 6) < 0.4
    rows = kernels.rows_of(on, 2, on.numel())
    flat = on.view(2, 1500, 2, 3).transpose(1, 2).reshape(4, -1)
    assert rows.segment.tolist() == [0, *flat.sum(1).cumsum(0).tolist()]
    assert (
        rows.row_R[: flat.sum()].tolist() == torch.cat([f.nonzero()[:, 0] for f in flat]).tolist()
    )
    before = (flat.cumsum(1) - flat.long())[:, ::3] + rows.segment[:-1, None]
    assert torch.equal(rows.start.long(), before)


MUTATIONS = {
    "a key too many": ("key[None, :] <= high[:, None]", "key[None, :] <= high[:, None] + 1"),
    "a window too wide": ("key[None, :] >= low[:, None]", "key[None, :] >= low[:, None] - 1"),
    "a window's edge taken as full": ("low, 0), 0) + BN - 1) // BN) * BN", "low, 0), 0)) * 0)"),
    "sums not rescaled": ("total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    "delta ungated": ("delta = delta * weight", "delta = delta * 1"),
    "keys of another head": ("k + batch * k_b + head_g * k_g, v +", "k + batch * k_b, v +"),
    "dv without the gate": ("tl.store(draw + out_at, do,", "tl.store(draw + out_at, 2 * do,"),
    "dkv of too many free rows": ("tl.maximum(n + BN - 1 - shift, 0)", "tl.maximum(n - shift, 0)"),
    "dkv's windows forgotten": ("(n >= tl.load(latest + batch))", "(n >= 0)"),
    "dq unscaled": ("narrow(acc * scale_e, dq", "narrow(acc, dq"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(mutation, monkeypatch, tmp_path):
    there, instead = MUTATIONS[mutation]
    text = Path(attention.__file__).read_text()
    assert there in text
    path = tmp_path / "broken.py"
    path.write_text(text.replace(there, instead))
    broken: dict = {"__name__": "broken", "__file__": str(path)}
    exec(compile(path.read_text(), path, "exec"), broken)
    for name in ("attend", "attend_dq", "attend_dkv"):
        monkeypatch.setattr(attention, name, broken[name])
    with pytest.raises(AssertionError):
        assert_close(case(SHAPES["grouped"], "window"), 1e-12)
        assert_close(case((1, 140, 140, 4, 2, 16)), 1e-12)


def test_opcheck():
    given = case(SHAPES["grouped"], keep=2, dtype=torch.float32)
    rows = list(kernels.rows_of(given["on"], 2, 2 * 70 * 2))
    leaves = [given[n].requires_grad_() for n in ("q", "k", "v", "gate")]
    first = given["first"].contiguous()
    torch.library.opcheck(torch.ops.moe.attend_heads.default, (*leaves, first, rows, 0.25))
    torch.library.opcheck(torch.ops.moe.attend_heads.default, (*leaves, first, [], 0.25))


def test_wrong_inputs_are_refused_in_words():
    given = case(SHAPES["grouped"])
    q, k, v, first, gate = (given[n] for n in ("q", "k", "v", "first", "gate"))
    with pytest.raises(ValueError, match=r"k and v \[B, L, G, d\]"):
        ops.attend_heads(q, k[:, :5], v, first, 1.0)
    with pytest.raises(ValueError, match="4 heads over 2 KV heads, 70 queries and 9 keys"):
        ops.attend_heads(q, k[:, :9], v[:, :9], first, 1.0)
    with pytest.raises(ValueError, match="dtypes differ"):
        ops.attend_heads(q, k, v.float(), first, 1.0)
    with pytest.raises(ValueError, match=r"first is \(2, 3\), not"):
        ops.attend_heads(q, k, v, first[:, :3], 1.0)
    with pytest.raises(ValueError, match=r"gate is \(2, 70, 3\), not \[B, S, N\]"):
        ops.attend_heads(q, k, v, first, 1.0, gate[..., :3])


BROKEN = {  # file: kernels, and what is wrong with one of them
    decoding: (("decode_parts", "merge_parts"), {
        "the last key": ("span, L) - 1 + member", "span, L) - 2 + member"),
        "parts not rescaled": ("acc = acc * old_share[:, None]", "acc = acc"),
        "another head's gate": ("gate + head,", "gate + head // 2,"),
    }),
    gating: (("gate_rows", "ungate_rows"), {
        "gradient without the gate": ("gradient *= tl.load(", "gradient += 0 * tl.load("),
        "a row's gate": ("tl.load(gate + row, mask=row < R, other=0).to(ACC)\n    product",
                         "tl.load(gate + row // 2, mask=row < R, other=0).to(ACC)\n    product"),
    }),
    listing: (("count_on", "place_on"), {
        "rows in another place": ("slot = seen + tl.cumsum", "slot = seen + 1 + tl.cumsum"),
        "what is off": ("mask=(there > 0) & (slot < most)", "mask=slot < most"),
        "parts before its own": ("mask=at < mine, other=0)", "mask=at < mine - 1, other=0)"),
    }),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("module", "wrong"), [
    pytest.param(module, wrong, id=name)
    for module, (_, mutations) in BROKEN.items() for name, wrong in mutations.items()
])  # fmt: skip
def test_broken_kernels_around_attention_are_found(module, wrong, monkeypatch, tmp_path):
    text = Path(module.__file__).read_text()
    assert wrong[0] in text
    path = tmp_path / "broken.py"
    path.write_text(text.replace(*wrong))
    broken: dict = {"__name__": "broken", "__file__": str(path)}
    exec(compile(path.read_text(), path, "exec"), broken)
    for name in BROKEN[module][0]:
        monkeypatch.setattr(module, name, broken[name])
    with pytest.raises(AssertionError):
        test_one_token_after_a_cache((1, 1, 700, 4, 1, 16), None, "causal", monkeypatch)
        monkeypatch.undo()
        for name in BROKEN[module][0]:
            monkeypatch.setattr(module, name, broken[name])
        monkeypatch.setenv("MOE_KERNELS", "triton")
        test_a_gate_apart(torch.float64)
        test_rows_over_several_parts()


@pytest.mark.parametrize("backend", ["triton", "cpu", "naive"])
def test_bad_and_empty_input(backend, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", backend)
    given = case(SHAPES["grouped"], keep=2)
    q, k, v, first, gate, on = (given[n] for n in ("q", "k", "v", "first", "gate", "on"))
    out = ops.attend_heads(q, k, v, first - 9, 0.25, gate, on)  # before the first key is nothing
    assert (out - ops.attend_heads(q, k, v, first, 0.25, gate, on)).abs().max() < 1e-12
    nan = gate.masked_fill(~on, torch.nan)  # the gate of a head that is off does not matter
    assert torch.equal(
        ops.attend_heads(q, k, v, first, 0.25, nan, on)[~on].unique(), out.new_zeros(1)
    )
    none = [t[:0] for t in (q, k, v, first)]
    assert ops.attend_heads(*none, 0.25, gate[:0], on[:0]).shape == (0, 70, 4, 16)
    with torch.no_grad():
        one = [none[0][:, :1], *none[1:3], none[3][:, :1]]
        assert ops.attend_heads(*one, 0.25, gate[:0, :1]).shape == (0, 1, 4, 16)
    for message, wrong in {
        "on is torch.int64": (first, gate, on.long()),
        "not whole numbers": (first.float(), gate, on),
        "cpu and meta": (first, gate.to("meta"), on),
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.attend_heads(q, k, v, wrong[0], 0.25, *wrong[1:])
