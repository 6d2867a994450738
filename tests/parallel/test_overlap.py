"""The shared expert while rows travel: when it runs, and that it changes no bit."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from harness import run_ranks
from test_all_to_all import CASES, EXPERTS, HIDDEN, direction, tokens_of, weights_of
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from moe.kernels import ops
from moe.model import RoutedLlamaConfig
from moe.model.experts import RoutedMLP
from moe.model.spec import MoEMLP
from moe.parallel import exchange
from moe.parallel.exchange import AllToAll

ORDER = ["leave", "shared", "arrive", "leave back", "shared back", "arrive back"]
MODES = ("trained", "frozen experts", "frozen input", "recomputed", "no gradient")


class Noted(torch.autograd.Function):
    """Writes down that it ran, and that its backward did."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("shared")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("shared back")
        return gradients[0], None


def noting(events: list[str]) -> Any:
    """Journeys that write down when they begin and end."""
    start, wait = exchange._Journey.start, exchange._Journey.wait

    def noted_start(self: Any, rows: Tensor, home: bool = False) -> None:
        self.back = " back" if home else ""
        events.append("leave" + self.back)
        start(self, rows, home)

    def noted_wait(self: Any) -> Tensor:
        events.append("arrive" + self.back)
        return wait(self)

    return mock.patch.multiple(exchange._Journey, start=noted_start, wait=noted_wait)


def passed(case: str, mode: str, beside: bool, kind: torch.dtype) -> tuple[list[Tensor], list[str]]:
    """Output and gradients of one dispatch and a shared expert, and the order of events."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    x, indices, weights = tokens_of(case, rank, size)
    local = [w.chunk(size)[rank].to(kind) for w in weights_of()]
    shared = [w[0].to(kind) for w in weights_of()]
    leaves = [x.to(kind), weights.to(kind), *local, *shared]
    idle = {"frozen experts": (2, 3), "frozen input": (0,), "no gradient": range(len(leaves))}
    learning = [t for i, t in enumerate(leaves) if i not in idle.get(mode, ())]
    for leaf in learning:
        leaf.requires_grad_()
    dispatcher = AllToAll(distributed.group.WORLD, EXPERTS)
    events: list[str] = []

    def always(x: Tensor) -> Tensor:
        gate, up = (x @ shared[0].T).chunk(2, dim=1)
        return Noted.apply(torch.nn.functional.silu(gate) * up @ shared[1].T, events)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        def experts(*given: Tensor) -> Tensor:
            return ops.routed_mlp(given[0], *local, *given[1:])

        if beside:
            return dispatcher(experts, x, indices, weights, None, lambda: always(x))
        return dispatcher(experts, x, indices, weights) + always(x)

    with noting(events):
        if mode == "recomputed":
            y = checkpoint(run, *leaves[:2], use_reentrant=False)
        else:
            y = run(*leaves[:2])
        found = torch.autograd.grad(y, learning, direction(y)) if learning else ()
    return [y.detach(), *found], events


def on_every_case() -> dict[Any, Any]:
    found: dict[Any, Any] = {"right": passed("balanced", "trained", True, torch.float64)[0]}
    wait = exchange._Journey.wait
    with mock.patch.object(exchange._Journey, "wait", lambda self: torch.zeros_like(wait(self))):
        found["wrong"] = passed("balanced", "trained", True, torch.float64)[0]
    for case in CASES:
        for mode in MODES:
            for kind in (torch.float64, torch.float32):
                both = [passed(case, mode, beside, kind) for beside in (True, False)]
                found[case, mode, kind] = both
    return found


def sent_away(call: Callable[[], None]) -> int:
    """Bytes that calls of all_to_all_single take to other ranks, counts of rows apart."""
    real, total = distributed.all_to_all_single, 0

    def counted(out: Tensor, rows: Tensor, *sizes: Any, **how: Any) -> Any:
        nonlocal total
        if sizes:
            away = sum(sizes[1]) - sizes[1][distributed.get_rank()]
            total += away * rows[:1].numel() * rows.element_size() if len(rows) else 0
        return real(out, rows, *sizes, **how)

    with mock.patch.object(distributed, "all_to_all_single", counted):
        call()
    return total


def layer_and_bytes() -> tuple[list[list[Tensor]], list[tuple[float, int, int]]]:
    """A whole layer with and without overlap; and what rows of 576 in bfloat16 take along."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    spec = MoEMLP(num_experts=8, top_k=3, intermediate_size=16, shared_intermediate_size=8)
    found = []
    for beside in (True, False):
        torch.manual_seed(0)
        layer = RoutedMLP(RoutedLlamaConfig(hidden_size=HIDDEN, intermediate_size=8), spec)
        layer.router.weight.data.normal_()
        for name, parameter in list(layer.experts.named_parameters()):
            parameter.data.normal_()
            setattr(layer.experts, name, nn.Parameter(parameter.data.chunk(size)[rank].clone()))
        dispatcher = AllToAll(distributed.group.WORLD, 8)
        layer.dispatcher = dispatcher if beside else lambda *g, to=dispatcher: to(*g[:5]) + g[5]()
        x = torch.randn(2, 7, HIDDEN, requires_grad=True)
        y, load = layer(x, None, None)
        loss = y.square().sum() + load.balance
        found.append([y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])])
    weight = []
    for top_k in (2, 8):
        dispatcher = AllToAll(distributed.group.WORLD, 64)
        indices = torch.rand(50, 64).topk(top_k).indices
        given = torch.randn(50, 576).bfloat16(), indices, torch.rand(50, top_k)
        out_and_back = sent_away(lambda d=dispatcher, g=given: d(lambda *r: r[0][:, :0], *g))
        least = dispatcher.sent_rows * 576 * 2
        weight.append((dispatcher.sent_bytes / least, dispatcher.sent_bytes, out_and_back))
    return found, weight


def test_overlap_changes_no_bit_and_happens():
    for results in run_ranks(on_every_case, 2):
        right, wrong = results.pop("right"), results.pop("wrong")
        # negative control: rows that were taken before they came
        assert not any(map(torch.equal, right[:5], wrong[:5]))
        for (case, mode, _), ((beside, events), (after, late)) in results.items():
            name = f"{case}, {mode}"
            assert all(map(torch.equal, beside, after)) and len(beside) == len(after), name
            forward, backward = ORDER[:3], ORDER[3:]
            expected = {"recomputed": [*forward, *forward, *backward], "no gradient": forward}
            assert events == expected.get(mode, ORDER), name
            assert late[:3] == ["leave", "arrive", "shared"], name  # negative control
            if mode not in expected:
                assert late[3:] == ["shared back", "leave back", "arrive back"], name


def test_a_layer_is_the_same_and_little_travels_beside_rows():
    for found, weight in run_ranks(layer_and_bytes, 2):
        assert len(found[0]) == 8 and all(map(torch.equal, *found))
        for ratio, counted, travelled in weight:
            assert 1 < ratio <= 1.05 and counted == travelled
