"""Learning-rate schedules: a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, lr: float, schedule: str, warmup: float, min_lr: float) -> float:
    """The rate of optimizer step `step` (1-based) of `total`; `warmup` and `min_lr` are shares of total and lr.

    The first step after the warm-up has the whole rate and the last one still trains, as in transformers' schedules: the end, min_lr, would be
    the rate of step total + 1.

    Example: learning_rate(1, 10, 1.0, "linear", 0.2, 0.0) -> 0.5, steps 2 and 3 -> 1.0, step 10 -> 0.125.
    """
    warm_steps = round(warmup * total)
    if step <= warm_steps:
        return lr * step / warm_steps
    if schedule == "constant":
        return lr
    done = (step - warm_steps - 1) / max(1, total - warm_steps)
    fall = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return lr * (min_lr + (1.0 - min_lr) * fall)
