"""What changes from step to step, as pure functions of the step, so that a resumed run goes on."""

import math

from moe.config import Schedule


def learning_rate(step: int, schedule: Schedule, peak: float, steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) out of `steps`.

    Warmup is linear and ends at `peak`; the last step has `peak · final_ratio`. wsd stays at the
    peak until its final, linear decay.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    begin = schedule.warmup_steps
    if schedule.kind == "wsd":
        begin = max(begin, steps - (schedule.decay_steps or max(1, steps // 5)))
    if step < begin:
        return peak
    done = min(1.0, (step - begin + 1) / max(1, steps - begin))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)


def annealed(num_experts: int, top_k: int, step: int, steps: int) -> int:
    """Experts a token visits in optimiser step `step` (0-based): all of them at first, `top_k` from
    step `steps` on, and in between on a straight line.
    """
    if step >= steps:
        return top_k
    return round(num_experts + (top_k - num_experts) * step / steps)
