"""torch.compile for the denoiser, with what it costs and from which step on it pays."""

from statistics import median
from typing import Any

from lora_trainer.console import Console

EAGER_STEPS = 4
"""Steps before compiling, to compare with; the first one, which warms up, does not count."""
COMPILED_STEPS = 12
"""Steps until the verdict; the second half of them counts."""


class Compiler:
    """Lets a few steps run as they are, compiles, and says what came of it."""

    def __init__(self, unet: Any, total_steps: int, console: Console) -> None:
        self._unet = unet
        self._total_steps = total_steps
        self._console = console
        self._eager: list[float] = []
        self._compiled: list[float] = []

    def after_step(self, steps_done: int, seconds: float) -> None:
        """Call after each step with how many there were and how long the last one took."""
        if steps_done <= EAGER_STEPS:
            self._eager.append(seconds)
        elif steps_done <= EAGER_STEPS + COMPILED_STEPS:
            self._compiled.append(seconds)
        if steps_done == EAGER_STEPS:
            self._console.line("Compiling the UNet; the next steps take minutes …")
            self._unet.compile()
        if steps_done == EAGER_STEPS + COMPILED_STEPS:
            self._console.line(verdict(self._eager, self._compiled, self._total_steps))


def verdict(eager: list[float], compiled: list[float], total_steps: int) -> str:
    """One sentence from the seconds of each step before and after compiling."""
    before, after = median(eager[1:]), median(compiled[len(compiled) // 2 :])
    spent = sum(compiled) - len(compiled) * after
    facts = f"Compiled: {before:.3f} s a step before, {after:.3f} s now; compiling took {spent:.0f} s"
    if after >= before:
        return f"{facts} and does not pay here."
    break_even = int(spent / (before - after)) + 1
    return f"{facts} and pays from step {break_even:,} of {total_steps:,} on."
