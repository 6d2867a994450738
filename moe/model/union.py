"""The router of a union of experts: which parts of a layer a token gets, and how much they count.

B sequences, S tokens each, T = B·S, E experts, K chosen on average.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.kernels import ops
from moe.model import router
from moe.model.losses import RoutingLoad, measure
from moe.model.spec import UoEAttention, UoEMLP, routed_on
from moe.model.steering import Steering, add, reweigh


class Choice(NamedTuple):
    """What a union router decided."""

    mask_TE: Tensor  # bool
    weights_TE: Tensor  # float32, 0 where not chosen
    indices_TK: Tensor | None  # the same as indices, where every token has K
    set_BE: Tensor | None  # bool, where a whole sequence has one set
    load: RoutingLoad


class UnionRouter(nn.Module):
    """Softmax scores, and one of five rules for what they choose (`spec.mode`); those of mode
    `budget` are sigmoids, for it asks of each expert by itself.

    A hard weight is exactly 1, with the gradient of its score; the experts that were not chosen are
    not computed, so their scores get a gradient through the softmax and the balance loss alone.
    """

    steering: Steering | None = None
    selection_bias: Tensor | None

    def __init__(self, spec: UoEAttention | UoEMLP, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.mode = spec.mode if isinstance(spec, UoEMLP) else "token_choice"
        self.thresholds = self.mode == "budget"
        self.use(spec.top_k)
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.num_experts)) if spec.router_bias else None
        # a bias can be so large that probabilities of different logits are the same
        learned = self.bias is not None and self.mode in ("token_choice", "sequence")
        self.by_logits = self.thresholds or learned
        biased = self.mode == "threshold"
        bias = torch.zeros(spec.num_experts, dtype=torch.float32) if biased else None
        self.register_buffer("selection_bias", bias)

    def use(self, top_k: int) -> None:
        """Choose so many experts: training may come down from all of them to the config's own.

        All at once are the dense layer, whose scale is 1, so the output's scale comes along. Modes
        `threshold` and `budget` know no number: their biases find their own way.
        """
        if self.thresholds or self.mode == "threshold":
            top_k = self.spec.top_k
        experts, own = self.spec.num_experts, self.spec.top_k
        self.top_k, self.output_scale = top_k, getattr(self.spec, "output_scale", 1.0)
        if top_k > own:
            self.output_scale = 1 + (self.output_scale - 1) * (experts - top_k) / (experts - own)

    @property
    def share(self) -> float:
        """Of the experts, on per token, on average where that is what is fixed."""
        on = routed_on(self.spec) if self.thresholds else self.top_k
        return on / self.spec.num_experts

    def forward(
        self,
        x_BSH: Tensor,
        valid_T: Tensor | None,
        reference_E: Tensor | None,
        forced_T: Tensor | None = None,
        set_BE: Tensor | None = None,
    ) -> Choice:
        """Choose for every token; `forced_T` tokens get every expert.

        `set_BE` is the choice that mode `sequence` made when it saw the prompt.
        """
        scored_BSH = self._pooled(x_BSH, valid_T) if self.mode == "sequence" else x_BSH
        scored_TH = scored_BSH.reshape(-1, scored_BSH.shape[-1])
        logits_TE = router.project(scored_TH, self.weight, self.bias)
        steering = self.steering
        if steering is not None:
            logits_TE = add(logits_TE, steering.logits_E)
        probability_TE = logits_TE.sigmoid() if self.thresholds else logits_TE.softmax(-1)
        score_TE = logits_TE.detach() if self.by_logits else probability_TE.detach()
        if steering is not None and steering.chooses:
            # a threshold is one of probabilities; ranks, and what is added, are of logits
            ranked_TE = score_TE if self.mode == "threshold" else logits_TE.detach()
            score_TE = add(add(ranked_TE, steering.select_E), steering.top_k_E)
        mask_TE, indices_TK = self._choose(score_TE, x_BSH.shape[:2], valid_T)
        if self.mode == "sequence":
            set_BE = mask_TE if set_BE is None else set_BE
            length = x_BSH.shape[1]
            mask_TE = set_BE.repeat_interleave(length, 0)
            indices_TK = set_BE.nonzero()[:, 1].view(len(set_BE), -1).repeat_interleave(length, 0)
            probability_TE = probability_TE.repeat_interleave(length, 0)
            logits_TE = logits_TE.repeat_interleave(length, 0)
        load = self._measure(probability_TE, mask_TE, valid_T, reference_E, logits_TE)
        if forced_T is not None:
            mask_TE = mask_TE | forced_T[:, None]
        weights_TE = reweigh(self._weigh(probability_TE, mask_TE), steering)
        return Choice(mask_TE, weights_TE, indices_TK, set_BE, load)

    def _measure(
        self,
        probability_TE: Tensor,
        mask_TE: Tensor,
        valid_T: Tensor | None,
        reference_E: Tensor | None,
        logits_TE: Tensor,
    ) -> RoutingLoad:
        if self.thresholds:
            given = probability_TE, mask_TE.to(probability_TE), valid_T
            return router.measure_budget(*given, routed_on(self.spec), logits_TE)
        reference_E = reference_E if self.spec.balance_scope == "global" else None
        given = probability_TE, mask_TE, valid_T
        return measure(*given, "unit", reference_E, logits_TE, k=self.top_k)

    def _choose(
        self, score_TE: Tensor, shape: tuple[int, int] | torch.Size, valid_T: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the mode's rule chooses [T, E], as indices [T, K] too where K is fixed."""
        if self.mode == "threshold":
            assert self.selection_bias is not None
            score_TE = score_TE + self.selection_bias.to(score_TE)
            best_T1 = ops.select_top_k(score_TE, 1)
            above_TE = ops.select_above(score_TE, 1 / score_TE.shape[1])
            return above_TE.scatter(1, best_T1, torch.ones_like(best_T1, dtype=torch.bool)), None
        if self.thresholds:
            return ops.select_above(score_TE, 0.0), None
        if self.mode == "expert_choice":
            return self._best_tokens(score_TE, shape, valid_T), None
        indices_TK = ops.select_top_k(score_TE, self.top_k)
        return torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, indices_TK, True), indices_TK

    def _best_tokens(
        self, score_TE: Tensor, shape: tuple[int, int] | torch.Size, valid_T: Tensor | None
    ) -> Tensor:
        """Each expert's best K/E of a sequence's tokens, at least one."""
        score_BSE = score_TE.view(*shape, -1)
        valid_BS = torch.ones_like(score_BSE[..., 0], dtype=torch.bool)
        if valid_T is not None:
            valid_BS = valid_T.view(*shape)
        score_BSE = score_BSE.masked_fill(~valid_BS[..., None], -1.0)
        order_BSE = score_BSE.sort(dim=1, descending=True, stable=True).indices
        place = torch.arange(shape[1], device=score_TE.device)[None, :, None].expand_as(order_BSE)
        rank_BSE = torch.empty_like(order_BSE).scatter_(1, order_BSE, place)
        share = self.top_k / score_TE.shape[1]
        quota_B = (share * valid_BS.sum(1)).ceil().clamp(min=1)
        return ((rank_BSE < quota_B[:, None, None]) & valid_BS[..., None]).view_as(score_TE)

    def _pooled(self, x_BSH: Tensor, valid_T: Tensor | None) -> Tensor:
        """Mean over each sequence's tokens: [B, 1, H]."""
        if valid_T is None:
            return x_BSH.mean(1, keepdim=True)
        weight_BS1 = valid_T.view(*x_BSH.shape[:2], 1).to(x_BSH)
        total_B11 = weight_BS1.sum(1, keepdim=True).clamp(min=1)
        return (x_BSH * weight_BS1).sum(1, keepdim=True) / total_B11

    def _weigh(self, probability_TE: Tensor, mask_TE: Tensor) -> Tensor:
        if self.spec.weights == "hard":
            one = torch.ones_like(probability_TE)
            return torch.where(mask_TE, router.straight_through(one, probability_TE), 0.0)
        chosen_TE = probability_TE * mask_TE
        count_T1 = mask_TE.sum(-1, keepdim=True)
        return count_T1 * chosen_TE / chosen_TE.sum(-1, keepdim=True).clamp(min=1e-20)
