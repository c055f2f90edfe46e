"""Loss on pictures that are not trained, always with the same noise and timesteps: a smooth, comparable curve."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from lora_trainer.architectures.base import BaseModel, Conditioning
from lora_trainer.captions import CaptionRules
from lora_trainer.config import TrainingConfig
from lora_trainer.data import Picture
from lora_trainer.encoding import Latents, Use, time_ids
from lora_trainer.noise import NoiseProcess

TIMESTEPS = 4
"""Evenly spread over the trained range, for every picture."""


@dataclass
class Verdict:
    """What the validations so far say. `best` is the lowest loss, at `best_step`; `without_gain` counts those since."""

    best: float = math.inf
    best_step: int = 0
    without_gain: int = 0

    def add(self, loss: float, step: int) -> bool:
        """Take a new loss; True when it is the best one."""
        if loss < self.best:
            self.best, self.best_step, self.without_gain = loss, step, 0
            return True
        self.without_gain += 1
        return False

    def as_state(self) -> dict[str, Any]:
        """JSON values, for the training state."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "best_step": self.best_step, "without_gain": self.without_gain}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take back what `as_state` gave."""
        self.best = math.inf if saved["best"] is None else saved["best"]
        self.best_step, self.without_gain = saved["best_step"], saved["without_gain"]


@dataclass(kw_only=True)
class Validation:
    """The pictures kept back, encoded, and everything else that a validation needs. Weights of the loss do not count:
    the plain mean square, so that runs with other weights can be compared."""

    config: TrainingConfig
    accelerator: Accelerator
    model: BaseModel
    pictures: list[Picture]
    latents: Latents
    condition: Callable[[list[str]], Conditioning]
    """Of the training: what it has encoded once is not encoded again."""
    noise: NoiseProcess
    verdict: Verdict = field(default_factory=Verdict)

    def __post_init__(self) -> None:
        self._captions = CaptionRules.from_config(self.config)

    @torch.no_grad()
    def loss(self, report: Callable[[int, int], None]) -> float:
        """Mean over pictures and timesteps. Moves no random generator, and leaves every module in its mode."""
        modules = [self.model.unet, *self.model.text_encoders]
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                count = min(len(self.pictures), self.config.max_validation_steps or len(self.pictures))
                losses = []
                for index in range(count):
                    losses.append(self._picture_loss(index))
                    report(index + 1, count)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.train(mode)
        return sum(losses) / len(losses)

    def _picture_loss(self, index: int) -> float:
        picture = self.pictures[index]
        use = Use(index)
        one = self.latents.batch([use])
        latents = one.expand(TIMESTEPS, *one.shape[1:])
        generator = torch.Generator().manual_seed(self.config.noise_seed_of_validation * 100_003 + index)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        batch = self.noise.at(latents, self._timesteps().to(latents.device), noise)
        sizes = torch.tensor([time_ids(picture, use)] * TIMESTEPS, device=latents.device)
        caption = self._captions.plain(picture.caption)
        with self.accelerator.autocast():
            condition = self.condition([caption] * TIMESTEPS)
            answer = self.model.predict(batch.noisy, batch.timesteps, condition, sizes)
        return float((answer.float() - batch.target.float()).square().mean())

    def _timesteps(self) -> torch.Tensor:
        first, end = self.config.min_timestep, self.config.max_timestep
        middles = [(first + (end - first) * (2 * number + 1) / (2 * TIMESTEPS)) for number in range(TIMESTEPS)]
        return torch.tensor([int(middle) for middle in middles])
