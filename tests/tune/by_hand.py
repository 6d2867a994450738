"""What a tuned router should do, token by token and in plain numbers, from the published rules.

    Rule(score="sigmoid", top_k=8, bias=[…], groups=8, top_groups=4, scale=2.5)
    weights_of(logits, rule, "pre_topk", {3: "off", 5: "force"}, 0.5)    # [E], 0 where not chosen

Nothing here calls the package.
"""

import math
from dataclasses import dataclass

Actions = dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Rule:
    score: str  # softmax, sigmoid, chosen
    top_k: int
    renormalise: bool = True
    scale: float = 1.0
    bias: list[float] | None = None
    groups: int = 1
    top_groups: int = 1
    best: int = 2  # how many of a group's scores count


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def amount(action: str, scale: float) -> float:
    """What an action before the choice adds."""
    if action.startswith("bias:"):
        return scale * float(action[5:])
    far = 1e4 if scale == 1 else -math.log(1 - scale)
    return far if action == "force" else -far


def best(values: dict[int, float], count: int) -> list[int]:
    return sorted(values, key=lambda e: -values[e])[:count]


def weights_of(
    logits: list[float], rule: Rule, semantics: str, actions: Actions, scale: float
) -> list[float]:
    """Every expert's weight for one token."""
    experts, logits = len(logits), list(logits)
    added = dict.fromkeys(range(experts), 0.0)  # on what experts are chosen by, from the start
    late = dict.fromkeys(range(experts), 0.0)
    for expert, action in actions.items():
        if semantics == "pre_topk":
            late[expert] = amount(action, scale)
        if semantics == "pre_select":
            if rule.bias is None and action != "force":
                logits[expert] += amount(action, scale)  # scores feel it
            else:
                added[expert] = amount(action, scale)
    if rule.score == "sigmoid":
        scores = [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in logits]
    else:
        scores = softmax(logits)
    by = logits if rule.bias is None else [s + b for s, b in zip(scores, rule.bias, strict=True)]
    choice = {e: by[e] + added[e] + late[e] for e in range(experts)}
    if rule.groups > rule.top_groups:
        size = experts // rule.groups
        ranked = scores if rule.bias is None else by
        worth = {}
        for group in range(rule.groups):
            own = [ranked[e] + added[e] for e in range(group * size, (group + 1) * size)]
            worth[group] = sum(sorted(own)[-rule.best :])
        near = best(worth, rule.top_groups)
        forced = [e for e in late if late[e] >= 1e4]
        choice = {e: c for e, c in choice.items() if e // size in near or e in forced}
    chosen = best(choice, rule.top_k)
    weights = [scores[e] if e in chosen else 0.0 for e in range(experts)]
    if rule.score == "chosen":
        shares = softmax([logits[e] for e in chosen])
        weights = [shares[chosen.index(e)] if e in chosen else 0.0 for e in range(experts)]
    elif rule.renormalise:
        weights = [w / sum(weights) for w in weights]
    weights = [rule.scale * w for w in weights]
    return gained(weights, semantics, actions, scale)


def gained(weights: list[float], semantics: str, actions: Actions, scale: float) -> list[float]:
    """Weights with their gains, where a semantics is one of them."""
    if not semantics.startswith("post_"):
        return weights
    kept = list(weights)
    for expert, action in actions.items():
        gain = 0.0 if action == "off" else float(action.removeprefix("gain:"))
        kept[expert] *= 1 + scale * (gain - 1)
    if semantics == "post_renorm" and sum(kept) > 0:
        kept = [w * sum(weights) / sum(kept) for w in kept]
    return kept


def norm_gate(
    queries: list[list[float]], spec: dict, semantics: str, actions: Actions, scale: float
) -> list[float]:
    """MoH without parameters: a gate per unit, of each unit's query."""
    shared, total = set(spec["shared_heads"]), len(queries)
    routed = [u for u in range(total) if u not in shared]
    norm = {u: math.sqrt(sum(q * q for q in queries[u])) for u in routed}
    mean = sum(norm.values()) / len(norm)
    deviation = math.sqrt(sum((n - mean) ** 2 for n in norm.values()) / max(len(norm) - 1, 1))
    rank = {u: n / (deviation + 1e-6) for u, n in norm.items()}
    for unit, action in actions.items():
        if semantics.startswith("pre_"):
            rank[unit] += amount(action, scale)
    on = best(rank, spec["top_k"])
    factor = spec.get("routed_scale", 1.0)
    gate = [1.0 if u in shared else factor if u in on else 0.0 for u in range(total)]
    return gained(gate, semantics, actions, scale)


def calibrated_gate(
    scores: list[float], spec: dict, semantics: str, actions: Actions, scale: float, total: int
) -> list[float]:
    """The best scores of the routed units, or with a threshold those that are not negative."""
    shared = spec["shared_heads"]
    routed = [u for u in range(total) if u not in shared]
    rank = dict(zip(routed, scores, strict=True))
    for unit, action in actions.items():
        if semantics.startswith("pre_"):
            rank[unit] += amount(action, scale)
    if spec.get("budget") == "threshold":
        on = [u for u in routed if rank[u] >= 0]
    else:
        on = best(rank, spec["top_k"])
    factor = spec.get("routed_scale", 1.0)
    gate = [1.0 if u in shared else factor if u in on else 0.0 for u in range(total)]
    return gained(gate, semantics, actions, scale)


def two_stage_gate(
    parts: dict[str, list[float]], spec: dict, semantics: str, actions: Actions, scale: float
) -> list[float]:
    """MoH's soft router: logits of routed heads, of shared ones, and of the two between them."""
    shared, k = spec["shared_heads"], spec["top_k"]
    total = len(parts["routed"]) + len(shared)
    routed = [h for h in range(total) if h not in shared]
    logits = dict(zip(routed, parts["routed"], strict=True))
    rank = dict(logits)
    for head, action in actions.items():
        if semantics == "pre_select" and action != "force":
            logits[head] += amount(action, scale)
        if semantics.startswith("pre_"):
            rank[head] += amount(action, scale)
    share = dict(zip(routed, softmax(list(logits.values())), strict=True))
    on, mix = best(rank, k), softmax(parts["mix"])
    sum_on = sum(share[h] for h in on)
    own = dict(zip(shared, softmax(parts["shared"]), strict=True))
    gate = [
        2 * mix[0] * len(shared) * own[h] if h in own
        else 2 * mix[1] * k * share[h] / sum_on if h in on else 0.0
        for h in range(total)
    ]  # fmt: skip
    return gained(gate, semantics, actions, scale)


def soft_gate(
    logits: list[float], semantics: str, actions: Actions, scale: float
) -> list[float]:  # fmt: skip
    """BAM: every attention expert by its share."""
    added = list(logits)
    for expert, action in actions.items():
        if semantics == "pre_select":
            added[expert] += amount(action, scale)
    return gained(softmax(added), semantics, actions, scale)


def union_weights(
    logits: list[float], spec: dict, bias: list[float] | None, every: bool, semantics: str,
    actions: Actions, scale: float,
) -> list[float]:  # fmt: skip
    """UoE, of a token (or a sequence's mean) that chooses; `every`: it gets all experts."""
    logits, experts = list(logits), len(logits)
    late = dict.fromkeys(range(experts), 0.0)
    for expert, action in actions.items():
        if semantics == "pre_select" and bias is None and action != "force":
            logits[expert] += amount(action, scale)
        elif semantics.startswith("pre_"):
            late[expert] = amount(action, scale)
    share = softmax(logits)
    if bias is not None:
        score = {e: share[e] + bias[e] + late[e] for e in range(experts)}
        on = {e for e in score if score[e] >= 1 / experts} | set(best(score, 1))
    elif spec.get("mode") == "budget":
        on = {e for e in range(experts) if logits[e] + late[e] >= 0}
    else:
        on = set(best({e: logits[e] + late[e] for e in range(experts)}, spec["top_k"]))
    on = set(range(experts)) if every else on
    if spec.get("weights") == "soft":
        total = sum(share[e] for e in on)
        weights = [len(on) * share[e] / total if e in on else 0.0 for e in range(experts)]
    else:
        weights = [float(e in on) for e in range(experts)]
    return gained(weights, semantics, actions, scale)
