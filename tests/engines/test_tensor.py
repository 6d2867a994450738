"""The tensor axis in the native engine: the same numbers on one process and on any mesh."""

from typing import Any

import pytest
import tiny
import torch
import toy_run
from harness import run_ranks
from torch import Tensor

from moe.config import parse
from moe.engines import build, native, tensor
from moe.errors import UserError
from moe.kernels import ops
from moe.parallel import tensor as axis
from moe.parallel.loss import cross_entropy
from moe.parallel.world import world

MOH = {"kind": "moh", "shared_heads": [0, 5], "top_k": 3}
UNION = {"kind": "uoe", "num_experts": 2, "top_k": 1}
SLICES = {"kind": "uoe", "num_experts": 4, "top_k": 2}
SHARED = {"shared_intermediate_size": 16}
BIASES = {"attention_bias": True, "mlp_bias": True, "pad_token_id": 7}
GROUPS = {**MOH, "shared_heads": [2], "granularity": "kv_group", "top_k": 1}
BAM = {"kind": "bam", "num_experts": 2}
BIASED = {**tiny.MOE, "score": "sigmoid", "selection_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "dense": ("llama", BIASES, None, None),  # tied, and 97 tokens are no multiple of 2
    "moh+moe": ("qwen2", {}, MOH, {**tiny.MOE, **SHARED}),
    "groups+moe": ("mistral", {}, GROUPS, tiny.MOE),
    "two stage+moe": ("llama", {}, {**MOH, "router": "two_stage"}, BIASED),
    "heads on alone": ("mistral", {}, {**MOH, "router": "two_stage"}, None),
    "bam+moe": ("qwen3", {}, BAM, {**tiny.MOE, **SHARED}),
    "bam, shared keys": ("qwen3", {}, {**BAM, "num_experts": 3, "kv": "shared"}, None),
    "uoe": ("qwen3", {}, UNION, SLICES),
    "thresholds": (
        "qwen2", {}, {**UNION, "weights": "soft"}, {**SLICES, "mode": "threshold", **SHARED}
    ),
    "budgets": (
        "qwen2", {}, {**tiny.THRESHOLD, "mean_heads": 4.5}, {**tiny.BUDGET, **SHARED}
    ),
    "queries left out": (
        "qwen3", {"attention_bias": True},
        {**tiny.THRESHOLD, "mean_heads": 3, "straight_through": "selected"}, tiny.MOE,
    ),
    # every token wants one expert of two, so one rank of a tensor axis has none to see to
    "lonely": (
        "qwen3", {"attention_bias": True}, {**UNION, "sink_tokens": 0}, {**SLICES, "top_k": 1}
    ),
}  # fmt: skip
TOKENS = tiny.tokens(4, 11)  # not a multiple of 2 either: ranks share tokens unevenly
Case = tuple[str, int, int, dict[str, Any]]  # model, tensor, expert, other keys
Found = dict[str, Any]


def model_of(name: str) -> Any:
    family, overrides, attention, mlp = MODELS[name]
    heads = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    dense = tiny.dense_model(family, num_hidden_layers=2, **heads, **overrides)
    model = tiny.routed_model(dense, attention, mlp).double()
    for key, parameter in model.named_parameters():
        if name == "lonely" and "norm" in key:
            parameter.data.abs_().add_(0.1)
        if name == "lonely" and key.endswith("router.weight"):
            parameter.data[0] *= 99
            parameter.data[1:] = -parameter.data[0]
    return model


def take_steps(case: Case) -> Found:
    """Three clipped steps of one model: losses, first norm and gradients, and the last state."""
    name, split, expert, keys = case
    with world() as ranks:
        native.DTYPES["float32"] = torch.float64
        ops.CPU_SHARES = ((0, 1.0 if name == "heads on alone" else 0.0),)
        ops.PROJECTION_ROWS = 1 if name == "queries left out" else 10**9
        values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}}
        parallel = {"expert": expert, "tensor": split, **(keys if "replicate" in keys else {})}
        train = {"dtype": "float32", **(keys if "replicate" not in keys else {})}
        config = parse({**values, "train": train, "parallel": parallel}, "test")
        engine = build(model_of(name), config, ranks)
        ranks = ranks.split(split)
        engine.train(True)
        found: Found = {"losses": []}
        # balance losses count the tokens of a micro-batch: they are the same ones on any mesh
        mine = TOKENS.chunk(ranks.data_size)[ranks.data_rank].split(2)
        for step in range(3):
            found["losses"].append(torch.zeros((), dtype=torch.float64))
            for index, micro in enumerate(mine):
                output = engine.forward(input_ids=micro)
                ends = torch.full((len(micro), 1), -100)
                losses = cross_entropy(output.logits, torch.cat([micro[:, 1:], ends], 1))
                loss = losses.sum() / 40 + output.router_loss * len(micro) / 4
                engine.backward(loss, index == len(mine) - 1)
                found["losses"][-1] += loss.detach()
            ranks.sum(found["losses"][-1])
            norm = engine.grad_norm()
            if step == 0:
                named = engine.model.named_parameters()
                grads = ((n, p.grad) for n, p in named if p.grad is not None)
                found |= {f"gradient/{n}": toy_run.whole(g).clone() for n, g in grads}
                found["norm"] = norm.clone()
            engine.step(1e-2, (0.5 / norm).clamp(max=1.0))
        found |= {f"{e.kind}/{e.name}": toy_run.whole(e.tensor).clone() for e in engine.state()}
        found["losses"] = torch.stack(found["losses"])
        return found


def every(cases: list[Case]) -> list[Found]:
    return [take_steps(case) for case in cases]


def worst(found: Found, expected: Found) -> tuple[float, str]:
    """Largest relative error, and where."""
    assert found.keys() == expected.keys()
    return max(
        (((found[n] - wanted).norm() / wanted.norm().clamp(min=1e-5)).item(), n)
        for n, wanted in expected.items()
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    """Every model on one process."""
    found = run_ranks(every, 1, [(name, 1, 1, {}) for name in MODELS])[0]
    return dict(zip(MODELS, found, strict=True))


FULL, EXPERTS = ({"activation_checkpointing": what} for what in ("full", "experts"))
FEW: dict[int, list[Case]] = {
    2: [
        ("dense", 2, 1, {}), ("moh+moe", 2, 1, FULL), ("groups+moe", 2, 2, {}),
        ("two stage+moe", 2, 1, {}),
        ("heads on alone", 2, 1, {}), ("bam+moe", 2, 1, EXPERTS), ("bam, shared keys", 2, 1, FULL),
        ("uoe", 2, 1, {}), ("thresholds", 2, 1, FULL), ("lonely", 2, 1, FULL),
        ("budgets", 2, 1, {}), ("queries left out", 2, 1, FULL),
    ],
    4: [
        ("dense", 4, 1, {}), ("moh+moe", 2, 4, {}), ("bam+moe", 2, 2, {"replicate": 2}),
        ("uoe", 2, 1, FULL), ("thresholds", 2, 2, EXPERTS), ("lonely", 2, 1, {}),
    ],
}  # fmt: skip
ALL = [
    (n, 2, e, {**k})
    for n in MODELS for e in (1, 2, 4) for k in ({}, FULL, {"replicate": 2})
    if e == 1 or isinstance(MODELS[n][3], dict)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", FEW)
def test_any_mesh_gives_the_numbers_of_one_process(alone, size):
    for rank, results in enumerate(run_ranks(every, size, FEW[size])):
        for case, found in zip(FEW[size], results, strict=True):
            error, where = worst(found, alone[case[0]])
            assert error < 1e-10, (rank, case, where, error)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_grid_of_meshes(alone, name):
    cases = [case for case in ALL if case[0] == name]
    for results in run_ranks(every, 4, cases, timeout=300.0):
        for case, found in zip(cases, results, strict=True):
            error, where = worst(found, alone[name])
            assert error < 1e-10, (case, where, error)


def not_summed(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


def not_gathered(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    dim, total, place = ctx.how
    start, length = place.part(total)
    last = gradient.movedim(dim, -1)
    ends = gradient.new_zeros(*last.shape[:-1], total)
    ends[..., start : start + length] = last
    return ends.movedim(-1, dim), None, None


def router_enters(self: Any, whole: Tensor, dim: int = -1) -> Tensor:
    return axis._Take.apply(self.enter(whole) if dim == -1 else whole, dim, self)


WRONG: dict[str, tuple[str, Any, str, Any]] = {  # model and what is put where, wrong on purpose
    "an entry is not summed": ("dense", axis._Enter, "backward", not_summed),
    "parts of a whole gradient": ("dense", tensor, "add_parts", lambda *given: None),
    "a gate's gradient is summed too": ("bam+moe", tensor.TensorAxis, "take", router_enters),
    "a gate's gradient is of local heads": ("bam+moe", axis._Take, "backward", not_gathered),
}


def break_one(wrong: str) -> Found:
    name, place, attribute, instead = WRONG[wrong]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            place, attribute, staticmethod(instead) if attribute == "backward" else instead
        )
        return take_steps((name, 2, 1, {}))


def break_all() -> list[Found]:
    return [break_one(wrong) for wrong in WRONG]


@pytest.mark.slow
def test_what_is_not_summed_right_is_found(alone):
    """Negative controls."""
    for wrong, found in zip(WRONG, run_ranks(break_all, 2)[0], strict=True):
        error, _ = worst(found, alone[WRONG[wrong][0]])
        assert error > 1e-3, (wrong, error)


def problems(name: str, size: int, **parallel: int) -> list[str]:
    values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}, "parallel": parallel}
    with pytest.raises(UserError) as refused:
        tensor.check(model_of(name), parse(values, "test").parallel, size)
    return str(refused.value).split("\n")


def test_what_cannot_be_split_is_refused_with_every_reason():
    found = problems("uoe", 8, tensor=8)
    assert found == [
        "parallel.tensor=8 does not divide the 2 attention experts of a union. Use one of 1, 2.",
        "parallel.tensor=8 does not divide the 4 MLP experts of a union. Use one of 1, 2.",
    ]
    assert problems("moh+moe", 12, tensor=3) == [
        "parallel.tensor=3 does not divide the 8 attention heads. Use one of 1, 2, 4.",
        "parallel.tensor=3 does not divide the 4 KV heads. Use one of 1, 2, 4.",
        "parallel.tensor=3 does not divide the 16 neurons of an MLP (intermediate size). Use one "
        "of 1, 2, 4.",
        *problems("moh+moe", 12, tensor=3)[3:],
    ]
    assert "the 64 neurons" in problems("dense", 6, tensor=3)[2]
    (uneven,) = problems("dense", 6, tensor=2)
    assert uneven.startswith("3 ranks that share a copy of the model cannot cut the hidden size of")


def test_a_world_that_is_no_multiple_of_the_tensor_axis_is_refused():
    values = {"model": "m", "out": "o", "data": {"train": [{"path": "p"}]}}
    with pytest.raises(UserError, match=r"tensor=4 does not divide the 6 ranks .* of 1, 2, 3, 6"):
        parse({**values, "parallel": {"tensor": 4}}, "test").check_world(6)
    train = {"global_batch_size": 8, "micro_batch_size": 4}
    parallel = {"tensor": 2, "replicate": 3}
    config = parse({**values, "train": train, "parallel": parallel}, "test")
    with pytest.raises(UserError, match=r"3 ranks \(of 2 each, parallel.tensor\)"):
        config.check_world(6)
    parse({**values, "train": train, "parallel": {"tensor": 2}}, "test").check_world(4)
    with pytest.raises(UserError, match="global_batch_size=8 is not a multiple"):
        parse({**values, "train": train}, "test").check_world(4)
