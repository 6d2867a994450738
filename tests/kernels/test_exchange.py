"""Packing for expert parallelism: every rank of it in one process, against no packing at all."""

import pytest
import torch
from torch import Tensor

from moe.kernels import ops
from moe.kernels.exchange import naive
from moe.kernels.exchange import triton as kernels

SHAPES = {  # T, H, I, E, K, W
    "even": (37, 24, 16, 8, 2, 4),
    "all to one rank": (20, 16, 8, 8, 3, 1),
    "an expert a rank": (19, 16, 8, 6, 3, 6),
    "all experts": (11, 16, 8, 4, 4, 2),
    "one token": (1, 1040, 8, 4, 2, 2),
    "top 1": (33, 16, 8, 4, 1, 2),
    "many": (70, 8, 8, 64, 8, 8),
}
FIELDS = naive.Packed._fields


@pytest.fixture(params=["naive", "triton"])
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("MOE_KERNELS", request.param)
    return request.param


def case(shape, none=0.0, dtype=torch.float64) -> dict[str, Tensor]:
    tokens, hidden, inner, experts, k, _ = shape
    indices = torch.rand(tokens, experts).topk(k).indices
    indices[torch.rand(tokens, k) < none] = experts
    return {
        "x": torch.randn(tokens, hidden, dtype=dtype),
        "w1": torch.randn(experts, 2 * inner, hidden, dtype=dtype) / hidden**0.5,
        "w2": torch.randn(experts, hidden, inner, dtype=dtype),
        "indices": indices,
        "weights": torch.rand(tokens, k, dtype=dtype),
    }


def exchanged(given, ranks) -> Tensor:
    """As `ranks` ranks would compute it, the exchange itself apart."""
    x, w1, w2, indices, weights = (given[n] for n in ("x", "w1", "w2", "indices", "weights"))
    packed = ops.pack(x, indices, weights, len(w1), ranks)
    sizes = packed.offset_W1.diff().tolist()
    count, size = sum(sizes), len(w1) // ranks
    parts = [t[:count].split(sizes) for t in packed[:3]]
    back = [
        ops.routed_mlp(rows, a, b, i, w)
        for rows, i, w, a, b in zip(*parts, w1.split(size), w2.split(size), strict=True)
    ]
    rest = x.new_zeros(len(packed.rows_NH) - count, x.shape[1])
    return ops.unpack(torch.cat([*back, rest]), packed)


def results(function, given) -> list[Tensor]:
    leaves = {n: given[n].detach().clone().requires_grad_() for n in ("x", "w1", "w2", "weights")}
    y = function({**given, **leaves})
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), direction)]


def assert_alike(given, ranks, bound=1e-12) -> None:
    def at_once(g):
        return ops.routed_mlp(g["x"], g["w1"], g["w2"], g["indices"], g["weights"])

    found = results(lambda g: exchanged(g, ranks), given)
    for actual, expected in zip(found, results(at_once, given), strict=True):
        assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("none", [0.0, 0.3], ids=["all", "some nowhere"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_changes_no_output_and_no_gradient(shape, none, backend):
    assert_alike(case(shape, none), shape[-1])


@pytest.mark.parametrize("none", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_packs_as_the_specification_does(shape, none, monkeypatch):
    given = case(shape, none)
    found = []
    for name in ("naive", "triton"):
        monkeypatch.setenv("MOE_KERNELS", name)
        found.append(ops.pack(given["x"], given["indices"], given["weights"], shape[3], shape[-1]))
    rows = int(found[0].offset_W1[-1])
    for name in FIELDS:
        ours, theirs = (getattr(p, name) for p in found)
        if name == "pair_P":
            ours, theirs = ours[:rows], theirs[:rows]
        assert torch.equal(ours, theirs), name


def test_a_token_goes_to_a_rank_once(backend):
    shape = SHAPES["many"]
    given = case(shape)
    packed = ops.pack(given["x"], given["indices"], given["weights"], shape[3], shape[-1])
    wanted = [sorted(set((row // 8).tolist())) for row in given["indices"]]
    assert packed.offset_W1.diff().tolist() == [sum(r in w for w in wanted) for r in range(8)]
    assert sum(map(len, wanted)) < given["indices"].numel()  # so that there is something to save


def test_every_token_to_one_rank_and_none_to_the_others(backend):
    given = case((40, 16, 8, 8, 2, 4))
    given["indices"] = given["indices"] % 2 + 4
    assert_alike(given, 4)


def test_no_tokens(backend):
    given = case((3, 16, 8, 4, 2, 2))
    packed = ops.pack(given["x"][:0], given["indices"][:0], given["weights"][:0], 4, 2)
    assert packed.rows_NH.shape == (0, 16) and packed.offset_W1.tolist() == [0, 0, 0]
    assert ops.unpack(packed.rows_NH, packed).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_copies_in_short_dtypes(dtype, backend):
    shape = SHAPES["even"]
    given = case(shape, dtype=dtype)
    given["x"] = given["x"].repeat(1, 2)[:, ::2]  # and x need not be contiguous
    packed = ops.pack(given["x"], given["indices"], given["weights"].float(), 8, 4)
    tokens = packed.pair_P[: packed.offset_W1[-1]] // 2
    assert torch.equal(packed.rows_NH[: len(tokens)], given["x"][tokens])
    summed = ops.unpack(packed.rows_NH, packed).double()
    ranks = torch.tensor([len(set((row // 2).tolist())) for row in given["indices"]])
    expected = given["x"].double() * ranks[:, None]
    assert (summed - expected).norm() < 4e-3 * expected.norm()


def test_rows_alone_have_a_gradient(backend):
    given = case(SHAPES["even"], none=0.3)
    x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
    packed = ops.pack(x, given["indices"], weights, 8, 4)
    found = torch.autograd.grad(packed.rows_NH.sum(), [x, weights], allow_unused=True)
    ranks = [len({i // 2 for i in row.tolist() if i < 8}) for row in given["indices"]]
    assert torch.equal(found[0], torch.tensor(ranks, dtype=x.dtype)[:, None].expand_as(x))
    assert found[1] is None or not found[1].any()


def test_opcheck(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "triton")
    given = case(SHAPES["even"], dtype=torch.float32)
    x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = x, given["indices"], weights, 8, 4
    torch.library.opcheck(torch.ops.moe.pack.default, arguments, test_utils=tests)
    packed = ops.pack(*arguments)
    rows = packed.rows_NH.detach().requires_grad_()
    how = rows, packed.place_TK, packed.pair_P, packed.offset_W1
    torch.library.opcheck(torch.ops.moe.unpack.default, how)


def test_wrong_inputs_are_refused_in_words():
    given = case(SHAPES["even"])
    x, indices, weights = given["x"], given["indices"], given["weights"]
    with pytest.raises(ValueError, match="8 experts cannot be shared by 3 ranks evenly"):
        ops.pack(x, indices, weights, 8, 3)
    with pytest.raises(ValueError, match=r"Expected \[T, H\], \[T, K\] and \[T, K\]"):
        ops.pack(x, indices, weights[:, :1], 8, 4)
    with pytest.raises(ValueError, match="expert indices go from"):
        ops.pack(x, indices + 7, weights, 8, 4)
    packed = ops.pack(x, indices, weights, 8, 4)
    with pytest.raises(ValueError, match="unpack: rows"):
        ops.unpack(packed.rows_NH[:5], packed)


def test_broken_packing_is_found(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS", "triton")
    given, pack = case(SHAPES["even"]), kernels.pack

    def other_weights(x, indices, weights, *sizes):
        return pack(x, indices, weights.roll(1, 0), *sizes)

    def another_row(x, indices, weights, *sizes):
        packed = pack(x, indices, weights, *sizes)
        return packed._replace(place_TK=packed.place_TK.roll(1, 0))

    def lost_gradient(x, indices, weights, *sizes):
        packed = pack(x, indices, weights, *sizes)
        return packed._replace(row_TK=packed.place_TK.clone())

    for broken in (other_weights, another_row, lost_gradient):
        monkeypatch.setattr(kernels, "pack", broken)
        with pytest.raises(AssertionError):
            assert_alike(given, 4)
