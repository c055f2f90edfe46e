"""The optimisation itself: one step at a time, with everything that it depends on in one place."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_trainer import adapter
from lora_trainer.adapter import LoraPair
from lora_trainer.config import TrainingConfig
from lora_trainer.data import BatchOrder, Picture
from lora_trainer.encoding import Captions, Latents, time_ids
from lora_trainer.errors import ConfigError
from lora_trainer.noise import NoiseProcess
from lora_trainer.schedule import learning_rate_factor
from lora_trainer.state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """The loss that was minimised: weighted by min-SNR, mean over the step's pictures."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    epoch: int
    """Counted from 1."""
    images: int


class Loop:
    """The LoRA, its optimizer and its place in the data. `step` counts finished optimizer steps."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        accelerator: Accelerator,
        unet: nn.Module,
        pairs: list[LoraPair],
        pictures: list[Picture],
        latents: Latents,
        captions: Captions,
        noise: NoiseProcess,
        order: BatchOrder,
    ) -> None:
        self.step = 0
        self.epoch = 1
        self._config = config
        self._accelerator = accelerator
        self._unet = unet
        self._pairs = pairs
        self._parameters = adapter.parameters(pairs)
        self._pictures = pictures
        self._latents = latents
        self._captions = captions
        self._noise = noise
        self._order = order
        self._generator = torch.Generator().manual_seed(config.seed)
        self._optimizer = self._make_optimizer()
        self._batches: Iterator[tuple[int, list[int]]] = order.from_batch(0)

    def advance(self) -> StepResult:
        """Do one optimizer step."""
        learning_rate = self._set_learning_rate()
        loss = torch.zeros((), device=self._accelerator.device)
        images = 0
        for _ in range(self._config.gradient_accumulation_steps):
            epoch, batch = next(self._batches)
            part = self._loss(batch) / self._config.gradient_accumulation_steps
            self._accelerator.backward(part)
            loss += part.detach()
            images += len(batch)
        # an infinite limit clips nothing, but still measures the norm
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._config.max_grad_norm or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step, self.epoch = self.step + 1, epoch + 1
        return StepResult(loss.item(), learning_rate, 0.0 if norm is None else float(norm), self.epoch, images)

    def state(self) -> TrainingState:
        """Everything that the next step depends on."""
        scaler = self._accelerator.scaler
        return TrainingState(
            step=self.step,
            batches_per_epoch=self._order.batches_per_epoch,
            lora=adapter.tensors(self._pairs),
            optimizer=self._optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            noise_generator=self._generator.get_state(),
            global_generator=torch.get_rng_state(),
        )

    def restore(self, state: TrainingState) -> None:
        """Go back to a saved moment; ConfigError when it belongs to another LoRA or dataset."""
        if state.batches_per_epoch != self._order.batches_per_epoch:
            raise ConfigError("'resume': the dataset or the batch size has changed since this state was saved.")
        try:
            adapter.load_tensors(self._pairs, state.lora)
            self._optimizer.load_state_dict(state.optimizer)
        except ValueError as error:
            raise ConfigError(f"'resume': the state does not fit the configuration: {error}.") from error
        if state.scaler and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(state.scaler)
        self._generator.set_state(state.noise_generator)
        torch.set_rng_state(state.global_generator)
        self.step = state.step
        self._batches = self._order.from_batch(state.step * self._config.gradient_accumulation_steps)

    def _make_optimizer(self) -> Any:
        # fused: one kernel for hundreds of small tensors
        optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self._config.learning_rate,
            fused=self._accelerator.device.type in ("cuda", "cpu"),
            **self._config.optimizer_options,
        )
        return self._accelerator.prepare(optimizer)

    def _set_learning_rate(self) -> float:
        factor = learning_rate_factor(
            self._config.lr_scheduler,
            steps_done=self.step,
            total_steps=self._config.max_train_steps,
            warmup_steps=self._config.lr_warmup_steps,
            cycles=self._config.lr_scheduler_num_cycles,
        )
        learning_rate = self._config.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def _loss(self, batch: list[int]) -> Tensor:
        flips = self._flips(len(batch))
        latents = self._latents.batch(zip(batch, flips, strict=True))
        caption = self._captions.batch([self._caption(index) for index in batch])
        noisy = self._noise.add(latents, self._generator)
        sizes = [time_ids(self._pictures[index], flipped=flip) for index, flip in zip(batch, flips, strict=True)]
        conditions = {"text_embeds": caption.pooled, "time_ids": torch.tensor(sizes, device=latents.device)}
        with self._accelerator.autocast():
            answer = self._unet(noisy.noisy, noisy.timesteps, caption.sequence, added_cond_kwargs=conditions).sample
        per_picture = (answer.float() - noisy.target).square().mean(dim=(1, 2, 3))
        loss: Tensor = (per_picture * noisy.weights).mean()
        return loss

    def _flips(self, count: int) -> list[bool]:
        if not self._config.flip_aug:
            return [False] * count
        return [bool(heads) for heads in torch.randint(2, (count,), generator=self._generator)]

    def _caption(self, index: int) -> str:
        """The picture's caption as it is used this time."""
        caption = self._pictures[index].caption
        if self._config.caption_dropout_rate and self._draw() < self._config.caption_dropout_rate:
            return ""
        return self._shuffled(caption) if self._config.shuffle_caption else caption

    def _draw(self) -> float:
        return float(torch.rand((), generator=self._generator))

    def _shuffled(self, caption: str) -> str:
        tags = [tag.strip() for tag in caption.split(",")]
        kept, rest = tags[: self._config.keep_tokens], tags[self._config.keep_tokens :]
        order = torch.randperm(len(rest), generator=self._generator)
        return ", ".join(kept + [rest[place] for place in order])
