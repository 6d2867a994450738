"""The operations the models are made of, each once; the backend is chosen by device and shape.

    y = routed_mlp(x, w1, w2, indices, weights)

`MOE_KERNELS=naive|cpu|grouped_mm|triton` forces a backend. `naive` is the specification of the
others; `triton` is the default on a GPU, and runs on a CPU in Triton's interpreter.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.kernels import checks
from moe.kernels.backend import BACKENDS, forced, triton_runs
from moe.kernels.exchange import naive as exchange_naive
from moe.kernels.exchange import op as exchange_op
from moe.kernels.exchange.naive import Packed
from moe.kernels.heads import naive as heads_naive
from moe.kernels.heads import op as heads_op
from moe.kernels.route import naive as route_naive
from moe.kernels.route import op as route_op
from moe.kernels.route.naive import Plan
from moe.kernels.routed_mlp import grouped_mm
from moe.kernels.routed_mlp import naive as routed_mlp_naive
from moe.kernels.routed_mlp import op as routed_mlp_op
from moe.kernels.routed_mlp.masked import masked_mlp, masks_pay
from moe.kernels.routed_mlp.naive import PLAIN, Layout

__all__ = [
    "BACKENDS",
    "Layout",
    "Packed",
    "Plan",
    "Routed",
    "attend_heads",
    "attends_heads",
    "backend",
    "gate_heads",
    "limit_load",
    "masked_mlp",
    "masks_pay",
    "pack",
    "project_heads",
    "projection_share",
    "route",
    "routed_mlp",
    "routes_at_once",
    "select_above",
    "select_top_k",
    "sort_pairs",
    "sparse_share",
    "triton_runs",
    "unpack",
    "weigh",
]

# Above this many bytes of pairs (rows of x and h) one expert at a time beats grouped_mm on a CPU:
# the working set has left the last-level cache, and every array of all pairs is fresh memory.
# bench/routed_mlp.py measures both sides of it: fine_s (24 MB) and mix_s (32), fine_m (96).
CACHE_BYTES = 48 * 2**20

SCORES = (torch.float32, torch.float64)  # what is routed by
forced_backend = forced
# Tokens of a sequence, and the share of heads on up to which the others are better left out.
# bench/results/h200/gpu_heads.md (0.5 on, against torch's attention and a gate after it: 1.15 times
# as fast at 8k, 1.38 at 32k, a loss at 2k) and bench/results/sparse_heads.md.
CUDA_SHARES: tuple[tuple[int, float], ...] = ((32768, 0.6), (8192, 0.5))
CPU_SHARES: tuple[tuple[int, float], ...] = ((512, 0.5),)
# The same for projections on a CPU, bench/results/project_heads.md. A list of rows wants many of
# them; a single token does little but read weights, so that fewer heads pay from a size on.
PROJECTION_ROWS, PROJECTION_SHARE = 256, 0.5
HEAD_WEIGHTS, SINGLE_SHARE = 2**18, 0.75
FORCED_SHARE = 0.6  # with MOE_KERNELS=triton, whatever the length
HEAD_SIZE = 128  # the largest that the attention kernels have tilings for
weigh = route_naive.weigh


@torch.library.custom_op("moe::select_top_k", mutates_args=())
def select_top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores along the last dim, best first, ties to the lowest index.

    An op of its own so that activation checkpointing can keep its result: a near-tie must not fall
    the other way when the layer is recomputed.
    """
    return route_naive.select_top_k(scores, k).contiguous()


@select_top_k.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


@torch.library.custom_op("moe::select_above", mutates_args=())
def select_above(scores: Tensor, threshold: float) -> Tensor:
    """Which scores reach a threshold, an op of its own for the same reason."""
    return scores >= threshold


@select_above.register_fake
def _(scores: Tensor, threshold: float) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.custom_op("moe::limit_load", mutates_args=())
def limit_load(
    indices: Tensor, weights: Tensor, experts: int, room: int, valid: Tensor | None
) -> Tensor:
    """Indices [T, K] with at most `room` of each expert, E (none) for the lightest beyond.

    Of equal weights [T, K] the earlier token stays; `valid` [T] bool, where given, says which
    tokens stay before others. An op of its own for the same reason.
    """
    return route_naive.limit_load(indices, weights, experts, room, valid)


@limit_load.register_fake
def _(indices: Tensor, weights: Tensor, experts: int, room: int, valid: Tensor | None) -> Tensor:
    return indices.new_empty(indices.shape)


class Routed(NamedTuple):
    """What `route` decided and what it saw, over tokens that are no padding where it sums."""

    weights_TK: Tensor
    indices_TK: Tensor
    plan: Plan
    chosen_E: Tensor  # tokens that chose each expert
    probability_E: Tensor  # differentiable, as square is
    entropy: Tensor
    square: Tensor  # of the logsumexp
    tokens: Tensor


def routes_at_once(logits_TE: Tensor) -> bool:
    """Whether `route` runs for these logits: with Triton, which does all of it at once."""
    return logits_TE.dtype in SCORES and triton_runs(logits_TE.device, logits_TE.dtype)


def route(
    logits_TE: Tensor,
    k: int,
    score: str,
    renormalise: bool,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> Routed:
    """Choose k experts by their logits [T, E], weigh them, sort them and sum up what balances them.

    Scores are softmax or sigmoid; the best logits are chosen, or with a `bias_E` the best scores
    plus bias. Ties go to the lowest index. Raises ValueError where k or the shapes do not fit.
    """
    tokens, experts = logits_TE.shape
    if not 1 <= k <= experts:
        raise ValueError(f"top-k {k} of {experts} experts: use 1 to {experts}.")
    for name, tensor, size in (("bias", bias_E, experts), ("valid", valid_T, tokens)):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"route's {name} is {tuple(tensor.shape)}, expected ({size},).")
    if score not in ("softmax", "sigmoid") or logits_TE.dtype not in SCORES:
        raise ValueError(
            f"route: score {score!r} of {logits_TE.dtype} logits. Use softmax or sigmoid, of "
            "float32 or float64."
        )
    checks.one_device("route", logits_TE, bias_E, valid_T)
    logits_TE = logits_TE.contiguous()
    weights, indices, sums, *plan = route_op.route(
        logits_TE,
        None if bias_E is None else bias_E.to(logits_TE).contiguous(),
        None if valid_T is None else valid_T.contiguous(),
        k,
        score == "sigmoid",
        renormalise,
        scale,
    )
    chosen, probability, (entropy, square, count) = sums[0], sums[1], sums[2, :3].unbind()
    return Routed(
        weights, indices, Plan(*plan), chosen[:experts].detach(), probability[:experts],
        entropy.detach(), square, count.detach(),
    )  # fmt: skip


def sort_pairs(indices_TK: Tensor, num_experts: int) -> Plan:
    """Pairs of indices [T, K] sorted by expert, as the Triton kernels want them."""
    checks.whole_numbers("sort_pairs", indices_TK)
    return Plan(*route_op.plan(indices_TK.contiguous(), num_experts))


def backend(x_TH: Tensor, w1_EDH: Tensor, w2_EHI: Tensor, k: int) -> str:
    """The backend that `routed_mlp` takes for these tensors."""
    wanted = forced()
    if wanted == "grouped_mm" and not grouped_mm.fits(w1_EDH, w2_EHI):
        raise ValueError(
            f"MOE_KERNELS=grouped_mm does not take {w1_EDH.dtype} experts of shape "
            f"{tuple(w1_EDH.shape)}: float32, bfloat16 or float16 in sizes that are multiples "
            f"of {grouped_mm.ALIGNMENT} bytes. Use cpu."
        )
    if triton_runs(x_TH.device, x_TH.dtype):
        return "triton"
    if wanted:
        return wanted
    if not grouped_mm.fits(w1_EDH, w2_EHI):
        return "cpu"
    if x_TH.is_cuda:
        return "grouped_mm"
    pair_bytes = x_TH.shape[0] * k * (w1_EDH.shape[1] + w1_EDH.shape[2]) * x_TH.element_size()
    return "cpu" if pair_bytes > CACHE_BYTES else "grouped_mm"


def routed_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    plan: Plan | None = None,
    recompute_h: bool = False,
    layout: Layout = PLAIN,
    bias: Tensor | None = None,
) -> Tensor:
    """Σ_k weights[t, k] · SwiGLU expert indices[t, k] of x[t]: [T, H].

    x [T, H]; w1 [E, 2I, H], gate rows before up rows; w2 [E, H, I]; weights [T, K]; indices [T, K]
    int64 in 0..E-1, or E for none. Under autocast x, w1 and w2 are cast as a matmul's would be.
    Differentiable in x, w1, w2 and weights. `plan` is the indices' own, where the router made one.
    `recompute_h` keeps x alone for the backward pass, at one more GEMM (Triton) or one more forward
    pass. `bias` [E, 2I] of the first layer, and layouts of W1's rows other than ours, are for
    backends naive and triton.
    Raises ValueError where shapes, dtypes or devices do not agree.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, w1, w2 = (t.to(_cast_to(x)) for t in (x, w1, w2))
    checks.routed_mlp(x, w1, w2, indices, weights, bias)
    path = backend(x, w1, w2, indices.shape[1])
    if recompute_h and path != "triton" and torch.is_grad_enabled():
        again = functools.partial(routed_mlp, layout=layout, bias=bias)
        return checkpoint(again, x, w1, w2, indices, weights, use_reentrant=False)
    if path == "naive":
        route_naive.check_indices(indices, len(w1))
        return routed_mlp_naive.routed_mlp(x, w1, w2, indices, weights, layout, bias)
    if path == "triton":
        made = sort_pairs(indices, len(w1)) if plan is None else plan
        checks.plan_fits(made, indices, len(w1))
        x, weights = x.contiguous(), weights.contiguous()
        bias = None if bias is None else bias.contiguous()
        how = list(made), *layout, recompute_h
        return routed_mlp_op.routed_mlp_triton(x, w1, w2, weights, bias, *how)[0]
    if layout != PLAIN or bias is not None:
        raise ValueError(f"backend {path} takes no bias and no {layout}: use naive or triton.")
    return routed_mlp_op.routed_mlp(x, w1, w2, indices, weights, path)[0]


def pack(x: Tensor, indices: Tensor, weights: Tensor, experts: int, ranks: int) -> Packed:
    """Tokens [T, H] for the ranks that hold their experts, once for each rank (exchange/naive.py).

    indices [T, K] int64 in 0..E-1, or E for none; rank w has experts w · E / W to (w + 1) · E / W.
    Rows, indices and weights are what the receiver's routed_mlp takes; what it gives goes back and
    through `unpack`. Differentiable in x and weights. Raises ValueError where shapes do not agree.
    """
    if experts < 1 or ranks < 1 or experts % ranks:
        raise ValueError(f"pack: {experts} experts cannot be shared by {ranks} ranks evenly.")
    if x.ndim != 2 or indices.shape != weights.shape or len(indices) != len(x):
        raise ValueError(
            f"pack: x {tuple(x.shape)}, indices {tuple(indices.shape)}, weights "
            f"{tuple(weights.shape)}. Expected [T, H], [T, K] and [T, K]."
        )
    checks.whole_numbers("pack", indices)
    checks.one_device("pack", x, indices, weights)
    if triton_runs(x.device, x.dtype) and len(x):
        given = (t.contiguous() for t in (x, indices, weights))
        return Packed(*exchange_op.pack(*given, experts, ranks))
    route_naive.check_indices(indices, experts)
    return exchange_naive.pack(x, indices, weights, experts, ranks)


def unpack(rows_NH: Tensor, packed: Packed) -> Tensor:
    """What came back for each token, added up [T, H]; rows [N, H] lie as `packed`'s."""
    if rows_NH.ndim != 2 or len(rows_NH) != len(packed.rows_NH):
        raise ValueError(
            f"unpack: rows {tuple(rows_NH.shape)}, expected [{len(packed.rows_NH)}, H]."
        )
    if triton_runs(rows_NH.device, rows_NH.dtype) and len(packed.place_TK):
        how = packed.place_TK, packed.pair_P, packed.offset_W1
        return exchange_op.unpack(rows_NH.contiguous(), *how)
    return exchange_naive.unpack(rows_NH, packed.place_TK)


def sparse_share(device: torch.device, dtype: torch.dtype, length: int) -> float:
    """Up to which share of heads on leaving out the others pays, against all and a gate after them.

    0 where it never does: below a length the list of rows costs more than it saves.
    """
    table: tuple[tuple[int, float], ...]
    if triton_runs(device, dtype):
        table = ((0, FORCED_SHARE),) if forced() else CUDA_SHARES
    else:
        table = CPU_SHARES if device.type == "cpu" and forced() != "naive" else ()
    return next((share for tokens, share in table if length >= tokens), 0.0)


def projection_share(device: torch.device, rows: int, weights: int) -> float:
    """Up to which share of heads on `project_heads` pays, against projecting all of them.

    `rows` tokens, and `weights` numbers in one head's part of the matrix. 0 where it never does.
    """
    if device.type != "cpu" or forced() == "naive":
        return 0.0
    if rows == 1 and weights >= HEAD_WEIGHTS:
        return SINGLE_SHARE
    return PROJECTION_SHARE if rows >= PROJECTION_ROWS else 0.0


def project_heads(x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None, on_TN: Tensor) -> Tensor:
    """Projections [T, N, d] of x by the heads that are on, zeros where they are off.

    The weight [N · d, H] has a head's rows together, bias [N · d] if any. Heads that are off are
    not computed on a CPU and give no gradient anywhere. Under autocast x, weight and bias are cast
    as a matmul's would be. Raises ValueError where shapes or dtypes do not agree.
    """
    if torch.is_autocast_enabled(x_TH.device.type):
        dtype = _cast_to(x_TH)
        x_TH, weight_OH = x_TH.to(dtype), weight_OH.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    checks.projection(x_TH, weight_OH, bias_O, on_TN)
    if x_TH.device.type != "cpu" or forced() == "naive":
        return heads_naive.project_heads(x_TH, weight_OH, bias_O, on_TN)
    return heads_op.project_heads(x_TH, weight_OH, bias_O, on_TN)


def gate_heads(heads_BSNd: Tensor, gate_BSN: Tensor) -> Tensor:
    """Head outputs [B, S, N, d] times a gate [B, S, N]; a gate of 1 leaves them bitwise alone."""
    if heads_BSNd.shape[:-1] != gate_BSN.shape:
        raise ValueError(
            f"gate_heads: a gate {tuple(gate_BSN.shape)} for heads {tuple(heads_BSNd.shape)}. "
            "Expected [B, S, N] for [B, S, N, d]."
        )
    checks.one_device("gate_heads", heads_BSNd, gate_BSN)
    if not triton_runs(heads_BSNd.device, heads_BSNd.dtype):
        return heads_naive.gate_heads(heads_BSNd, gate_BSN)
    return heads_op.gate_heads(heads_BSNd.contiguous(), gate_BSN.contiguous())


def attends_heads(q_BSNd: Tensor) -> bool:
    """Whether `attend_heads` has a kernel for these queries: Triton's, in 16 bits on a GPU."""
    dtype, device = _cast_to(q_BSNd), q_BSNd.device
    short = dtype in (torch.bfloat16, torch.float16) or device.type == "cpu"
    return short and q_BSNd.shape[-1] <= HEAD_SIZE and triton_runs(device, dtype)


def _cast_to(tensor: Tensor) -> torch.dtype:
    """The dtype that a matmul would take this tensor in: autocast's, where it is on."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def attend_heads(
    q_BSNd: Tensor,
    k_BLGd: Tensor,
    v_BLGd: Tensor,
    first_BS: Tensor,
    scale: float,
    gate_BSN: Tensor | None = None,
    on_BSN: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """Causal attention times a gate per head, over the heads that are on: [B, S, N, d].

    Query s of the last S keys sees those from first_BS[b, s] to its own. Heads that are off are not
    computed, give zeros and get no gradient, nor does their gate; `most` is how many (token, head)
    pairs can be on, B · S · N unless told. Under autocast q, k and v are cast as a matmul's would
    be. Raises ValueError where shapes or dtypes do not agree.
    """
    dtype = _cast_to(q_BSNd)
    if torch.is_autocast_enabled(q_BSNd.device.type):
        q_BSNd, k_BLGd, v_BLGd = (t.to(dtype) for t in (q_BSNd, k_BLGd, v_BLGd))
    checks.heads(q_BSNd, k_BLGd, v_BLGd, first_BS, gate_BSN, on_BSN)
    first_BS = first_BS.clamp(min=0)  # what lies before the first key is seen by none
    if not attends_heads(q_BSNd):
        if on_BSN is not None and q_BSNd.device.type == "cpu" and forced() != "naive":
            some = q_BSNd, k_BLGd, v_BLGd, gate_BSN, on_BSN, first_BS, scale
            return heads_op.attend_some_heads(*some)[0]
        given = q_BSNd, k_BLGd, v_BLGd, first_BS, scale, gate_BSN, on_BSN
        return heads_naive.attend_heads(*given)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_BSNd, k_BLGd, v_BLGd))
    gate = None if gate_BSN is None else gate_BSN.contiguous()
    first = first_BS.to(torch.int32).contiguous()
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, gate)
    )
    if q.shape[1] == 1 and not learns:
        on = None if on_BSN is None else on_BSN.contiguous()
        return heads_op.decode_heads(q, k, v, gate, on, first, scale)
    rows: list[Tensor] = []
    if on_BSN is not None:
        rows = list(heads_op.list_heads(on_BSN, k.shape[2], most or on_BSN.numel()))
    return heads_op.attend_heads(q, k, v, gate, first, rows, scale)[0]
