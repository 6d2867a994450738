"""The standing battery: what must hold for every routed architecture, in one parametrised file."""

import itertools

import pytest
import tiny
import torch
from tiny import MOE, MOH, TWO_STAGE, copy_experts, dense_model, routed_model, tokens
from transformers import AutoModelForCausalLM

from moe.model.cache import CACHE
from moe.model.union_attention import UnionAttention

DENSE = {"kind": "dense"}
SIGMOID = {**MOE, "score": "sigmoid", "selection_bias": True, "shared_intermediate_size": 16}
KV_GROUP = {"kind": "moh", "shared_heads": [0], "top_k": 1, "granularity": "kv_group"}
EXPERTS = {"kind": "bam", "num_experts": 2}
UNION = {"kind": "uoe", "num_experts": "groups", "top_k": 2}  # as many as there are KV groups
SLICES = {"kind": "uoe", "num_experts": 4, "top_k": 2}
HEADS = {"9/3": {}, "8/8": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}}

ARCHITECTURES: dict[str, tuple] = {
    "moh": (MOH, None),
    "moh-kv_group": (KV_GROUP, None),
    "moh-selected": ({**MOH, "straight_through": "selected", "differentiate_std": False}, None),
    "two_stage": (TWO_STAGE, None),
    "two_stage-no_shared": ({"kind": "moh", "router": "two_stage", "top_k": 4}, None),
    "calibrated": (tiny.CALIBRATED, None),
    "calibrated-threshold": (tiny.THRESHOLD, None),
    "calibrated-kv_group-selected": ({**tiny.GROUPS_ON, "straight_through": "selected"}, None),
    "moe": (None, MOE),
    "moe-raw": (None, {**MOE, "renormalise": False, "weight_scale": 1.5}),
    "moe-sigmoid-shared-bias": (None, SIGMOID),
    "moh+moe": (MOH, MOE),
    "two_stage+moe+moh": ([MOH, DENSE, TWO_STAGE], [MOE, SIGMOID, DENSE]),
    "bam": (EXPERTS, None),
    "bam-shared": ({**EXPERTS, "kv": "shared"}, MOE),
    "bam-parallel": (EXPERTS, MOE, {"block": "parallel"}),
    "bam-both-kv": ([EXPERTS, DENSE, {**EXPERTS, "kv": "shared"}], [DENSE, MOE, DENSE]),
    "uoe-attention": (UNION, None),
    "uoe-attention-soft": ({**UNION, "weights": "soft", "sink_tokens": 3}, None),
    "uoe-mlp": (None, SLICES),
    "uoe-mlp-soft-shared": (None, {**SLICES, "weights": "soft", "shared_intermediate_size": 16}),
    "uoe-mlp-threshold": (None, {**SLICES, "mode": "threshold"}),
    "uoe-mlp-budget": (None, {**tiny.BUDGET, "shared_intermediate_size": 16}),
    "uoe-biased": ({**UNION, "router_bias": True}, {**SLICES, "router_bias": True}),
    "uoe-mlp-sequence": (None, {**SLICES, "mode": "sequence"}),
    "uoe-mlp-expert_choice": (None, {**SLICES, "mode": "expert_choice"}),
    "uoe": (UNION, SLICES),
    "budgets": ([tiny.THRESHOLD, DENSE, UNION], [tiny.BUDGET, tiny.BUDGET, DENSE]),
    "uoe+moh+moe": ([UNION, DENSE, MOH], [DENSE, SLICES, MOE]),
}
LOOKS_AHEAD = ("uoe-mlp-sequence", "uoe-mlp-expert_choice")


def grid(names):
    """Architecture × one kind in all layers or two alternating × head counts."""
    cases = []
    for name in names:
        layouts = ["alike", "alternating"]
        if any(isinstance(part, list) for part in ARCHITECTURES[name]):
            layouts = ["listed"]
        for layout, counts in itertools.product(layouts, HEADS):
            marks = [pytest.mark.slow] if layout == "alternating" else []
            cases.append(pytest.param((name, layout, counts), id=f"{name}-{layout}-{counts}",
                                      marks=marks))  # fmt: skip
    return pytest.mark.parametrize("case", cases)


everything = grid(ARCHITECTURES)
# a partly detached surrogate has no finite difference
smooth = grid(name for name in ARCHITECTURES if "selected" not in name)
causal = grid(name for name in ARCHITECTURES if name not in LOOKS_AHEAD)
heads = pytest.mark.parametrize("head_counts", HEADS)


def build(case, dtype=torch.float64, family="llama"):
    architecture, layout, head_counts = case
    attention, mlp, *overrides = ARCHITECTURES[architecture]
    if layout == "alternating":  # where both are routed, each layer has one of them
        first, second = [attention, DENSE, attention], [mlp, DENSE, mlp]
        attention = first if attention else None
        mlp = (second if attention is None else [DENSE, mlp, DENSE]) if mlp else None
    dense = dense_model(family, **HEADS[head_counts]).to(dtype)
    groups = dense.config.num_key_value_heads

    def counted(spec):
        union = spec and spec.get("num_experts") == "groups"
        return {**spec, "num_experts": groups} if union else spec

    if isinstance(attention, list):
        attention = [counted(spec) for spec in attention]
    return routed_model(dense, counted(attention) if isinstance(attention, dict) else attention,
                        mlp, **(overrides[0] if overrides else {}))  # fmt: skip


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@causal
@torch.no_grad()
def test_prefix_logits_do_not_change_when_tokens_follow(case):
    model, ids = build(case), tokens(2, 24)
    whole = model(ids).logits
    for length in (1, 7, 23):
        assert relative(model(ids[:, :length]).logits, whole[:, :length]) < 1e-12


@pytest.mark.parametrize("name", LOOKS_AHEAD)
@torch.no_grad()
def test_modes_that_look_ahead_do_change_a_prefix(name):
    """Negative control, and the reason why these modes have no perplexity."""
    model, ids = build((name, "alike", "9/3")), tokens(2, 24)
    changed = relative(model(ids[:, :7]).logits, model(ids).logits[:, :7])
    assert changed > 1e-3 and not model.config.causal


@everything
@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(case):
    model, ids = build(case), tokens(3, 16)
    together = model(ids).logits
    for row in range(3):
        assert relative(model(ids[row : row + 1]).logits, together[row : row + 1]) < 1e-12


@everything
@torch.no_grad()
def test_padding_changes_no_logits_and_is_not_counted(case):
    model, ids = build(case), tokens(1, 12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    positions = (torch.arange(17) - 5).clamp(min=0)[None]
    alone = model(ids)
    output = model(padded, attention_mask=mask, position_ids=positions)
    assert relative(output.logits[:, 5:], alone.logits) < 1e-12
    unplaced = model(padded, attention_mask=mask)  # all positions five further on
    assert relative(unplaced.logits[:, 5:], alone.logits) < 1e-5  # rope is in float32
    for left, right in zip(output.routing, alone.routing, strict=True):
        for a, b in zip(left, right, strict=True):
            if a is not None:
                for name, mine, theirs in zip(a._fields, a, b, strict=True):
                    torch.testing.assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")


@causal
@torch.no_grad()
def test_cached_decoding_equals_prefill(case):
    model, ids = build(case), tokens(2, 20)
    whole = model(ids).logits
    step = model(ids[:, :9], use_cache=True)
    pieces, cache = [step.logits], step[CACHE]
    for position in range(9, 20):
        step = model(ids[:, position : position + 1], use_cache=True, **{CACHE: cache})
        pieces.append(step.logits)
    assert relative(torch.cat(pieces, dim=1), whole) < 1e-12


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_other_families_decode_as_they_prefill(family):
    model, ids = build(("two_stage+moe+moh", "listed", "9/3"), family=family), tokens(2, 20)
    generated = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    logits = model(generated).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), generated[:, 20:])


@everything
def test_save_and_reload_are_equal(case, tmp_path):
    model, ids = build(case, torch.float32), tokens(2, 12)
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.normal_()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    # not bitwise: tensors mapped from a file are aligned otherwise, and GEMMs round by alignment
    assert relative(again.eval()(ids).logits, model(ids).logits) < 1e-6


@everything
def test_checkpointed_gradients_and_loads_are_the_same(case):
    model, ids = build(case).train(), tokens(2, 16)

    def backward():
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return output, {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, expected = backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients = backward()
    assert torch.equal(plain.loss, again.loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    for left, right in zip(plain.routing, again.routing, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a is None or torch.equal(a.counts, b.counts)


@smooth
def test_router_gradient_equals_finite_differences(case, monkeypatch):
    """Selections frozen; a straight-through mask is replaced by its surrogate, mask + p - p0."""
    layer = build(case).model.layers[0]
    x = torch.randn(1, 10, layer.self_attn.q_proj.in_features, dtype=torch.float64)
    weight = torch.randn_like(x)
    angle = torch.rand(1, 10, 8, dtype=torch.float64)
    frozen: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}

    def surrogate(mask, p):
        mask, start = frozen.setdefault(p.shape, (mask.detach(), p.detach()))
        return mask + (p - start)

    monkeypatch.setattr("moe.model.router.straight_through", surrogate)

    def loss() -> torch.Tensor:
        """Of attention and MLP without the norms, which transformers computes in float32."""
        places = torch.arange(10)[None]
        rotation = angle.cos(), angle.sin()
        union = {"places_BS": places} if isinstance(layer.self_attn, UnionAttention) else {}
        attended, _, heads_load = layer.self_attn(x, rotation, **union)
        routed = hasattr(layer.mlp, "experts")
        y, experts_load = layer.mlp(x, None, None) if routed else (layer.mlp(x), None)
        total = (weight * (attended + y)).sum()
        for load in (heads_load, experts_load):
            if load is not None:
                total = total + load.balance + 0.1 * load.z
        return total

    loss().backward()
    names = [n for n, _ in layer.named_parameters() if ".router." in n]
    for name in names or ["self_attn.q_proj.weight"]:
        parameter = layer.get_parameter(name)
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            step = 1e-6
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        expected = (above - below) / (2 * step)
        actual = (parameter.grad * direction).sum()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@everything
def test_every_router_gets_a_gradient_from_the_language_loss(case):
    model, ids = build(case).eval(), tokens(2, 16)
    model(ids, labels=ids).loss.backward()  # eval mode: no router loss in it
    for name, parameter in model.named_parameters():
        if ".router." in name:
            assert parameter.grad is not None and parameter.grad.norm() > 1e-8, name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@heads
@torch.no_grad()
def test_dense_and_all_heads_on_are_bitwise_the_source(family, head_counts):
    dense, ids = dense_model(family, **HEADS[head_counts]), tokens(2, 24)
    expected = dense(ids).logits
    every = dense.config.num_attention_heads - len(MOH["shared_heads"])
    groups = dense.config.num_key_value_heads
    for attention in (
        None,
        {**MOH, "top_k": every},
        {"kind": "moh", "top_k": groups, "granularity": "kv_group"},
    ):
        assert torch.equal(routed_model(dense, attention)(ids).logits, expected)
    zero = routed_model(dense, {**TWO_STAGE, "top_k": every})
    for name, parameter in zero.named_parameters():
        if ".router." in name:
            parameter.zero_()
    # 3 · (1/3) is not always 1 in binary, so equal up to rounding
    assert relative(zero(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_one_head_off_is_not_the_source():
    """Negative control of the test above."""
    dense, ids = dense_model(), tokens(2, 24)
    assert relative(routed_model(dense, {**MOH, "top_k": 5})(ids).logits, dense(ids).logits) > 1e-3


@pytest.mark.parametrize("mlp", [MOE, {**MOE, "top_k": 1}, {**MOE, "score": "sigmoid"}])
@torch.no_grad()
def test_copied_experts_with_renormalised_weights_are_the_source(mlp):
    dense, ids = dense_model(), tokens(2, 24)
    model = routed_model(dense, None, mlp)
    copy_experts(model, dense)
    assert relative(model(ids).logits, dense(ids).logits) < 1e-5
    model.model.layers[1].mlp.experts.down_proj[2] *= 1.02  # negative control
    assert relative(model(ids).logits, dense(ids).logits) > 1e-5


@torch.no_grad()
def test_raw_weights_do_not_preserve_the_source():
    dense, ids = dense_model(), tokens(2, 24)
    model = routed_model(dense, None, {**MOE, "renormalise": False})
    copy_experts(model, dense)
    assert relative(model(ids).logits, dense(ids).logits) > 0.01


@pytest.mark.parametrize("attention", [MOH, TWO_STAGE, tiny.CALIBRATED, tiny.THRESHOLD])
@heads
@torch.no_grad()
def test_heads_that_are_off_change_the_output_within_the_bound(attention, head_counts):
    """‖Δ_t‖ ≤ Σ_i |1 - g_ti| · ‖W_O^i‖₂ · max_{j≤t} ‖v_j‖: each head output is a convex mix."""
    dense = dense_model(**HEADS[head_counts]).double()
    count, groups = dense.config.num_attention_heads, dense.config.num_key_value_heads
    model = routed_model(dense, attention)
    x = torch.randn(1, 20, 72, dtype=torch.float64)
    embeddings = model.model.rotary_emb(x, torch.arange(20)[None])
    routed, reference = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    delta = routed(x, embeddings)[0][0] - reference(x, embeddings)[0][0]
    gate, _ = routed.router(x[0], routed.q_proj(x)[0].view(20, count, 8), None, None)
    values = routed.v_proj(x)[0].view(20, groups, 8).norm(dim=-1).cummax(0).values
    columns = routed.o_proj.weight.view(72, count, 8).permute(1, 0, 2)
    size = torch.linalg.matrix_norm(columns, ord=2)
    bound = ((1 - gate).abs() * size * values.repeat_interleave(count // groups, dim=1)).sum(-1)
    assert (delta.norm(dim=-1) <= bound + 1e-12).all()
    assert delta.norm() > 0.01 * bound.norm()  # and the bound is not vacuous


@heads
@torch.no_grad()
def test_attention_experts_that_are_off_change_the_output_within_the_bound(head_counts):
    """A head that is off is missed as above. One that is on sees its expert's tokens alone: with m
    of the dense attention on them, o = m · kept + (1 - m) · dropped, so kept is at most
    2 (1 - m) max ‖v‖ away.
    """
    dense = dense_model(**HEADS[head_counts]).double()
    dense.set_attn_implementation("eager")
    groups = dense.config.num_key_value_heads
    model = routed_model(dense, {**UNION, "num_experts": groups, "sink_tokens": 1})
    x, places = torch.randn(1, 20, 72, dtype=torch.float64), torch.arange(20)[None]
    embeddings = model.model.rotary_emb(x, places)
    routed, reference = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    causal = torch.full((20, 20), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected, mass_1NSS = reference(x, embeddings, causal)
    delta = (routed(x, embeddings, places_BS=places)[0] - expected)[0]
    per_group = dense.config.num_attention_heads // groups
    on_SN = routed.router(x, None, None, forced_T=places[0] < 1).mask_TE
    on_SN = on_SN.repeat_interleave(per_group, 1)
    kept_SN = torch.einsum("nqk,kn->qn", mass_1NSS[0].double(), on_SN.double())
    values = routed.v_proj(x)[0].view(20, groups, 8).norm(dim=-1).cummax(0).values
    columns = routed.o_proj.weight.view(72, -1, 8).permute(1, 0, 2)
    size = torch.linalg.matrix_norm(columns, ord=2) * values.repeat_interleave(per_group, dim=1)
    bound = (torch.where(on_SN, 2 * (1 - kept_SN), 1.0) * size).sum(-1)
    assert (delta.norm(dim=-1) <= bound + 1e-6).all()  # eager's softmax is in float32
    assert delta.norm() > 0.01 * bound.norm()


@torch.no_grad()
def test_what_slices_are_off_is_what_is_missing():
    """Exactly: the union's output and the slices that a token did not get are the dense MLP."""
    dense = dense_model().double()
    model, mlp = routed_model(dense, None, SLICES), dense.model.layers[0].mlp
    union, x = model.model.layers[0].mlp, torch.randn(1, 20, 72, dtype=torch.float64)
    gate, up = (w.weight.unflatten(0, (4, 16)) for w in (mlp.gate_proj, mlp.up_proj))
    union.experts.gate_up_proj.copy_(torch.cat([gate, up], 1))
    union.experts.down_proj.copy_(mlp.down_proj.weight.unflatten(1, (4, 16)).transpose(0, 1))
    inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    off_TE = ~union.router(x, None, None).mask_TE
    assert off_TE.sum() == 2 * 20
    missing = (inner[0].view(20, 4, 16) * off_TE[..., None]).flatten(1) @ mlp.down_proj.weight.T
    assert relative(union(x, None, None)[0][0] + missing, mlp(x)[0]) < 1e-12
    assert missing.norm() > 0.1 * mlp(x).norm()


@torch.no_grad()
def test_permuting_heads_within_their_groups_changes_nothing():
    model, ids = build(("moh", "alike", "9/3")), tokens(2, 16)
    expected = model(ids).logits
    order = [2, 0, 1, 3, 5, 4, 7, 8, 6]  # new position of a head takes this old head
    attention = {**MOH, "shared_heads": sorted(order.index(h) for h in MOH["shared_heads"])}
    model.config.attention = attention
    permuted = type(model)(model.config).double().eval()
    permuted.load_state_dict(model.state_dict())
    for layer in permuted.model.layers:
        q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
        q.copy_(q.view(9, 8, 72)[order].reshape(72, 72))
        o.copy_(o.view(72, 9, 8)[:, order].reshape(72, 72))
    assert relative(permuted(ids).logits, expected) < 1e-12


@torch.no_grad()
def test_eager_and_sdpa_agree():
    model, ids = build(("moh+moe", "alike", "9/3")), tokens(2, 16)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert relative(output.logits, expected) < 1e-5  # eager's softmax is in float32
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4
