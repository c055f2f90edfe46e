"""How many steps a configuration means on a dataset. Torch-free: the dry run shows the same numbers that are trained.

A step never crosses an epoch, as in sd-scripts: the last step of an epoch may have fewer than
`gradient_accumulation_steps` batches. So the place in the data is a function of the step alone.
"""

from dataclasses import dataclass

from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError
from lora_trainer.schedule import Schedule

POLYNOMIAL_END = 1e-7
"""Lowest learning rate of the polynomial schedule, as in diffusers."""


@dataclass(frozen=True)
class Plan:
    """Steps and epochs of a run. Epochs and steps are counted from 0 here."""

    total_steps: int
    batches_per_epoch: int
    """Of each process."""
    accumulation: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulation)

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return -(-self.total_steps // self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch in which the step that comes after `step` finished ones lies."""
        return step // self.steps_per_epoch

    def batches_of(self, step: int) -> slice:
        """Which of the epoch's batches that step uses."""
        first = step % self.steps_per_epoch * self.accumulation
        return slice(first, first + self.accumulation)

    def ends_epoch(self, step: int) -> bool:
        """True when `step` finished steps are a whole number of epochs."""
        return step > 0 and step % self.steps_per_epoch == 0

    def is_due(self, step: int, *, steps: int = 0, epochs: int = 0) -> bool:
        """True when something that happens every so many steps, or epochs, is due after `step` finished ones."""
        by_steps = steps > 0 and step % steps == 0
        return by_steps or (epochs > 0 and self.ends_epoch(step) and self.epoch_of(step) % epochs == 0)


def make_plan(config: TrainingConfig, batches_per_epoch: int) -> Plan:
    """`max_train_epochs`, when set, decides the steps, as in sd-scripts."""
    per_epoch = -(-batches_per_epoch // config.gradient_accumulation_steps)
    total = config.max_train_epochs * per_epoch if config.max_train_epochs else config.max_train_steps
    return Plan(total, batches_per_epoch, config.gradient_accumulation_steps)


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
