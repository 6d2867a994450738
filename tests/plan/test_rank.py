"""What `moe plan` says of a rank, against real gloo ranks that take the step."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

import conformance
import pytest
import tiny
import torch
from harness import run_ranks
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.config import RunConfig, parse
from moe.engines import build
from moe.engines.measure import LiveBytes
from moe.kernels import ops
from moe.model.experts import RoutedMLP
from moe.parallel import exchange
from moe.parallel.traffic import Wire, unique_ranks
from moe.parallel.world import world
from moe.plan import rank as planning
from moe.plan.rank import footprint, layer_kinds, micro_batch

SLICES = {"kind": "uoe", "num_experts": 4, "top_k": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    **conformance.MODELS,
    "threshold": (None, {**SLICES, "mode": "threshold"}),
    "expert choice": (None, {**SLICES, "mode": "expert_choice"}),
    "sequence": (None, {**SLICES, "mode": "sequence"}),
}
UNIONS = [MODELS[mode][1] for mode in ("threshold", "expert choice", "sequence", "budgets")]
CLASSES = ("weights", "gradients", "moments", "accumulated")
# model, expert, dtype, recomputed, boundaries, routing, replicate, tensor
Case = tuple[str, int, str, str, str, str, int, int]


def configuration(case: Case) -> RunConfig:
    """Two micro-batches a step on four ranks at most."""
    _, expert, dtype, recomputed, boundaries, routing, replicate, tensor = case
    length = 12 if routing == "balanced" else 48
    data = {"train": [{"path": "p"}], "sequence_length": length, "document_boundaries": boundaries}
    train = {
        "micro_batch_size": 2,
        "global_batch_size": 16,
        "dtype": dtype,
        "activation_checkpointing": recomputed,
    }
    mesh = {"expert": expert, "replicate": replicate, "tensor": tensor}
    return parse({"model": "m", "out": "o", "data": data, "train": train, "parallel": mesh}, "test")


def model_of(case: Case) -> Any:
    family = "mistral" if case[0] == "dense" else "llama"  # whose window is shorter than a sequence
    heads = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    dense = tiny.dense_model(family, **(heads if case[7] > 1 else {}))
    return tiny.routed_model(dense, *MODELS[case[0]])


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in local)}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


def gathered(model: torch.nn.Module) -> list[Any]:
    """FSDP2's own record of every parameter that it has divided."""
    groups = [
        m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)
    ]
    return [p for g in groups if g is not None for p in g.fsdp_params]


def waiting(model: torch.nn.Module) -> list[Tensor]:
    """Gradients after a backward pass that is not the step's last."""
    found = [p.unsharded_accumulated_grad for p in gathered(model)]
    whole = (getattr(p, "_unsharded_param", None) for p in gathered(model))
    found += [p.grad for p in whole if p is not None]
    found += [p.grad for p in model.parameters() if not gathered(model)]
    return [g for g in found if g is not None]


def outputs_of(model: torch.nn.Module) -> list[Tensor]:
    """What whole parameters are views of."""
    return [t for p in gathered(model) for t in p.all_gather_outputs]


def in_turn(scores: Tensor, k: int) -> Tensor:
    """Every choice of k parts as often as any other, which is balanced to the last token."""
    choices = torch.tensor(list(itertools.combinations(range(scores.shape[-1]), k)))
    return choices[torch.arange(len(scores)) % len(choices)]


class Exchanged(TorchDispatchMode):
    """Storages that one layer's exchange makes: counts of rows aside, and what is inside the
    experts, the shared expert and the kernels that pack and unpack.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.on = 0, False
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = operation(*args, **(kwargs or {}))
        if self.on:
            self.tensors += [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        return found

    def aside(self, run: Any) -> Any:
        def ran(*given: Any) -> Any:
            self.on, before = False, self.on
            try:
                return run(*given)
            finally:
                self.on = before

        return run and ran

    def watch(self, stack: Any) -> None:
        call, pack = exchange.AllToAll.__call__, ops.pack

        def packing(*given: Any) -> Any:
            packed = self.aside(pack)(*given)
            self.tensors += packed
            self.packed = storages(packed)
            return packed

        def exchanging(
            dispatcher: Any, experts: Any, x: Any, i: Any, w: Any,
            plan: Any = None, meanwhile: Any = None,
        ) -> Any:  # fmt: skip
            self.tensors, self.on = [], True
            with self:
                y = call(dispatcher, self.aside(experts), x, i, w, plan, self.aside(meanwhile))
            self.on = False
            made = storages(self.tensors)
            counts = {k for k, n in made.items() if n <= 16 * dispatcher.size}
            others = {*(counts - self.packed.keys()), *storages([x, i, w, y])}
            made = {k: n for k, n in made.items() if k not in others}
            self.largest = max(self.largest, sum(made.values()))
            return y

        for name, place, spy in (
            ("pack", ops, packing),
            ("unpack", ops, self.aside(ops.unpack)),
            ("__call__", exchange.AllToAll, exchanging),
        ):
            stack.enter_context(mock.patch.object(place, name, spy))


def on_a_rank(cases: list[Case]) -> dict[Case, dict[str, Any]]:
    return {case: take_a_step(case) for case in cases}


def take_a_step(case: Case) -> dict[str, Any]:
    """A step's two micro-batches on this rank: bytes by class, and what was sent."""
    config, exchanged, found = configuration(case), Exchanged(), {}
    tokens = None if case[5] == "balanced" else tiny.tokens(2, config.data.sequence_length)
    with world() as ranks, contextlib.ExitStack() as stack:
        if case[5] == "balanced":
            stack.enter_context(mock.patch.object(ops, "select_top_k", in_turn))
        exchanged.watch(stack)
        engine: Any = build(model_of(case), config, ranks)
        engine.train(True)
        engine.prepare_moments()
        model, forward = engine.model, micro_batch(config, tokens)
        found["weights"] = bytes_of([*model.parameters(), *model.buffers()])
        first, last = Wire(), Wire()
        with first:
            engine.backward(forward(engine), False)
        found["accumulated"] = bytes_of(waiting(model))
        kept: list[tuple[StorageWeakRef, int]] = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept.append((StorageWeakRef(storage), storage.nbytes()))
            return tensor

        with last, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = forward(engine)
        alive = {ref.cdata: size for ref, size in kept if not ref.expired()}
        leave = storages([*model.parameters(), *outputs_of(model)])
        found["activations"] = sum(size for key, size in alive.items() if key not in leave)
        with last:
            engine.backward(loss, True)
        found["gradients"] = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
        engine.step(1e-3, torch.ones(()))
        state = engine.optimizer.state.values()
        found["moments"] = bytes_of(t for held in state for t in held.values())
        routed = [m.dispatcher for m in model.modules() if isinstance(m, RoutedMLP)]
        routed = [getattr(dispatcher, "inner", dispatcher) for dispatcher in routed]
        found |= {
            "dispatch": exchanged.largest,
            "first": Counter(first.calls),
            "last": Counter(last.calls),
            "rows": sum(getattr(dispatcher, "sent_rows", 0) for dispatcher in routed),
        }
    return found


def off(planned: Any, found: dict[str, Any]) -> dict[str, float]:
    """By how much each class differs from what was planned, relative to what there is."""
    total = {n: getattr(planned, n) for n in (*CLASSES, "activations", "dispatch")}
    total = {n: getattr(v, "total", v) for n, v in total.items()}
    return {n: abs(total[n] - found[n]) / max(found[n], 1) for n in total}


def take_a_watched_step(case: Case) -> int:
    """The most bytes at once on this rank, as far as operations hand them out."""
    config = configuration(case)
    with world() as ranks, mock.patch.object(ops, "select_top_k", in_turn):
        engine: Any = build(model_of(case), config, ranks)
        engine.train(True)
        engine.prepare_moments()
        model, state = engine.model, engine.optimizer.state.values()
        forward = micro_batch(config)
        with LiveBytes() as live:
            live.count([*model.parameters(), *model.buffers()])
            live.count(t for held in state for t in held.values())
            engine.backward(forward(engine), False)
            engine.backward(forward(engine), True)
    return live.peak


def plain(
    name: str,
    expert: int = 1,
    dtype: str = "float32",
    recomputed: str = "none",
    boundaries: str = "none",
    routing: str = "balanced",
    replicate: int = 1,
    tensor: int = 1,
) -> Case:
    return name, expert, dtype, recomputed, boundaries, routing, replicate, tensor


COPIES = plain("moe", 2, replicate=2)
CASES = {  # every model, mesh, dtype and way to recompute, each with each of some other
    1: [plain("moe"), plain("uoe", 1, "bfloat16", "experts"),
        plain("dense", 1, "float32", "none", "attention", "natural")],
    2: [plain("dense", 1, "bfloat16", "full"), plain("moe", 2, "bfloat16"),
        plain("moh+moe", 1, "float32", "experts", "positions"), plain("bam+moe", 2),
        plain("uoe", 2, "float32", "full", "attention"), plain("uoe", 1, "bfloat16"),
        plain("moe", 2, "float32", "experts", "positions", "natural"),
        plain("moe", tensor=2), plain("bam+moe", 1, "bfloat16", "full", tensor=2)],
    4: [plain("dense"), plain("moe", 4, "float32", "full"), plain("moh+moe", 2),
        plain("moh+moe", 4, "bfloat16", "experts"), plain("bam+moe", 4, "bfloat16"),
        plain("bam+moe", 1), COPIES, plain("uoe", 2, "bfloat16", "none", "positions"),
        plain("moe", 1, "bfloat16", "none", "attention", "natural"),
        plain("uoe", 4, "bfloat16", "none", "none", "natural"),
        plain("moe", 2, tensor=2), plain("dense", 1, "bfloat16", tensor=4)],
}  # fmt: skip


def planned(case: Case, size: int, rank: int = 0) -> Any:
    return footprint(configuration(case), model_of(case).config, size, rank)


def disagreements(found: list[dict[Case, dict[str, Any]]], size: int) -> list[str]:
    """Where a rank has other bytes than planned: any at all, or a tenth of its activations."""
    wrong = []
    for case in found[0]:
        for rank in {0, size - 1}:
            plan, real = planned(case, size, rank), found[rank][case]
            difference = off(plan, real)
            balanced = case[5] == "balanced"
            limits = dict.fromkeys((*CLASSES, "dispatch"), 0.0) | {"activations": 0.1}
            if not balanced:
                limits["dispatch"] = 0.3  # by chance, with so few tokens
            wrong += [f"{case} rank {rank} {n}: off by {d:.2%}"
                      for n, d in difference.items() if d > limits[n]]  # fmt: skip
            if balanced and (plan.first, plan.last) != (real["first"], real["last"]):
                wrong.append(f"{case} rank {rank}: sends something else")
    return wrong


def test_one_rank_has_the_bytes_that_were_planned():
    assert not disagreements([on_a_rank(CASES[1])], 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_and_send_the_bytes_that_were_planned(size):
    """Weights, gradients, moments, dispatch buffers and collectives exactly, and AllToAll counts as
    many rows to other ranks as tokens visit on average.
    """
    ranks = run_ranks(on_a_rank, size, CASES[size])
    assert not disagreements(ranks, size)
    if size == 4:
        layers, micro_batches, tokens = 3, 2, 2 * 12
        rows = layers * micro_batches * tokens * unique_ranks(4, 2, 4) * 3 / 4
        assert {found[plain("bam+moe", 4, "bfloat16")]["rows"] for found in ranks} == {rows}
        kinds = {call.kind for call in ranks[0][COPIES]["last"] if len(call.ranks) > 1}
        assert kinds == {"all_gather", "reduce_scatter", "all_reduce", "all_to_all"}


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_grid(size, dtype):
    ways = [("none", "none", "balanced"), ("full", "attention", "balanced"),
            ("experts", "positions", "natural")]  # fmt: skip
    cases = [
        plain(name, expert, dtype, *way)
        for name in MODELS
        for expert in ((1, 2, 4) if name != "dense" else (1,))
        if expert <= size
        for way in ways
        if "uoe" in name or MODELS[name][1] not in UNIONS
    ]
    assert not disagreements(run_ranks(on_a_rank, size, cases, timeout=500), size)


@pytest.mark.slow
def test_the_most_at_once_is_near():
    for case, size in ((plain("moe", 2, "bfloat16"), 2), (plain("uoe", 1, "float32", "full"), 2)):
        peak = planned(case, size).peak
        for found in run_ranks(take_a_watched_step, size, case):
            assert abs(peak - found) <= 0.1 * found, case


@pytest.mark.parametrize(
    ("mode", "limit"),
    [("expert choice", 0.02), ("sequence", 0.02), ("threshold", 0.25), ("budgets", 0.25)],
)
def test_unions_of_every_mode_are_planned(mode, limit):
    """A threshold lets through what it likes until its biases have found their place, and so does
    a budget.
    """
    case = plain(mode, routing="natural")
    difference = off(planned(case, 1), take_a_step(case))
    assert difference.pop("activations") <= limit
    assert not any(difference.values())


def test_another_configuration_has_other_bytes():
    """Negative controls: each class sees what it should."""
    case = plain("moe")
    real = on_a_rank([case])[case]
    for other, size, classes in (
        (plain("moe", 2), 2, ("weights", "gradients", "moments", "activations", "dispatch")),
        (plain("moe", 1, "bfloat16"), 1, ("activations",)),
        (plain("moe", 1, "float32", "full"), 1, ("activations",)),
        (plain("dense"), 1, ("weights", "gradients", "moments")),
    ):
        difference = off(planned(other, size), real)
        assert all(difference[name] > 0.1 for name in classes), (other, difference)


def test_calibrated_heads_of_every_layer_are_of_few_kinds():
    """Which heads are shared differs from layer to layer, and so does a mean: costs do not."""
    heads = [{**tiny.THRESHOLD, "shared_heads": [i], "mean_heads": 5 + i / 20} for i in range(9)]
    more = [{**tiny.THRESHOLD, "shared_heads": [0, 1]}]
    config = tiny.routed_model(tiny.dense_model(num_hidden_layers=10), heads + more).config
    assert [len(layers) for layers in layer_kinds(config).values()] == [9, 1]


@pytest.mark.parametrize(("alike", "kinds"), [(3, [9]), (1, [3, 6])])
def test_few_layers_stand_for_all_of_their_kind(alike, kinds):
    case = plain("moe", 2, "bfloat16")
    moe = {"kind": "moe", "num_experts": 4, "top_k": 2}
    parts = [{"kind": "dense"} if i % 3 and len(kinds) > 1 else moe for i in range(9)]
    config = tiny.routed_model(tiny.dense_model(num_hidden_layers=9), None, parts).config
    assert [len(layers) for layers in layer_kinds(config).values()] == kinds
    with (
        mock.patch.object(planning, "ALIKE", alike),
        mock.patch.object(planning, "_run", wraps=planning._run) as ran,
    ):
        few = footprint(configuration(case), config, 4)
    assert ran.call_count == 1 + len(kinds)
    with mock.patch.object(planning, "ALIKE", 9):
        whole = footprint(configuration(case), config, 4)
    for name in ("weights", "gradients", "moments", "activations", "dispatch", "accumulated"):
        assert getattr(few, name) == getattr(whole, name), name
    assert (few.first, few.last) == (whole.first, whole.last)
    assert abs(few.peak - whole.peak) <= (0.01 if alike == 3 else 0.3) * whole.peak


def test_frozen_parameters_have_neither_gradients_nor_moments():
    case = plain("moe")
    config = configuration(case)
    train = config.train.model_copy(update={"trainable": ["*.router.*"]})
    found = footprint(config.model_copy(update={"train": train}), model_of(case).config, 1)
    assert found.gradients.total == 3 * 4 * 72 * 4 and found.moments.experts == 0
