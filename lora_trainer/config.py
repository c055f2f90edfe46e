"""The options of a run, read from TOML. Key names are those of Kohya's sd-scripts where it has the option.

Torch-free, so the web side can check a configuration without PyTorch. `load` either returns a complete, checked
TrainingConfig or raises ConfigError with a sentence that names the key.
"""

import dataclasses
import difflib
import json
import math
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from lora_trainer.buckets import BucketRules, Size
from lora_trainer.errors import ConfigError
from lora_trainer.schedule import SCHEDULES

OPTIMIZERS = ("AdamW",)


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw while training."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    scale: float
    """Classifier-free guidance scale."""


def option(
    help_text: str,
    default: Any = MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that carries its own documentation and bounds (`above` is exclusive)."""
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help_text, **bounds})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that a run depends on. The help text of each option is its documentation (see docs/trainer.md)."""

    # what to train on
    pretrained_model_name_or_path: str = option("Folder of the base model: SDXL architecture, diffusers layout.")
    dataset_manifest: str = option('JSON-lines file, {"image", "caption", "repeats"} a line.', "")
    train_data_dir: str = option("Folder that holds Kohya-style <repeats>_<name> folders.", "")
    caption_extension: str = option("Ending of the caption file beside each picture.", ".txt")
    resolution: Size = option("Pixels: 1024, [width, height] or 'width,height'; multiples of 8.", (1024, 1024))  # noqa: RUF009 - a tuple
    enable_bucket: bool = option("Sort pictures into aspect-ratio buckets of about the resolution's area.", False)
    min_bucket_reso: int = option("Shortest side of a bucket, pixels.", 256, minimum=8)
    max_bucket_reso: int = option("Longest side of a bucket, pixels.", 2048, minimum=8)
    bucket_reso_steps: int = option(
        "Bucket sides are multiples of this many pixels; itself a multiple of 8.", 64, minimum=8
    )
    bucket_no_upscale: bool = option("Never enlarge a picture; pictures smaller than one step are dropped.", False)
    shuffle_caption: bool = option("Shuffle the comma-separated tags of each caption at every use.", False)
    keep_tokens: int = option("So many tags stay in front when captions are shuffled.", 0, minimum=0)
    caption_dropout_rate: float = option(
        "Share of captions replaced by an empty one, 0 to 1.", 0.0, minimum=0, maximum=1
    )
    flip_aug: bool = option("Mirror each picture half of the time.", False)
    cache_latents: bool = option("Encode the pictures once and keep the latents in memory.", True)

    # where results go
    output_dir: str = option("Folder for checkpoints, samples, states and events.")
    output_name: str = option("Name of the LoRA: the files' stem.", "lora")
    save_precision: str = option("Number format of the saved LoRA.", "fp16", choices=("float", "fp16", "bf16"))
    save_every_n_steps: int = option("Steps between checkpoints; 0 saves only at the end.", 0, minimum=0)
    save_state: bool = option("Keep what resuming needs beside each checkpoint (the newest two).", True)
    resume: str = option("State folder to go on from.", "")
    events_file: str = option("JSON-lines events; empty: <output_dir>/events.jsonl.", "")
    logging_dir: str = option("TensorBoard folder; empty: none written.", "")
    training_comment: str = option("Free text stored in the LoRA.", "")

    # the adapter
    network_dim: int = option("Rank of the LoRA.", 16, minimum=1, maximum=1024)
    network_alpha: float = option("The LoRA is scaled by alpha / rank.", 16.0, above=0)
    network_args: tuple[str, ...] = option("conv_dim=N and conv_alpha=X add the 3x3 convolutions.", ())
    network_dropout: float = option("Dropout on the LoRA's input, 0 to below 1.", 0.0, minimum=0, maximum=0.99)
    network_train_unet_only: bool = option("Only true is supported: the text encoders are not trained.", True)

    # the optimisation
    max_train_steps: int = option("Optimizer steps.", 1600, minimum=1)
    train_batch_size: int = option("Pictures a forward pass.", 1, minimum=1)
    gradient_accumulation_steps: int = option("Forward passes an optimizer step.", 1, minimum=1)
    learning_rate: float = option("Highest learning rate.", 1e-4, above=0)
    optimizer_type: str = option("Only AdamW is supported.", "AdamW")
    optimizer_args: tuple[str, ...] = option("weight_decay=X, betas=X,Y and eps=X.", ())
    lr_scheduler: str = option("Shape of the learning rate over the run.", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = option("Steps of linear warm-up (not with 'constant').", 0, minimum=0)
    lr_scheduler_num_cycles: int = option("Periods of cosine_with_restarts.", 1, minimum=1)
    max_grad_norm: float = option("Gradients are clipped to this norm; 0 turns clipping off.", 1.0, minimum=0)
    min_snr_gamma: float = option("Min-SNR loss weighting, 5 is usual; 0 turns it off.", 0.0, minimum=0)
    noise_offset: float = option("Strength of per-channel offset noise; 0 turns it off.", 0.0, minimum=0, maximum=1)
    seed: int = option(
        "Decides the LoRA's first weights, picture order, noise and timesteps.", 42, minimum=0, maximum=2**32 - 1
    )

    # the machine
    mixed_precision: str = option("Number format of the forward pass.", "no", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = option("Less memory, about a third slower.", False)
    threads: int = option("CPU threads; 0 chooses.", 0, minimum=0, maximum=1024)

    # sample pictures
    sample_every_n_steps: int = option("Steps between sample pictures; 0: only at the end.", 0, minimum=0)
    sample_at_first: bool = option("Draw the samples before the first step too.", False)
    sample_prompts: tuple[SamplePrompt, ...] = option(
        "Tables {prompt, negative_prompt, seed, width, height, steps, scale}, or a text file: --n --d --w --h --s --l.",
        (),
    )

    metadata: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "Table of strings, stored in the LoRA as lorapilot_<key>."}
    )

    @property
    def events_path(self) -> Path:
        """Where the events go."""
        return Path(self.events_file or Path(self.output_dir) / "events.jsonl")

    @property
    def bucket_rules(self) -> BucketRules:
        """The bucket options in the form that `buckets.place` takes."""
        return BucketRules(
            resolution=self.resolution,
            enabled=self.enable_bucket,
            minimum=self.min_bucket_reso,
            maximum=self.max_bucket_reso,
            step=self.bucket_reso_steps,
            no_upscale=self.bucket_no_upscale,
        )

    @property
    def convolution(self) -> tuple[int, float] | None:
        """(rank, alpha) of the 3x3 convolutions, or None when they are left alone."""
        given = _pairs("network_args", self.network_args, ("conv_dim", "conv_alpha"))
        if "conv_dim" not in given:
            return None
        rank = int(given["conv_dim"][0])
        return rank, given.get("conv_alpha", [float(rank)])[0]

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments for the optimizer."""
        given = _pairs("optimizer_args", self.optimizer_args, ("weight_decay", "betas", "eps"))
        return {key: tuple(numbers) if key == "betas" else numbers[0] for key, numbers in given.items()}


def load(path: Path) -> TrainingConfig:
    """Read and check a configuration file."""
    return from_table(read_table(path))


def read_table(path: Path) -> dict[str, Any]:
    """The file's keys with section names dropped, unchecked; ConfigError when it is no TOML."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"The configuration file {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    return _without_sections(document)


def events_path_of(table: Mapping[str, Any]) -> Path | None:
    """Where the events of a configuration go that may be wrong elsewhere, so that the refusal itself is an event."""
    named, folder = table.get("events_file"), table.get("output_dir")
    if isinstance(named, str) and named:
        return Path(named)
    return Path(folder) / "events.jsonl" if isinstance(folder, str) and folder else None


def from_table(table: Mapping[str, Any]) -> TrainingConfig:
    """Check flat keys and values and return the configuration."""
    known = {one.name: one for one in fields(TrainingConfig)}
    for key in table:
        if key not in known:
            raise ConfigError(f"Unknown option '{key}'.{_nearest(key, known)}")
    for key, one in known.items():
        if one.default is MISSING and one.default_factory is MISSING and key not in table:
            raise ConfigError(f"The option '{key}' is missing: {one.metadata['help']}")
    types = get_type_hints(TrainingConfig)
    plain = {key: _value(known[key], types[key], table[key]) for key in table if key != "sample_prompts"}
    config = TrainingConfig(**plain)
    config = dataclasses.replace(config, sample_prompts=_sample_prompts(table.get("sample_prompts", []), config))
    _check_combinations(config)
    return config


def to_toml(config: TrainingConfig) -> str:
    """The configuration as TOML that `load` reads back to an equal one."""
    values = dataclasses.asdict(config)
    metadata = values.pop("metadata")
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join([*lines, "", "[metadata]", *(f"{_toml(key)} = {_toml(value)}" for key, value in metadata.items())])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _without_sections(document: Mapping[str, Any]) -> dict[str, Any]:
    """Kohya's files group options under free section names; only `metadata` is a table by itself."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        inner = _without_sections(value) if isinstance(value, dict) and key != "metadata" else {key: value}
        for name in inner.keys() & flat.keys():
            raise ConfigError(f"The option '{name}' is given twice.")
        flat |= inner
    return flat


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else " See docs/trainer.md for the list."


def _value(one: Field[Any], wanted: Any, value: Any) -> Any:
    """The value in the field's type, within its bounds, or ConfigError."""
    key = one.name
    if wanted == Size:
        return _size(key, value)
    if wanted == tuple[str, ...]:
        return _strings(key, value)
    if wanted == Mapping[str, str]:
        return _string_table(key, value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"'{key}' must be {_TYPE_NAMES[wanted]}, not {value!r}.")
    _check_bounds(one, value)
    return value


_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _check_bounds(one: Field[Any], value: Any) -> None:
    limits = one.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f"'{one.name}' must be one of {', '.join(limits['choices'])}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"'{one.name}' must be a finite number, not {value}.")
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise ConfigError(f"'{one.name}' must be at least {limits['minimum']:g}, not {value:g}.")
    if limits["maximum"] is not None and value > limits["maximum"]:
        raise ConfigError(f"'{one.name}' must be at most {limits['maximum']:g}, not {value:g}.")
    if limits["above"] is not None and value <= limits["above"]:
        raise ConfigError(f"'{one.name}' must be above {limits['above']:g}, not {value:g}.")


def _size(key: str, value: Any) -> Size:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        numbers = [int(part) for part in parts if not isinstance(part, (bool, float))]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == 1:
        numbers *= 2
    if len(numbers) != 2 or len(parts) > 2 or min(numbers) < 8 or numbers[0] % 8 or numbers[1] % 8:
        raise ConfigError(
            f"'{key}' must be one or two multiples of 8 in pixels, such as 1024 or [832, 1216], not {value!r}."
        )
    return numbers[0], numbers[1]


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"'{key}' must be a list of texts, not {value!r}.")
    return tuple(value)


def _string_table(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ConfigError(f"'{key}' must be a table of texts, not {value!r}.")
    return dict(value)


def _pairs(key: str, arguments: tuple[str, ...], allowed: tuple[str, ...]) -> dict[str, list[float]]:
    """Kohya's `name=number[,number]` arguments."""
    found: dict[str, list[float]] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        name = name.strip()
        if name not in allowed:
            raise ConfigError(f"'{key}' knows {', '.join(allowed)}, not {name!r}.")
        try:
            found[name] = [float(part) for part in text.strip(" ()[]").split(",")]
        except ValueError as error:
            raise ConfigError(f"'{key}': {argument!r} needs a number after the equals sign.") from error
    return found


def _check_combinations(config: TrainingConfig) -> None:
    if bool(config.dataset_manifest) == bool(config.train_data_dir):
        raise ConfigError("Give exactly one of 'dataset_manifest' and 'train_data_dir'.")
    if not config.output_name or Path(config.output_name).name != config.output_name:
        raise ConfigError(f"'output_name' must be a plain file name, not {config.output_name!r}.")
    if config.optimizer_type not in OPTIMIZERS:
        raise ConfigError(f"'optimizer_type' {config.optimizer_type!r} is not supported; use {', '.join(OPTIMIZERS)}.")
    if not config.network_train_unet_only:
        raise ConfigError(
            "'network_train_unet_only' must be true: this trainer does not train text encoders yet, "
            "and captions are encoded only once. Use the Kohya stack for that."
        )
    _check_buckets(config)
    _check_arguments(config)


def _check_buckets(config: TrainingConfig) -> None:
    if config.bucket_reso_steps % 8:
        raise ConfigError(f"'bucket_reso_steps' must be a multiple of 8, not {config.bucket_reso_steps}.")
    if not config.enable_bucket:
        return
    if config.min_bucket_reso % config.bucket_reso_steps:
        raise ConfigError("'min_bucket_reso' must be a multiple of 'bucket_reso_steps'.")
    if not config.min_bucket_reso <= min(config.resolution) <= max(config.resolution) <= config.max_bucket_reso:
        raise ConfigError("'resolution' must lie between 'min_bucket_reso' and 'max_bucket_reso'.")


def _check_arguments(config: TrainingConfig) -> None:
    rank, alpha = config.convolution or (1, 1.0)
    if rank < 1 or alpha <= 0:
        raise ConfigError("'network_args': conv_dim must be at least 1 and conv_alpha above 0.")
    if config.network_args and config.convolution is None:
        raise ConfigError("'network_args': conv_alpha means nothing without conv_dim.")
    betas = config.optimizer_options.get("betas", (0.9, 0.999))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError("'optimizer_args': betas takes two numbers from 0 to below 1, such as betas=0.9,0.99.")


def _sample_prompts(value: Any, config: TrainingConfig) -> tuple[SamplePrompt, ...]:
    rows = _prompt_file(Path(value)) if isinstance(value, str) and value else value or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError("'sample_prompts' must be a list of tables with at least a 'prompt', or a text file's path.")
    return tuple(_sample_prompt(row, config) for row in rows)


def _sample_prompt(row: Mapping[str, Any], config: TrainingConfig) -> SamplePrompt:
    width, height = config.resolution
    values: dict[str, Any] = {
        "negative_prompt": "",
        "seed": config.seed,
        "width": width,
        "height": height,
        "steps": 20,
        "scale": 5.0,
    }
    values |= row
    types = get_type_hints(SamplePrompt)
    for key in values:
        if key not in types:
            raise ConfigError(f"'sample_prompts': unknown key '{key}'.{_nearest(key, types)}")
    values["scale"] = float(values["scale"]) if type(values["scale"]) is int else values["scale"]
    for key, wanted in types.items():
        if type(values.get(key)) is not wanted:
            raise ConfigError(f"'sample_prompts': '{key}' must be {_TYPE_NAMES[wanted]}, not {values.get(key)!r}.")
    if (
        values["width"] < 8
        or values["height"] < 8
        or values["width"] % 8
        or values["height"] % 8
        or values["steps"] < 1
    ):
        raise ConfigError("'sample_prompts': width and height are multiples of 8, and steps is at least 1.")
    return SamplePrompt(**values)


_FLAGS: dict[str, tuple[str, type]] = {
    "n": ("negative_prompt", str),
    "d": ("seed", int),
    "w": ("width", int),
    "h": ("height", int),
    "s": ("steps", int),
    "l": ("scale", float),
}


def _prompt_file(path: Path) -> list[dict[str, Any]]:
    """Kohya's prompt file: a prompt a line, `--flag value` after it, `#` for comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'sample_prompts': {path} cannot be read: {error}.") from error
    return [_prompt_line(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _prompt_line(line: str) -> dict[str, Any]:
    prompt, *flags = line.split(" --")
    row: dict[str, Any] = {"prompt": prompt.strip()}
    for flag in flags:
        letter, _, text = flag.partition(" ")
        if letter not in _FLAGS:
            raise ConfigError(
                f"'sample_prompts': unknown flag --{letter}; known are {shlex.join('--' + f for f in _FLAGS)}."
            )
        key, wanted = _FLAGS[letter]
        try:
            row[key] = wanted(text.strip())
        except ValueError as error:
            raise ConfigError(f"'sample_prompts': --{letter} needs {_TYPE_NAMES[wanted]}, not {text!r}.") from error
    return row
