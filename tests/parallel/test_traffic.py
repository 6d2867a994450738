"""What a step sends: the formula for balanced tokens, and the network that is described."""

import math
import random

import pytest

from moe.parallel.traffic import Collective, Network, seconds, unique_ranks

WORLD = tuple(range(16))
NETWORK = Network(gpus_per_node=8, inside=100e9, outside=10e9, latency=1e-3)


def drawn(experts: int, top_k: int, ranks: int, draws: int = 20_000) -> float:
    """Ranks that tokens with choices drawn at random visit, on average."""
    draw, size = random.Random(0), experts // ranks
    visits = [len({e // size for e in draw.sample(range(experts), top_k)}) for _ in range(draws)]
    return sum(visits) / draws


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks"),
    [(8, 2, 1), (8, 2, 2), (8, 2, 4), (8, 2, 8), (64, 6, 8), (64, 8, 16), (4, 4, 2), (60, 1, 5)],
)
def test_a_token_visits_as_many_ranks_as_drawing_lots_gives(experts, top_k, ranks):
    assert unique_ranks(experts, top_k, ranks) == pytest.approx(
        drawn(experts, top_k, ranks), rel=0.01
    )


def test_a_draw_with_repetitions_is_told_apart():
    """Negative control: choices of a token differ."""
    repeated = 4 * (1 - (3 / 4) ** 3)
    assert abs(unique_ranks(8, 3, 4) - repeated) > 0.05 * repeated


def call(kind: str, ranks: tuple[int, ...], size: int, sent: int = 0) -> Collective:
    return Collective(kind, ranks, ranks[0], size, sent)  # type: ignore[arg-type]


def test_a_call_takes_as_long_as_its_narrowest_place():
    delay = 4 * 1e-3
    gather = seconds(call("all_gather", WORLD, 16 * 10**9), NETWORK)
    # half of it comes from the other node, over eight links; the rest is inside
    assert gather == pytest.approx(max(8e9 / 80e9, 14e9 / 100e9) + delay)
    assert seconds(call("all_reduce", WORLD, 16 * 10**9), NETWORK) == pytest.approx(
        2 * (gather - delay) + delay
    )
    strided = seconds(call("reduce_scatter", (0, 8), 10**9), NETWORK)
    assert strided == pytest.approx(0.5e9 / 10e9 + 1e-3), "one link alone"
    inside = seconds(call("all_to_all", WORLD[:8], 8 * 10**9, 7 * 10**9), NETWORK)
    assert inside == pytest.approx(7e9 / 100e9 + 3e-3)
    across = seconds(call("all_to_all", WORLD, 16 * 10**9, 15 * 10**9), NETWORK)
    assert across == pytest.approx(8e9 / 10e9 + delay)


def test_nobody_to_talk_to_takes_no_time():
    assert seconds(call("all_reduce", (3,), 10**9), NETWORK) == 0.0
    assert math.isclose(unique_ranks(8, 2, 1), 1.0)
