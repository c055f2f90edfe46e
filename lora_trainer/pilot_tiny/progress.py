"""What the two training programs share: the learning rate as a formula of the step, averaged weights, and resuming.

Guarantee: on one CPU thread, a training that is killed and started again ends with the same weights, bit for bit, as
one that was never interrupted, and a second training from the same seed and start gives the same weights as the first.
"""

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.atomic import write_file

SAVE_EVERY = 500
"""Steps between two saved states."""
REPORT_EVERY = 100
"""Steps between two reported lines."""
Report = Callable[[str], None]
"""Called with a line for people."""


def learning_rate_factor(step: int, total: int, *, warmup: int, floor: float) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor`; `step` counts from 0."""
    fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup)))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * fall)


class Average:
    """An exponential moving average of weights, which gives steadier pictures than the last step's weights."""

    def __init__(self, weights: Sequence[nn.Parameter], decay: float) -> None:
        self._weights = weights
        self._decay = decay
        self.values = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights of a step, counted from 1; the first steps count more."""
        decay = min(self._decay, (step + 10) / (step + 20))
        for value, weight in zip(self.values, self._weights, strict=True):
            value.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Put the average in place of the weights."""
        for value, weight in zip(self.values, self._weights, strict=True):
            weight.copy_(value)


@dataclass(frozen=True)
class Steps:
    """How long to train."""

    total: int
    """The learning rate falls over so many."""
    stop_after: int | None = None
    """The last one to take, when it is not the last of all."""

    @property
    def last(self) -> int:
        """The number of steps that are taken."""
        return min(self.total, self.stop_after or self.total)


class Training:
    """AdamW over some weights, their average, the random generator, and the steps done; kept in one file."""

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        average: float,
        seed: int,
        state: Path,
        report: Report,
    ) -> None:
        self.weights = list(weights)
        self.optimizer: Any = torch.optim.AdamW(
            self.weights, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.average = Average(self.weights, average)
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self._losses: list[float] = []
        self._learning_rate = learning_rate
        self._state = state
        self._report = report
        if state.is_file():
            self._load()

    def steps(self, steps: Steps, *, warmup: int, floor: float) -> Iterator[int]:
        """The numbers of the steps still to do, each with its learning rate set; the state is saved on the way."""
        total, last = steps.total, steps.last
        started, begun = time.monotonic(), self.step
        while self.step < last:
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate * learning_rate_factor(self.step, total, warmup=warmup, floor=floor)
            yield self.step
            if self.step % REPORT_EVERY == 0 or self.step == last:
                pace = (self.step - begun) / (time.monotonic() - started)
                self._report(f"step {self.step} of {total}, {pace:.2f} a second, loss {mean(self._losses):.4f}")
                self._losses.clear()
            if self.step % SAVE_EVERY == 0 or self.step == last:
                self._save()

    def take_step(self, loss: Tensor) -> None:
        """One step down the loss's gradient, which is clipped to length 1."""
        self._losses.append(loss.item())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.step)

    def _save(self) -> None:
        content = {
            "step": self.step,
            "weights": [weight.detach() for weight in self.weights],
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(self._state, buffer.getvalue())

    @torch.no_grad()
    def _load(self) -> None:
        content = torch.load(self._state, weights_only=True)
        self.step = content["step"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"])
        for weight, stored in zip(self.weights, content["weights"], strict=True):
            weight.copy_(stored)
        for value, stored in zip(self.average.values, content["average"], strict=True):
            value.copy_(stored)
