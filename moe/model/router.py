"""The routers: what decides, for each token, which heads and experts count, and how much.

All of it in float32 (float64 in a float64 model): in bfloat16 a quarter of the tokens tie at the
top-k boundary. T tokens, H hidden, E experts, N heads (or KV groups), R routed of them, K chosen.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.kernels import ops
from moe.model.losses import RoutingLoad, keep_budget, measure, summed
from moe.model.spec import AttentionSpec, BAMAttention, MoEMLP, MoHAttention, routed_on
from moe.model.steering import ALWAYS, Steering, add, reweigh


def straight_through(mask: Tensor, probability: Tensor) -> Tensor:
    """Exactly `mask` forward, the gradient of `probability` backward.

    The association matters: (mask + p) - p is off by a rounding for one entry in seven.
    """
    return mask + (probability - probability.detach())


def widen(x: Tensor) -> Tensor:
    """In float32, or in the tensor's own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Columns:
    """Which of N columns compete and which are shared, as runs of slices.

    Slices, not index tensors: nothing to keep on a device, nothing to copy there, no sync.
    """

    def __init__(self, total: int, routed: Sequence[int]) -> None:
        self.routed = tuple(routed)
        self.total = total
        kinds = [i in set(routed) for i in range(total)]
        self._runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]

    def take_routed(self, values_TN: Tensor) -> Tensor:
        """The competing columns [T, R] of [T, N]."""
        pieces = values_TN.split([length for _, length in self._runs], dim=1)
        routed = zip(pieces, self._runs, strict=True)
        return torch.cat([piece for piece, (is_routed, _) in routed if is_routed], dim=1)

    def merge(self, shared_TS: Tensor, routed_TR: Tensor) -> Tensor:
        """Columns [T, N] in their places again, from the shared and the competing ones."""
        pieces, start = [], {True: 0, False: 0}
        for is_routed, length in self._runs:
            source = routed_TR if is_routed else shared_TS
            pieces.append(source[:, start[is_routed] : start[is_routed] + length])
            start[is_routed] += length
        return torch.cat(pieces, dim=1)


class NormRouter(nn.Module):
    """MoH's parameter-free router: the heads with the largest query norms are on, the rest off.

    Source: MoH-LLaMA3 modeling_llama.py (gate before RoPE), MoH eq. 9-10 for the gradient.
    """

    steering: Steering | None = None  # over all units; only gains concern the shared ones

    def __init__(self, spec: MoHAttention, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.spec = spec
        self.group_size = num_heads // num_kv_heads if spec.granularity == "kv_group" else 1
        num_units = num_heads // self.group_size
        self.units = Columns(num_units, spec.routed_heads(num_units))

    def forward(
        self,
        x_TH: Tensor,
        query_TNd: Tensor,
        valid_T: Tensor | None,
        reference_R: Tensor | None,
    ) -> tuple[Tensor, RoutingLoad]:
        """Gate [T, N] of 0s, 1s (and routed_scale), from queries before RoPE and before q_norm."""
        spec = self.spec
        unit_TUd = widen(query_TNd).unflatten(1, (-1, self.group_size)).flatten(2)
        norm_TU = self.gather(torch.linalg.vector_norm(unit_TUd, dim=-1))
        norm_TR = self.units.take_routed(norm_TU)
        logits_TR = standardise(norm_TR, spec)
        probability_TR, indices_TK = choose_routed(logits_TR, spec.top_k, self.units, self.steering)
        mask_TR = torch.zeros_like(probability_TR).scatter_(-1, indices_TK, 1.0)
        gate_TU = reweigh(hard_gate(mask_TR, probability_TR, self.units, spec), self.steering)
        reference_R = reference_R if spec.balance_scope == "global" else None
        load = measure(probability_TR, indices_TK, valid_T, spec.balance_norm, reference_R)
        return gate_TU.repeat_interleave(self.group_size, dim=1), load

    def gather(self, norm_TU: Tensor) -> Tensor:
        """Norms of all units from those of the local ones: an engine may have split the heads."""
        return norm_TU


def hard_gate(
    mask_TR: Tensor, probability_TR: Tensor, units: Columns, spec: MoHAttention
) -> Tensor:
    """Gate [T, U]: routed units by their mask, with the gradient of their probability, shared 1."""
    surrogate_TR = probability_TR
    if spec.straight_through == "selected":
        surrogate_TR = torch.where(mask_TR > 0, probability_TR, probability_TR.detach())
    routed_TR = spec.routed_scale * straight_through(mask_TR, surrogate_TR)
    return units.merge(routed_TR.new_ones(len(routed_TR), len(spec.shared_heads)), routed_TR)


def choose_routed(
    logits_TR: Tensor, k: int, units: Columns, steering: Steering | None
) -> tuple[Tensor, Tensor]:
    """Probability [T, R] of the routed units, and the k of them that are on [T, K]."""
    if steering is None or not steering.chooses:
        probability_TR = logits_TR.softmax(-1)
        return probability_TR, ops.select_top_k(probability_TR.detach(), k)
    logits_TR, choice_TR = steered(logits_TR, units, steering)
    return logits_TR.softmax(-1), ops.select_top_k(choice_TR, k)


def steered(logits_TR: Tensor, units: Columns, steering: Steering | None) -> tuple[Tensor, Tensor]:
    """Logits [T, R] that scores are made of, and those that are chosen by."""
    if steering is None:
        return logits_TR, logits_TR.detach()
    places = [None if t is None else t[list(units.routed)] for t in steering[:3]]
    logits_TR = add(logits_TR, places[0])
    return logits_TR, add(add(logits_TR.detach(), places[1]), places[2])


def standardise(norm_TR: Tensor, spec: MoHAttention) -> Tensor:
    """Norms over their deviation across the routed heads of a token (unbiased, mean kept).

    One routed head has no deviation: its score is the norm itself, its probability 1.
    """
    if norm_TR.shape[-1] == 1:
        return norm_TR
    # sqrt has no gradient at 0, so equal norms would turn into NaN: eps sits under the root too
    variance_T1 = norm_TR.var(-1, keepdim=True, correction=1)
    std_T1 = torch.where(variance_T1 > 0, variance_T1, 1.0).sqrt() * (variance_T1 > 0)
    if not spec.differentiate_std:
        std_T1 = std_T1.detach()
    return norm_TR / (std_T1 + spec.std_eps)


class TwoStageRouter(nn.Module):
    """MoH's soft router with parameters: weights within shared and routed heads, and between them.

    Code scaling, so that weights average 1 and zero weights give every active head exactly 1.
    Source: MoH-ViT attention.py:46-116; MoH eq. 5-6 up to that scaling.
    """

    steering: Steering | None = None  # over all heads; only gains concern the shared ones

    def __init__(self, spec: MoHAttention, num_heads: int, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.heads = Columns(num_heads, spec.routed_heads(num_heads))
        self.routed = nn.Linear(hidden_size, len(self.heads.routed), bias=False)
        if spec.shared_heads:
            self.shared = nn.Linear(hidden_size, len(spec.shared_heads), bias=False)
            self.mix = nn.Linear(hidden_size, 2, bias=False)

    def forward(
        self,
        x_TH: Tensor,
        query_TNd: Tensor | None,
        valid_T: Tensor | None,
        reference_R: Tensor | None,
    ) -> tuple[Tensor, RoutingLoad]:
        """Gate [T, N], real-valued, from the normed attention input."""
        spec = self.spec
        logits_TR = project(x_TH, self.routed.weight)
        probability_TR, indices_TK = choose_routed(logits_TR, spec.top_k, self.heads, self.steering)
        weights_TK = spec.top_k * spec.routed_scale * ops.weigh(probability_TR, indices_TK, True)
        shared_TS = probability_TR.new_zeros(len(x_TH), 0)
        if spec.shared_heads:
            mix_T2 = 2 * _softmax(x_TH, self.mix)
            weights_TK = weights_TK * mix_T2[:, 1:]
            shared_TS = mix_T2[:, :1] * len(spec.shared_heads) * _softmax(x_TH, self.shared)
        routed_TR = torch.zeros_like(probability_TR).scatter(-1, indices_TK, weights_TK)
        gate_TN = reweigh(self.heads.merge(shared_TS, routed_TR), self.steering)
        reference_R = reference_R if spec.balance_scope == "global" else None
        load = measure(probability_TR, indices_TK, valid_T, spec.balance_norm, reference_R)
        return gate_TN, load


def _softmax(x_TH: Tensor, linear: nn.Linear) -> Tensor:
    return torch.softmax(project(x_TH, linear.weight), dim=-1)


def project(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Logits in float32 or wider, under autocast too."""
    with torch.autocast(x_TH.device.type, enabled=False):
        logits_TE = widen(x_TH) @ widen(weight_EH).T
        return logits_TE if bias_E is None else logits_TE + widen(bias_E)


class CalibratedRouter(nn.Module):
    """Scores heads (or KV groups) from the attention's input; the best ones are on, the rest off.

    Budget `threshold`: those of scores that are not negative, the threshold being in the bias. So
    what is off is known before its query is computed. Meant to be fitted, moe.upcycle.calibrate.
    """

    steering: Steering | None = None  # over all units; only gains concern the shared ones

    def __init__(
        self, spec: MoHAttention, num_heads: int, num_kv_heads: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.spec = spec
        self.group_size = num_heads // num_kv_heads if spec.granularity == "kv_group" else 1
        num_units = num_heads // self.group_size
        self.units = Columns(num_units, spec.routed_heads(num_units))
        self.thresholds = spec.budget == "threshold"
        self.weight = nn.Parameter(torch.empty(len(self.units.routed), hidden_size))
        self.bias = nn.Parameter(torch.empty(len(self.units.routed)))

    def forward(
        self,
        x_TH: Tensor,
        query_TNd: Tensor | None,
        valid_T: Tensor | None,
        reference_R: Tensor | None,
    ) -> tuple[Tensor, RoutingLoad]:
        """Gate [T, N] of 0s, 1s (and routed_scale), from the normed attention input alone."""
        spec = self.spec
        logits_TR = project(x_TH, self.weight, self.bias)
        logits_TR, choice_TR = steered(logits_TR, self.units, self.steering)
        if self.thresholds:
            probability_TR = logits_TR.sigmoid()
            mask_TR = ops.select_above(choice_TR, 0.0).to(logits_TR)
            load = measure_budget(probability_TR, mask_TR, valid_T, routed_on(spec))
        else:
            probability_TR = logits_TR.softmax(-1)
            indices_TK = ops.select_top_k(choice_TR, spec.top_k)
            mask_TR = torch.zeros_like(probability_TR).scatter_(-1, indices_TK, 1.0)
            reference_R = reference_R if spec.balance_scope == "global" else None
            load = measure(probability_TR, indices_TK, valid_T, spec.balance_norm, reference_R)
        gate_TU = reweigh(hard_gate(mask_TR, probability_TR, self.units, spec), self.steering)
        return gate_TU.repeat_interleave(self.group_size, dim=1), load


def measure_budget(
    probability_TE: Tensor,
    mask_TE: Tensor,
    valid_T: Tensor | None,
    aim: float,
    logits_TE: Tensor | None = None,
) -> RoutingLoad:
    """The load of parts that are on each for itself, `aim` of them on average; their sigmoids are
    shares of one probability there, as those of an MoE are.
    """
    share_TE = probability_TE / (probability_TE.sum(-1, keepdim=True) + 1e-20)
    load = measure(share_TE, mask_TE, valid_T, "paper", logits_TE=logits_TE)
    return keep_budget(load, straight_through(mask_TE, probability_TE), valid_T, aim)


class SoftRouter(nn.Module):
    """BAM's attention router: every expert counts, by its share of a softmax. Source: BAM, §3.2.

    An expert is a group of heads, so its share is the gate of each of them.
    """

    steering: Steering | None = None

    def __init__(
        self, spec: BAMAttention, num_heads: int, num_kv_heads: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        # shared keys: heads of one KV head lie together, so experts alternate group by group
        self.heads_in_a_row = num_heads if spec.kv == "expert" else num_heads // num_kv_heads
        self.repeats = 1 if spec.kv == "expert" else num_kv_heads

    def forward(
        self,
        x_TH: Tensor,
        query_TNd: Tensor | None,
        valid_T: Tensor | None,
        reference_R: Tensor | None,
    ) -> tuple[Tensor, RoutingLoad]:
        """Gate [T, N], N over all experts, and the load: each expert's share summed over tokens."""
        logits_TE = project(x_TH, self.weight)
        if self.steering is not None:
            logits_TE = add(logits_TE, self.steering.logits_E)
        probability_TE = reweigh(logits_TE.softmax(-1), self.steering)
        load = measure(probability_TE, probability_TE.detach(), valid_T, "unit")
        load = load._replace(balance=torch.zeros_like(load.balance))  # nothing is left idle
        gate_TN = probability_TE.repeat_interleave(self.heads_in_a_row, 1).repeat(1, self.repeats)
        return gate_TN, load


def attention_router(
    spec: AttentionSpec, num_heads: int, num_kv_heads: int, hidden_size: int
) -> nn.Module | None:
    """The router that gives an attention its gate per head; None where nothing is weighed."""
    if isinstance(spec, BAMAttention):
        return SoftRouter(spec, num_heads, num_kv_heads, hidden_size)
    if not isinstance(spec, MoHAttention):
        return None
    if spec.router == "qnorm":
        return NormRouter(spec, num_heads, num_kv_heads)
    if spec.router == "calibrated":
        return CalibratedRouter(spec, num_heads, num_kv_heads, hidden_size)
    return TwoStageRouter(spec, num_heads, hidden_size)


class ExpertChoice(NamedTuple):
    """What an expert router decided."""

    indices_TK: Tensor  # int64
    weights_TK: Tensor  # float32, or wider in a wider model
    load: RoutingLoad
    plan: ops.Plan | None = None  # of these indices; whoever changes them leaves it out


def within_reach(score_TE: Tensor, spec: MoEMLP) -> Tensor:
    """Which experts lie in a token's best groups: bool [T, E].

    A group counts by the sum of its two best scores, the selection bias included. With groups on
    nodes a token travels to few of them. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    score_TGe = score_TE.unflatten(1, (spec.num_groups, -1))
    best_TGe = score_TGe.topk(min(2, score_TGe.shape[2]), dim=2).values
    assert spec.top_groups is not None
    chosen_TM = ops.select_top_k(best_TGe.sum(2), spec.top_groups)
    within_TG = torch.zeros_like(score_TGe[..., 0], dtype=torch.bool).scatter(1, chosen_TM, True)
    return within_TG.repeat_interleave(score_TGe.shape[2], dim=1)


class ExpertRouter(nn.Module):
    """Scores the experts of an MLP and picks top_k of them for each token."""

    steering: Steering | None = None
    selection_bias: Tensor | None

    def __init__(self, spec: MoEMLP, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        bias = torch.zeros(spec.num_experts, dtype=torch.float32) if spec.selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(
        self, x_TH: Tensor, valid_T: Tensor | None, reference_E: Tensor | None
    ) -> ExpertChoice:
        """Choose for every token."""
        spec = self.spec
        logits_TE = project(x_TH, self.weight)
        reference_E = reference_E if spec.balance_scope == "global" else None
        steering = self.steering
        steered = steering is not None and steering.chooses
        if not spec.limited and not steered and ops.routes_at_once(logits_TE):
            bias_E = self.selection_bias
            how = spec.score, spec.renormalise, spec.weight_scale
            routed = ops.route(logits_TE, spec.top_k, *how, bias_E, valid_T)
            load = summed(routed, spec.top_k, reference_E)
            weights_TK = reweigh(routed.weights_TK, steering, routed.indices_TK)
            return ExpertChoice(routed.indices_TK, weights_TK, load, routed.plan)
        if steering is not None:
            logits_TE = add(logits_TE, steering.logits_E)
        scores_TE = logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()
        choice_TE = logits_TE.detach()  # scores of different logits can be the same
        if self.selection_bias is not None:
            choice_TE = scores_TE.detach() + self.selection_bias.to(scores_TE)
        if steering is not None:
            choice_TE = add(choice_TE, steering.select_E)
        if spec.limited:
            ranked_TE = choice_TE
            if self.selection_bias is None:
                selected_E = None if steering is None else steering.select_E
                ranked_TE = add(scores_TE.detach(), selected_E)
            choice_TE = choice_TE.masked_fill(~within_reach(ranked_TE, spec), -torch.inf)
        if steering is not None and steering.top_k_E is not None:
            last_E = steering.top_k_E.to(choice_TE)
            # what is forced may come from any group
            choice_TE = torch.where(last_E >= ALWAYS, last_E, choice_TE + last_E)
        indices_TK = ops.select_top_k(choice_TE, spec.top_k)
        weights_TK = spec.weight_scale * ops.weigh(scores_TE, indices_TK, spec.renormalise)
        weights_TK = reweigh(weights_TK, steering, indices_TK)
        probability_TE = scores_TE
        if spec.score == "sigmoid":
            probability_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        load = measure(probability_TE, indices_TK, valid_T, "unit", reference_E, logits_TE)
        return ExpertChoice(indices_TK, weights_TK, load)
