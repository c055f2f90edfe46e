"""Learning-rate schedules as plain formulas of the step: nothing to save, and a resumed run cannot drift.

The shapes and their off-by-one are transformers', which sd-scripts uses: the first of N warm-up steps has factor 0, the
N+1st has factor 1.
"""

import math
from dataclasses import dataclass

SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "cosine_with_min_lr", "warmup_stable_decay",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A shape over `total_steps`; `minimum` is the lowest factor of the two shapes that have one."""

    name: str
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    cycles: int = 1
    """Falls of cosine_with_restarts. The two shapes with a minimum make so many half waves instead, down and up."""
    power: float = 1.0
    minimum: float = 0.0
    lowest: float = 0.0
    """polynomial: 1e-7 as a share of the learning rate, as transformers has it."""

    def factor(self, steps_done: int) -> float:
        """The factor on the learning rate for the step that comes after `steps_done` finished ones."""
        if self.name == "constant":
            return 1.0
        if steps_done < self.warmup_steps:
            rise = steps_done / self.warmup_steps
            return self._above_minimum(rise) if self.name == "warmup_stable_decay" else rise
        if self.name == "constant_with_warmup":
            return 1.0
        if self.name == "warmup_stable_decay":
            return self._stable_then_decay(steps_done)
        progress = (steps_done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self._fall(min(1.0, progress))

    def _fall(self, progress: float) -> float:
        if self.name == "linear":
            return 1 - progress
        if self.name == "polynomial":
            return (1 - self.lowest) * math.pow(1 - progress, self.power) + self.lowest
        if self.name == "cosine_with_restarts":
            return _half_waves(self.cycles * progress % 1) if progress < 1 else 0.0
        if self.name == "cosine_with_min_lr":
            return self._above_minimum(_half_waves(self.cycles * progress))
        return _half_waves(progress)

    def _stable_then_decay(self, steps_done: int) -> float:
        decayed = steps_done - (self.total_steps - self.decay_steps)
        if steps_done >= self.total_steps:
            return self.minimum
        return 1.0 if decayed < 0 else self._above_minimum(_half_waves(self.cycles * decayed / self.decay_steps))

    def _above_minimum(self, factor: float) -> float:
        return factor * (1 - self.minimum) + self.minimum


def _half_waves(count: float) -> float:
    """A cosine from 1, at 0 after one half wave."""
    return 0.5 * (1 + math.cos(math.pi * count))
