"""What a resumed run may do otherwise than the run that saved its state, and the words for it.

A run that ran out of memory can go on from its last state with less: smaller batches and more of them a step, a lower
resolution, gradient checkpointing, another optimizer. What it learns then is close to what it would have learned.
Another dataset is no such thing: nothing says which of its pictures were seen. Torch-free.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from lora_trainer.buckets import Size
from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError


@dataclass(frozen=True)
class Setup:
    """What a state was saved under, as far as a resumed run is compared with it."""

    images: int
    images_per_epoch: int
    """Counted with their repeats."""
    batches_per_epoch: int
    """Of each process."""
    batch_size: int
    accumulation: int
    resolution: Size
    optimizer: str
    gradient_checkpointing: bool
    """Whether the configuration demands it; the trainer may have switched it on by itself."""

    @classmethod
    def of(cls, config: TrainingConfig, *, images: int, images_per_epoch: int, batches_per_epoch: int) -> Self:
        """Of the run that a configuration means."""
        return cls(
            images=images,
            images_per_epoch=images_per_epoch,
            batches_per_epoch=batches_per_epoch,
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            resolution=config.resolution,
            optimizer=config.optimizer_type,
            gradient_checkpointing=bool(config.gradient_checkpointing),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `as_json` gave; KeyError or TypeError for anything else."""
        width, height = values["resolution"]
        return cls(**{one.name: values[one.name] for one in fields(cls)} | {"resolution": (width, height)})

    def as_json(self) -> dict[str, Any]:
        """JSON values, for the training state."""
        return asdict(self)


def check_dataset(before: Setup, now: Setup) -> None:
    """ConfigError when the pictures, or their repeats, are others than when the state was saved."""
    if (before.images, before.images_per_epoch) != (now.images, now.images_per_epoch):
        raise ConfigError(
            "'resume': the dataset has changed since this state was saved: it had "
            f"{before.images} pictures ({before.images_per_epoch} an epoch with repeats), now it has "
            f"{now.images} ({now.images_per_epoch})."
        )


def differences(before: Setup, now: Setup) -> list[str]:
    """What is otherwise now, and in brackets what that means; empty when nothing is."""
    found = []
    if (before.accumulation, before.batch_size) != (now.accumulation, now.batch_size):
        found.append(_batches(before, now))
    if before.resolution != now.resolution:
        sizes = f"{_pixels(now.resolution)} instead of {_pixels(before.resolution)} pixels"
        found.append(f"{sizes} (losses before and after cannot be compared)")
    elif before.batch_size == now.batch_size and before.batches_per_epoch != now.batches_per_epoch:
        found.append("other buckets (the rest of the epoch comes in another order)")
    if before.optimizer != now.optimizer:
        found.append(f"{now.optimizer} instead of {before.optimizer} (it starts without a memory of earlier steps)")
    if now.gradient_checkpointing and not before.gradient_checkpointing:
        found.append("gradient checkpointing (slower; it may round otherwise)")
    return found


def sentence(step: int, found: list[str]) -> str:
    """`differences` as the warning with which the run begins."""
    *most, last = found
    return f"The run goes on after step {step} with {', '.join(most)}{' and ' * bool(most)}{last}."


def _batches(before: Setup, now: Setup) -> str:
    then, images = before.accumulation * before.batch_size, now.accumulation * now.batch_size
    effect = "as many pictures" if then == images else f"{images} pictures instead of {then}"
    return (
        f"{now.accumulation} x {now.batch_size} pictures a step instead of {before.accumulation} x {before.batch_size} "
        f"({effect}; the rest of the epoch comes in another order)"
    )


def _pixels(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
