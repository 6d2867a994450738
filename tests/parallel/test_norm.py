"""The gradient norm over any division of the gradients is the norm of the whole ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe.parallel.norm import global_norm, scale_gradients

# 3 rows do not divide evenly, and of 4 ranks one gets none
SHAPES = {"matrix": (8, 6), "uneven": (3, 5), "experts": (4, 6, 2), "norm": (7,), "scalar": ()}
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()


def whole_gradients() -> dict[str, Tensor]:
    """The same on every rank, each of a scale of its own, so that none is drowned."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (index + 1) * torch.randn(shape, generator=generator)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def expected_norm() -> float:
    squares = [g.double().square().sum() for g in whole_gradients().values()]
    return float(torch.stack(squares).sum().sqrt())


def divisions() -> dict[str, tuple[DeviceMesh, dict[str, tuple[Any, ...]]]]:
    """Mesh and placements by tensor, on four ranks; a tensor that is not named is a plain one."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    pair = square["shard"]
    every = [name for name in SHAPES if name != "scalar"]
    return {
        "rows of two ranks": (pair, dict.fromkeys(every, (ROWS,))),
        "replicas on two ranks": (pair, dict.fromkeys(SHAPES, (WHOLE,))),
        "mixed on two ranks": (pair, {"matrix": (COLUMNS,), "uneven": (ROWS,), "norm": (WHOLE,)}),
        "plain": (line, {}),
        "replicated": (line, dict.fromkeys(SHAPES, (WHOLE,))),
        "rows": (line, dict.fromkeys(every, (ROWS,))),
        "columns of some": (line, {"matrix": (COLUMNS,), "experts": (ROWS,)}),
        "replicas of shards": (square, dict.fromkeys(every, (WHOLE, ROWS))),
        "shards of replicas": (square, dict.fromkeys(every, (ROWS, WHOLE))),
        "both axes": (square, {"matrix": (ROWS, COLUMNS), "experts": (ROWS, Shard(1))}),
        "mixed": (
            square,
            {
                "matrix": (WHOLE, ROWS),
                "uneven": (ROWS, WHOLE),
                "experts": (COLUMNS, ROWS),
                "norm": (WHOLE, WHOLE),
            },
        ),
    }


def divide(mesh: DeviceMesh, placements: dict[str, tuple[Any, ...]]) -> list[Tensor]:
    return [
        distribute_tensor(g, mesh, placements[name]) if name in placements else g
        for name, g in whole_gradients().items()
    ]


def count_replicas(gradients: list[Tensor]) -> Tensor:
    """Wrong on purpose: squares of every rank are added up, whether they are replicas or not."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    square = torch.stack([g.square().sum() for g in local]).sum()
    distributed.all_reduce(square)
    return square.sqrt()


def forget_shards(gradients: list[Tensor]) -> Tensor:
    """Wrong on purpose: only this rank's part."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return torch.stack([g.square().sum() for g in local]).sum().sqrt()


def norms_of(norm: Callable[[list[Tensor]], Tensor]) -> dict[str, float]:
    return {
        name: float(norm(divide(mesh, placements)))
        for name, (mesh, placements) in divisions().items()
    }


def scaled_norms() -> dict[str, float]:
    """Norms after every gradient was scaled by a quarter."""

    def norm(gradients: list[Tensor]) -> Tensor:
        scale_gradients(gradients, torch.tensor(0.25))
        return global_norm(gradients)

    return norms_of(norm)


def on_ranks() -> list[dict[str, float]]:
    return [
        norms_of(global_norm),
        scaled_norms(),
        norms_of(count_replicas),
        norms_of(forget_shards),
    ]


def wrong(norms: dict[str, float], expected: float) -> list[str]:
    """The divisions under which the norm is not the expected one."""
    return [n for n, value in norms.items() if abs(value / expected - 1) > 1e-6]


@pytest.mark.slow
def test_norm_is_that_of_the_whole_gradients_on_every_rank() -> None:
    expected = expected_norm()
    for right, scaled, replicas, shards in run_ranks(on_ranks, 4):
        assert not wrong(right, expected)
        assert not wrong(scaled, expected / 4)
        # negative controls: each mistake is seen wherever it matters, and nowhere else
        assert {"plain", "replicated", "replicas of shards"} <= set(wrong(replicas, expected))
        assert {"rows", "replicas of shards", "both axes", "mixed"} <= set(wrong(shards, expected))
        assert not {"plain", "replicated"} & set(wrong(shards, expected))


def test_norm_of_one_process_is_the_plain_one() -> None:
    gradients = list(whole_gradients().values())
    assert not wrong({"plain": float(global_norm(gradients))}, expected_norm())
    assert wrong({"one missing": float(global_norm(gradients[1:]))}, expected_norm())


def test_bfloat16_squares_are_added_in_float32() -> None:
    gradients = [torch.full((100_000,), 1e-2, dtype=torch.bfloat16) for _ in range(3)]
    norm = global_norm(gradients)
    assert norm.dtype == torch.float32
    exact = torch.cat(gradients).double().norm()
    assert float(norm) == pytest.approx(float(exact), rel=1e-3)
    narrow = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert float(narrow) != pytest.approx(float(exact), rel=1e-3)


def test_float64_stays_float64_and_no_gradients_have_norm_zero() -> None:
    gradients = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert global_norm(gradients).dtype == torch.float64
    assert float(global_norm(gradients)) == 5.0
    assert float(global_norm([])) == 0.0
    scale_gradients([], torch.tensor(2.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_shows_in_the_norm(bad) -> None:
    gradients = list(whole_gradients().values())
    assert torch.isfinite(global_norm(gradients))
    gradients[2][0, 0, 0] = bad
    assert not torch.isfinite(global_norm(gradients))


def test_a_long_vector_keeps_its_digits():
    """As engines hand out that keep gradients flat. Negative control: float32 all the way."""
    flat = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = flat.double().norm()
    norm = global_norm([flat])
    assert norm.dtype == torch.float32 and (norm / exact - 1).abs() < 1e-7
    assert (torch.linalg.vector_norm(flat) / exact - 1).abs() > 1e-6
