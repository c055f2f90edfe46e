"""RunSpec: what to train, independent of the trainer. A frozen dataclass, validated once, stored with the run.

Each field carries its label, group, bounds and help; the form, the API and the run page are made from them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, get_type_hints

from lorapilot.errors import Refusals, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How one field of the RunSpec is shown and bounded."""

    label: str
    group: str
    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    multiple_of: int = 1


def option(default: Any, label: str, group: str, help: str = "", **bounds: Any) -> Any:  # noqa: A002 the field's help
    return dataclasses.field(
        default=default, metadata={"option": Option(label=label, group=group, help=help, **bounds)}
    )


NETWORK, TRAINING, SCHEDULE, DATA, LOSS, SAVING = "Network", "Training", "Learning rate", "Data", "Loss", "Saving"
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts")
PRECISIONS = ("fp32", "fp16", "bf16")
OPTIMIZERS = ("AdamW", "AdamW8bit", "Lion", "Adafactor", "Prodigy", "AdamWScheduleFree")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Raises UserError, with the field's name, for a value out of bounds."""

    resolution: int = option(
        1024,
        "Resolution",
        DATA,
        "Side in pixels of a square with the training area.",
        least=64,
        most=4096,
        multiple_of=8,
    )
    repeats: int = option(1, "Repeats", DATA, "How often each picture comes in an epoch.", least=1, most=1000)
    enable_bucket: bool = option(True, "Aspect buckets", DATA, "Keep pictures' aspect ratios; off: crop to a square.")
    flip: bool = option(False, "Mirror at random", DATA, "Not for faces, text or anything with a left and a right.")
    shuffle_caption: bool = option(False, "Shuffle tags", DATA, "Comma-separated tags in a new order each time.")
    keep_tokens: int = option(0, "Keep first tags", DATA, "So many tags stay in front.", least=0, most=75)
    caption_dropout: float = option(
        0.0, "Caption dropout", DATA, "Share of pictures shown without their caption.", least=0, most=1
    )
    caption_tokens: int = option(
        75, "Caption tokens", DATA, "75, 150 or 225; what is longer is cut off.", least=75, most=225, multiple_of=75
    )
    validation_share: float = option(
        0.0, "Validation share", DATA, "Share of pictures kept back to measure the loss on.", least=0, most=0.5
    )

    rank: int = option(16, "Rank", NETWORK, "Size of the LoRA (network dim).", least=1, most=512)
    alpha: float = option(16.0, "Alpha", NETWORK, "Scales the LoRA by alpha / rank.", above=0, most=1024)
    conv_rank: int = option(0, "Convolution rank", NETWORK, "0 leaves convolutions alone.", least=0, most=512)
    conv_alpha: float = option(0.0, "Convolution alpha", NETWORK, "0: as the rank.", least=0, most=1024)
    network_dropout: float = option(0.0, "Network dropout", NETWORK, "", least=0, most=0.9)

    steps: int = option(1000, "Steps", TRAINING, "Optimizer updates.", least=1, most=1_000_000)
    batch_size: int = option(1, "Batch size", TRAINING, "Pictures at a time.", least=1, most=256)
    gradient_accumulation_steps: int = option(
        1, "Gradient accumulation", TRAINING, "Batches to one update.", least=1, most=256
    )
    gpus: int = option(
        1, "GPUs", TRAINING, "More than one: waits for a slot with so many; each takes a batch.", least=1, most=64
    )
    precision: str = option("bf16", "Precision", TRAINING, "On a CPU always fp32.", choices=PRECISIONS)
    gradient_checkpointing: bool = option(
        False, "Gradient checkpointing", TRAINING, "Less memory, slower; off: only when needed."
    )
    less_memory_when_out: bool = option(
        False,
        "Adapt when memory runs out",
        TRAINING,
        "Goes on from the last state with gradient checkpointing, then smaller batches, then an 8-bit optimizer.",
    )
    lower_resolution_when_out: bool = option(
        False, "Also lower the resolution", TRAINING, "As the last resort when memory runs out."
    )
    max_grad_norm: float = option(1.0, "Gradient clipping", TRAINING, "0: off.", least=0, most=1000)
    optimizer: str = option("AdamW", "Optimizer", TRAINING, "Prodigy wants learning rate 1.", choices=OPTIMIZERS)
    weight_decay: float = option(0.01, "Weight decay", TRAINING, "Of the optimizer.", least=0, most=10)
    ema_decay: float = option(
        0.0, "Moving average", TRAINING, "Of the weights; 0.999 is usual, 0: off.", least=0, most=0.99999
    )
    seed: int = option(31337, "Seed", TRAINING, "The same seed gives the same run.", least=0, most=2**31 - 1)

    learning_rate: float = option(1e-4, "Learning rate", SCHEDULE, "", above=0, most=1)
    text_encoder_learning_rate: float = option(
        0.0, "Text-encoder rate", SCHEDULE, "Learning rate of the text encoders; 0 leaves them alone.", least=0, most=1
    )
    lr_schedule: str = option("cosine", "Schedule", SCHEDULE, "", choices=SCHEDULES)
    lr_cycles: int = option(1, "Restarts", SCHEDULE, "Cycles of cosine_with_restarts.", least=1, most=100)
    warmup_steps: int = option(0, "Warm-up steps", SCHEDULE, "", least=0, most=100_000)

    min_snr_gamma: float = option(0.0, "Min-SNR gamma", LOSS, "5 is usual; 0: off.", least=0, most=100)
    noise_offset: float = option(0.0, "Noise offset", LOSS, "", least=0, most=1)

    save_precision: str = option("fp16", "Saved as", SAVING, "Number format of the LoRA file.", choices=PRECISIONS)
    save_best: bool = option(False, "Keep the best", SAVING, "By validation loss; needs a validation share.")
    keep_last: int = option(
        0, "Keep last", SAVING, "So many checkpoints stay beside the best; 0: all.", least=0, most=1000
    )
    keep_every_steps: int = option(
        0, "Keep every", SAVING, "Checkpoints of every so many steps stay, too; 0: none.", least=0, most=1_000_000
    )
    save_every_steps: int = option(0, "Checkpoint every", SAVING, "Steps; 0: only at the end.", least=0, most=1_000_000)
    sample_every_steps: int = option(
        0, "Samples every", SAVING, "Steps; 0: before the first and after the last step only.", least=0, most=1_000_000
    )
    sample_prompts: tuple[str, ...] = option((), "Sample prompts", SAVING, "One a line, at most 16.")
    sample_seed: int = option(1, "Sample seed", SAVING, "", least=0, most=2**31 - 1)
    sample_steps: int = option(20, "Sample steps", SAVING, "Denoising steps of a sample.", least=1, most=200)
    sample_scale: float = option(5.0, "Sample guidance", SAVING, "Classifier-free guidance.", least=0, most=50)

    def __post_init__(self) -> None:
        for name, described in OPTIONS.items():
            _check(name, getattr(self, name), described)
        if self.warmup_steps >= self.steps:
            raise UserError(f"Warm-up is {self.warmup_steps} of {self.steps} steps: use fewer.", field="warmup_steps")
        if self.save_best and not self.validation_share:
            raise UserError("Keep the best needs validation pictures: set a validation share.", field="save_best")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """From JSON or a form. Unknown names are refused with the nearest known one; numbers may come as text.
        Raises UserError about all that are wrong."""
        known: dict[str, Any] = {}
        refusals = Refusals()
        for name, value in values.items():
            with refusals.caught():
                _refuse_unknown(name)
                known[name] = convert(name, value)
                _check(name, known[name], OPTIONS[name])
        refusals.raise_any()
        return cls(**known)

    def as_values(self) -> dict[str, Any]:
        """The JSON that `from_values` reads."""
        return dataclasses.asdict(self) | {"sample_prompts": list(self.sample_prompts)}


OPTIONS: dict[str, Option] = {field.name: field.metadata["option"] for field in dataclasses.fields(RunSpec)}
TYPES: dict[str, Any] = get_type_hints(RunSpec)
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(RunSpec)}
MOST_PROMPTS = 16
MOST_PROMPT_CHARACTERS = 2000


def _refuse_unknown(name: str) -> None:
    if name in OPTIONS:
        return
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"There is no setting {name!r}.{hint}", field=name)


def convert(name: str, value: Any) -> Any:
    """`value` as the field's type. A bool is no number, and 3.5 no whole number."""
    wanted = TYPES[name]
    label = OPTIONS[name].label
    if wanted is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{label} is true or false.", field=name)
    if wanted is int or wanted is float:
        return to_number(value, label=label, field=name, whole=wanted is int)
    if wanted is str:
        if isinstance(value, str):
            return value
        raise UserError(f"{label} is a text.", field=name)
    lines = value.splitlines() if isinstance(value, str) else value
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{label} is a list of texts.", field=name)
    return tuple(line.strip() for line in lines if line.strip())


def to_number(value: Any, *, label: str, field: str, whole: bool) -> int | float:
    """`value`, which may be a text, as a number. Raises UserError; infinities and NaN are for `check_bounds`."""
    kind = "a whole number" if whole else "a number"
    refused = UserError(f"{label} is {kind}.", field=field)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refused
    try:
        number = float(value)
        if not whole:
            return number
        if not number.is_integer():
            raise refused
        return int(value) if isinstance(value, int | str) else int(number)
    except (ValueError, OverflowError):
        raise refused from None


class Bounds(Protocol):
    """What of a described field bounds its numbers; None: not bounded so."""

    @property
    def least(self) -> float | None: ...
    @property
    def most(self) -> float | None: ...
    @property
    def above(self) -> float | None: ...


def check_bounds(value: float, bounds: Bounds, *, label: str, field: str) -> None:
    """Raises UserError for a number that is not finite or out of bounds."""
    if not math.isfinite(value):
        raise UserError(f"{label} is a finite number.", field=field)
    if bounds.above is not None and value <= bounds.above:
        raise UserError(f"{label} must be more than {bounds.above:g}.", field=field)
    if bounds.least is not None and value < bounds.least:
        raise UserError(f"{label} must be at least {bounds.least:g}.", field=field)
    if bounds.most is not None and value > bounds.most:
        raise UserError(f"{label} must be at most {bounds.most:g}.", field=field)


def _check(name: str, value: Any, described: Option) -> None:
    label = described.label
    if described.choices and value not in described.choices:
        raise UserError(f"{label}: {value!r} is none of {', '.join(described.choices)}.", field=name)
    if name == "sample_prompts":
        _check_prompts(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    check_bounds(value, described, label=label, field=name)
    if isinstance(value, int) and value % described.multiple_of:
        raise UserError(f"{label} must be a multiple of {described.multiple_of}.", field=name)


def _check_prompts(prompts: tuple[str, ...]) -> None:
    if len(prompts) > MOST_PROMPTS:
        raise UserError(f"At most {MOST_PROMPTS} sample prompts, please.", field="sample_prompts")
    if any(len(prompt) > MOST_PROMPT_CHARACTERS or "\0" in prompt for prompt in prompts):
        raise UserError(
            f"A sample prompt has at most {MOST_PROMPT_CHARACTERS:,} characters, none of them a null character.",
            field="sample_prompts",
        )
