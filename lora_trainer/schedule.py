"""Learning-rate schedules as plain formulas of the step: nothing to save, and a resumed run cannot drift.

The shapes and their off-by-one follow sd-scripts: the first of N warm-up steps has factor 0, the N+1st has factor 1.
"""

import math

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts")


def learning_rate_factor(schedule: str, *, steps_done: int, total_steps: int, warmup_steps: int, cycles: int) -> float:
    """The factor on the learning rate for the step that comes after `steps_done` finished ones."""
    if schedule == "constant":
        return 1.0
    if steps_done < warmup_steps:
        return steps_done / max(1, warmup_steps)
    if schedule == "constant_with_warmup":
        return 1.0
    progress = (steps_done - warmup_steps) / max(1, total_steps - warmup_steps)
    if progress >= 1:
        return 0.0
    if schedule == "linear":
        return 1 - progress
    periods = cycles if schedule == "cosine_with_restarts" else 1
    return 0.5 * (1 + math.cos(math.pi * (periods * progress % 1)))
