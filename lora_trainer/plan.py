"""How many steps a configuration means on a dataset. Torch-free: the dry run shows the same numbers that are trained.

A step never crosses an epoch, as in sd-scripts: the last step of an epoch may have fewer than
`gradient_accumulation_steps` batches. So the place in the data is a function of the step and of where the plan begins.
"""

from dataclasses import dataclass, replace

from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError
from lora_trainer.schedule import Schedule

POLYNOMIAL_END = 1e-7
"""Lowest learning rate of the polynomial schedule, as in diffusers."""


@dataclass(frozen=True)
class Place:
    """Where in the data a step begins: `step` are finished, and `batch` of the epoch's batches are used up."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Of each process."""


@dataclass(frozen=True)
class Plan:
    """Steps and epochs of a run. Epochs and steps are counted from 0 here."""

    total_steps: int
    batches_per_epoch: int
    """Of each process."""
    accumulation: int
    start: Place = Place()
    """Where a resumed run takes up the data. Without other batches than before, that changes nothing."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulation)

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return self.epoch_of(self.total_steps - 1) + 1

    @property
    def steps_left_at_start(self) -> int:
        """Steps in the rest of the epoch in which the plan begins."""
        return -(-(self.batches_per_epoch - self.start.batch) // self.accumulation)

    def epoch_of(self, step: int) -> int:
        """The epoch in which the step that comes after `step` finished ones lies. Of the steps before the start, only
        the last one is known."""
        done = step - self.start.step
        if done < 0:
            return max(0, self.start.epoch - (self.start.batch == 0))
        later = done - self.steps_left_at_start
        return self.start.epoch if later < 0 else self.start.epoch + 1 + later // self.steps_per_epoch

    def batches_of(self, step: int) -> slice:
        """Which of the epoch's batches that step uses."""
        done = step - self.start.step
        later = done - self.steps_left_at_start
        steps, first = (done, self.start.batch) if later < 0 else (later % self.steps_per_epoch, 0)
        first += steps * self.accumulation
        return slice(first, first + self.accumulation)

    def ends_epoch(self, step: int) -> bool:
        """True when an epoch ends with the last of `step` finished steps."""
        return step > 0 and self.epoch_of(step) > self.epoch_of(step - 1)

    def is_due(self, step: int, *, steps: int = 0, epochs: int = 0) -> bool:
        """True when something that happens every so many steps, or epochs, is due after `step` finished ones."""
        by_steps = steps > 0 and step % steps == 0
        return by_steps or (epochs > 0 and self.ends_epoch(step) and self.epoch_of(step) % epochs == 0)


def make_plan(config: TrainingConfig, batches_per_epoch: int, start: Place = Place()) -> Plan:
    """`max_train_epochs`, when set, decides the steps, as in sd-scripts; never fewer than are done at the start."""
    plan = Plan(config.max_train_steps, batches_per_epoch, config.gradient_accumulation_steps, start)
    if not config.max_train_epochs:
        return plan
    epochs_after = config.max_train_epochs - start.epoch - 1
    total = start.step + plan.steps_left_at_start + epochs_after * plan.steps_per_epoch
    return replace(plan, total_steps=max(start.step, total))


def make_schedule(config: TrainingConfig, total_steps: int) -> Schedule:
    """The learning rate's shape, with shares of the run turned into steps."""
    warmup = _steps(config.lr_warmup_steps, total_steps)
    if warmup >= total_steps and config.lr_scheduler != "constant":
        raise ConfigError(f"'lr_warmup_steps' is {warmup}, and the run has only {total_steps} steps: use fewer.")
    return Schedule(
        name=config.lr_scheduler,
        total_steps=total_steps,
        warmup_steps=warmup,
        decay_steps=_steps(config.lr_decay_steps, total_steps),
        cycles=config.lr_scheduler_num_cycles,
        power=config.lr_scheduler_power,
        minimum=config.lr_scheduler_min_lr_ratio,
        lowest=POLYNOMIAL_END / config.learning_rate,
    )


def _steps(value: float, total_steps: int) -> int:
    return int(value * total_steps) if 0 < value < 1 else int(value)
