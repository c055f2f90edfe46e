"""The optimisation itself: one step at a time, with everything that it depends on in one place."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from lora_trainer import adapter, adapting
from lora_trainer.adapter import LoraPair
from lora_trainer.adapting import Setup
from lora_trainer.architectures.base import UNET, BaseModel, Conditioning
from lora_trainer.captions import CaptionRules
from lora_trainer.config import TrainingConfig
from lora_trainer.data import BatchOrder, Picture
from lora_trainer.ema import Ema
from lora_trainer.encoding import Latents, Texts, draw_use, time_ids
from lora_trainer.errors import ConfigError
from lora_trainer.noise import NoiseProcess
from lora_trainer.optimizers import effective_rate, evaluation_weights, make_optimizer
from lora_trainer.plan import Place, Plan, make_plan, make_schedule
from lora_trainer.state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all processes."""

    loss: float
    """The loss that was minimised: with its weights, mean over the step's pictures."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    epoch: int
    """Counted from 1."""
    images: int


class Draws:
    """Random choices for captions, from the generator that everything else of a step comes from."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def uniform(self) -> float:
        """From 0 to below 1."""
        return float(torch.rand((), generator=self._generator))

    def permutation(self, count: int) -> list[int]:
        """0 to count - 1 in a random order."""
        return [int(place) for place in torch.randperm(count, generator=self._generator)]


class Loop:
    """The LoRA, its optimizer and its place in the data. `step` counts finished optimizer steps."""

    def __init__(
        self,
        config: TrainingConfig,
        plan: Plan,
        *,
        accelerator: Accelerator,
        model: BaseModel,
        pairs: list[LoraPair],
        pictures: list[Picture],
        latents: Latents,
        texts: Texts,
        noise: NoiseProcess,
        order: BatchOrder,
    ) -> None:
        self.step = 0
        self.plan = plan
        self._config = config
        self._accelerator = accelerator
        self._model = model
        self._pairs = pairs
        self._parameters = adapter.parameters(pairs)
        self._pictures = pictures
        self._latents = latents
        self._texts = texts
        self._noise = noise
        self._order = order
        self._setup = Setup.of(
            config,
            images=len(pictures),
            images_per_epoch=sum(picture.repeats for picture in pictures),
            batches_per_epoch=plan.batches_per_epoch,
        )
        self._captions = CaptionRules.from_config(config)
        self._schedule = make_schedule(config, plan.total_steps)
        self._trains_text = any(pair.part != UNET for pair in pairs)
        self._rates: list[float] = []
        self._optimizer = self._make_optimizer()
        self._ema = Ema(self._parameters, config.ema_decay) if config.ema_decay else None
        # each process draws its own noise; the first one's is that of a run with one process
        rank = accelerator.process_index
        self._generator = torch.Generator().manual_seed(config.seed + rank)
        self._draws = Draws(self._generator)
        torch.manual_seed(config.seed + rank)  # dropout
        self._epoch_batches: tuple[int, list[list[int]]] = (-1, [])

    @property
    def epoch(self) -> int:
        """The epoch of the last finished step, counted from 1."""
        return self.plan.epoch_of(max(0, self.step - 1)) + 1

    def advance(self) -> StepResult:
        """Do one optimizer step."""
        factor = self._set_learning_rates()
        batches = self._batches_of_step()
        loss = torch.zeros((), device=self._accelerator.device)
        for batch in batches:
            part = self._loss(batch) / len(batches)
            self._accelerator.backward(part)
            loss += part.detach()
        self._average_gradients()
        # an infinite limit clips nothing, but still measures the norm
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._config.max_grad_norm or math.inf)
        self._optimizer.step()
        rate = effective_rate(self._optimizer.optimizer) if factor else 0.0
        self._optimizer.zero_grad()
        if self._ema:
            self._ema.update()
        self.step += 1
        images = sum(map(len, batches)) * self._accelerator.num_processes
        loss = cast("Tensor", self._accelerator.reduce(loss, reduction="mean"))
        return StepResult(loss.item(), rate, 0.0 if norm is None else float(norm), self.epoch, images)

    def rehearse(self) -> None:
        """Forward and backward on the batch with the most pixels, and forget it: no weight and no generator moves."""
        batch = max(self._order.epoch(0), key=self._pixels)
        saved = self._generator.get_state()
        with torch.random.fork_rng():
            self._accelerator.backward(self._loss(batch))
        self._generator.set_state(saved)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """After a rehearsal, whole or broken off."""
        self._optimizer.zero_grad()

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer will keep: at most two float32 numbers a parameter."""
        return 8 * sum(parameter.numel() for parameter in self._parameters)

    def _pixels(self, batch: list[int]) -> int:
        return sum(math.prod(self._pictures[index].placement.bucket) for index in batch)

    @contextlib.contextmanager
    def weights_to_keep(self) -> Iterator[None]:
        """Inside, the LoRA has the weights that are saved, sampled and validated: averaged ones where the options say
        so. Afterwards the trained ones are back, bit for bit."""
        with (
            evaluation_weights(self._optimizer.optimizer),
            self._ema.applied() if self._ema else contextlib.nullcontext(),
        ):
            yield

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self, validation: dict[str, Any], recipe: str) -> TrainingState:
        """Everything that the next step depends on. All processes have to call it. `recipe`: see `recipe_digest`."""
        scaler = self._accelerator.scaler
        epoch = self.plan.epoch_of(self.step)
        generators = {
            "noise": self._generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        return TrainingState(
            step=self.step,
            batches_per_epoch=self.plan.batches_per_epoch,
            lora=adapter.tensors(self._pairs),
            optimizer=self._optimizer.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            ema=self._ema.state_dict() if self._ema else None,
            generators=gather_object([generators]),
            validation=validation,
            recipe=recipe,
            epoch=epoch,
            epoch_images=self._order.images_before(epoch, self.plan.batches_of(self.step).start),
            setup=self._setup,
        )

    def restore(self, state: TrainingState) -> list[str]:
        """Go back to a saved moment; returns `adapting.differences`, what goes on otherwise than it was. ConfigError
        when the state belongs to another LoRA, dataset or number of processes."""
        if len(state.generators) != self._accelerator.num_processes:
            raise ConfigError(f"'resume': this state is of {len(state.generators)} processes; start as many.")
        self._take_up_data(state)
        if bool(state.ema) != bool(self._ema):
            raise ConfigError("'resume': 'ema_decay' was switched on or off since this state was saved.")
        try:
            adapter.load_tensors(self._pairs, state.lora)
            # moments of one optimizer mean nothing to another
            if state.setup is None or state.setup.optimizer == self._setup.optimizer:
                self._optimizer.optimizer.load_state_dict(state.optimizer)
            if self._ema and state.ema:
                self._ema.load_state_dict(state.ema)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"'resume': the state does not fit the configuration: {error}.") from error
        if state.scaler and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(state.scaler)
        self._restore_generators(state.generators[self._accelerator.process_index])
        self.step = state.step
        return adapting.differences(state.setup, self._setup) if state.setup else []

    def _take_up_data(self, state: TrainingState) -> None:
        """Go on after as many pictures of the epoch as were seen. In the same batches, that is the very place. In
        others, it is rounded up to a whole batch, and as their order is another one, some pictures come twice in this
        epoch and others not at all; from the next one on all is as if it had been so from the start."""
        if state.setup is None:
            if state.batches_per_epoch != self.plan.batches_per_epoch:
                raise ConfigError("'resume': the dataset or the batch size has changed since this state was saved.")
            return
        adapting.check_dataset(state.setup, self._setup)
        epoch, batch = state.epoch, self._order.batch_after(state.epoch, state.epoch_images)
        if batch == self.plan.batches_per_epoch:
            epoch, batch = epoch + 1, 0
        self.plan = make_plan(self._config, self.plan.batches_per_epoch, Place(state.step, epoch, batch))
        self._schedule = make_schedule(self._config, self.plan.total_steps)

    def _restore_generators(self, saved: dict[str, Tensor | None]) -> None:
        self._generator.set_state(cast("Tensor", saved["noise"]))
        torch.set_rng_state(cast("Tensor", saved["torch"]))
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])

    # --- one step -----------------------------------------------------------------------------------------------------

    def _make_optimizer(self) -> Any:
        rates = adapter.rates(self._model, self._config)
        groups = []
        for part in dict.fromkeys(pair.part for pair in self._pairs):
            groups.append({"params": adapter.parameters(p for p in self._pairs if p.part == part), "lr": rates[part]})
            self._rates.append(rates[part])
        optimizer = make_optimizer(self._config, groups, self._accelerator.device)
        return self._accelerator.prepare(optimizer)

    def _set_learning_rates(self) -> float:
        factor = self._schedule.factor(self.step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return factor

    def _batches_of_step(self) -> list[list[int]]:
        epoch = self.plan.epoch_of(self.step)
        if self._epoch_batches[0] != epoch:
            self._epoch_batches = epoch, self._order.epoch(epoch)
        return self._epoch_batches[1][self.plan.batches_of(self.step)]

    def _loss(self, batch: list[int]) -> Tensor:
        pictures = [self._pictures[index] for index in batch]
        uses = [
            draw_use(picture, index, self._config, self._generator)
            for picture, index in zip(pictures, batch, strict=True)
        ]
        latents = self._latents.batch(uses)
        epoch = self.plan.epoch_of(self.step)
        captions = [self._captions.caption_for(picture.caption, epoch, self._draws) for picture in pictures]
        noisy = self._noise.draw(latents, self._generator)
        sizes = torch.tensor([time_ids(*pair) for pair in zip(pictures, uses, strict=True)], device=latents.device)
        with self._accelerator.autocast():
            answer = self._model.predict(noisy.noisy, noisy.timesteps, self.condition(captions), sizes)
        per_picture = self._noise.loss(answer, noisy)
        prior = self._config.prior_loss_weight
        weights = [prior if picture.is_regularisation else 1.0 for picture in pictures]
        return (per_picture * torch.tensor(weights, device=per_picture.device)).mean()

    def condition(self, captions: list[str]) -> Conditioning:
        """Encoded anew where a text encoder is trained, else once."""
        if self._trains_text:
            return self._model.encode(self._model.tokenize(captions))
        return self._texts.batch(captions)

    def _average_gradients(self) -> None:
        """One exchange for all tensors, after the step's last batch."""
        if self._accelerator.num_processes == 1:
            return
        # none where the answer does not depend on a module, such as the last layer of SDXL's first text encoder
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = cast("Tensor", self._accelerator.reduce(flat, reduction="mean"))
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
