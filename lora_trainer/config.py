"""The options of a run, read from TOML. Key names are those of Kohya's sd-scripts where it has the option.

Torch-free, so the web side can check a configuration without PyTorch. `load` either returns a complete, checked
TrainingConfig or raises ConfigError with a sentence that names the key. Nothing is ignored: a key of sd-scripts that
this trainer lacks is refused with the reason (kohya_keys.py), an unknown one with the nearest known name.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from lora_trainer.arguments import NetworkArguments, optimizer_arguments
from lora_trainer.buckets import BucketRules, Size
from lora_trainer.errors import ConfigError
from lora_trainer.kohya_keys import refusal_of
from lora_trainer.prompts import SamplePrompt, read_prompts
from lora_trainer.schedule import SCHEDULES

OPTIMIZERS = (
    "AdamW", "AdamW8bit", "SGD", "SGDNesterov", "Lion", "Adafactor", "Prodigy", "AdamWScheduleFree",
)  # fmt: skip
SAMPLERS = ("", "ddim", "ddpm", "euler", "euler_a", "heun", "dpmsolver++")
NO_LEARNING_RATE_SET = -1.0


def option(
    help_text: str,
    default: Any = MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field that carries its own documentation and bounds (`above` is exclusive)."""
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help_text, **bounds})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that a run depends on. The help text of each option is its documentation (see docs/trainer.md).

    `None` means "not set": the trainer chooses, as the help says.
    """

    # the base model
    pretrained_model_name_or_path: str = option("Base model: a diffusers folder or one .safetensors file.")
    vae: str = option("Another VAE: a diffusers folder or one .safetensors file; empty: the base model's.", "")
    v_parameterization: bool | None = option("The model predicts velocity; unset: as the model itself says.", None)
    zero_terminal_snr: bool = option("Rescale the noise schedule so that the last step is pure noise.", False)
    clip_skip: int = option("Text-encoder layers to skip from the end (SD 1.5 and 2); 0 and 1: none.", 0, minimum=0)
    max_token_length: int = option("Caption tokens that are read.", 75, choices=(75, 150, 225))

    # pictures and captions
    dataset_manifest: str = option('JSON-lines file, {"image", "caption", "repeats", "regularisation"} a line.', "")
    train_data_dir: str = option("Folder that holds Kohya-style <repeats>_<name> folders.", "")
    reg_data_dir: str = option("Folder of regularisation pictures, laid out like train_data_dir.", "")
    prior_loss_weight: float = option("Weight of the loss on regularisation pictures.", 1.0, minimum=0, maximum=100)
    resolution: Size = option("Pixels: 1024, [width, height] or 'width,height'; multiples of 8.", (1024, 1024))  # noqa: RUF009 - a tuple
    enable_bucket: bool = option("Sort pictures into aspect-ratio buckets of about the resolution's area.", False)
    min_bucket_reso: int = option("Shortest side of a bucket, pixels.", 256, minimum=8)
    max_bucket_reso: int = option("Longest side of a bucket, pixels.", 2048, minimum=8)
    bucket_reso_steps: int = option(
        "Bucket sides are multiples of this many pixels; itself a multiple of 8.", 64, minimum=8
    )
    bucket_no_upscale: bool = option("Never enlarge a picture; pictures smaller than one step are dropped.", False)
    flip_aug: bool = option("Mirror each picture half of the time.", False)
    color_aug: bool = option("Vary brightness, contrast and saturation a little at every use.", False)
    random_crop: bool = option("Cut a random part out of the resized picture instead of the middle.", False)
    caption_extension: str = option("Ending of the caption file beside each picture.", ".txt")
    caption_separator: str = option("What separates the tags of a caption.", ",")
    caption_prefix: str = option("Text in front of every caption.", "")
    caption_suffix: str = option("Text behind every caption.", "")
    shuffle_caption: bool = option("Shuffle the tags of each caption at every use.", False)
    keep_tokens: int = option("So many tags stay in front, whatever is shuffled or dropped.", 0, minimum=0)
    keep_tokens_separator: str = option("A mark in the caption: the tags before it stay in front.", "")
    caption_dropout_rate: float = option(
        "Share of captions replaced by an empty one, 0 to 1.", 0.0, minimum=0, maximum=1
    )
    caption_dropout_every_n_epochs: int = option("Every so many epochs all captions are empty; 0: never.", 0, minimum=0)
    caption_tag_dropout_rate: float = option("Share of tags left out at every use, 0 to 1.", 0.0, minimum=0, maximum=1)
    cache_latents: bool | None = option(
        "Encode each picture once; unset: yes, unless color_aug or random_crop make it new every time.", None
    )
    cache_dir: str = option("Folder of encoded pictures and captions, shared between runs; empty: memory only.", "")

    # where results go
    output_dir: str = option("Folder for checkpoints, samples, states and events.")
    output_name: str = option("Name of the LoRA: the files' stem.", "lora")
    save_model_as: str = option(
        "Key format: Kohya's (safetensors) or diffusers'.", "safetensors", choices=("safetensors", "diffusers")
    )
    save_precision: str = option("Number format of the saved LoRA.", "fp16", choices=("float", "fp16", "bf16"))
    save_every_n_steps: int = option("Steps between checkpoints; 0: none by steps.", 0, minimum=0)
    save_every_n_epochs: int = option("Epochs between checkpoints; 0: none by epochs.", 0, minimum=0)
    save_last_n_epochs: int = option(
        "Keep the newest so many checkpoints of save_every_n_epochs; 0: all.", 0, minimum=0
    )
    save_best: bool = option("Keep the weights with the lowest validation loss as <name>-best.", False)
    save_state: bool = option("Keep what resuming needs beside each checkpoint (the newest two).", True)
    resume: str = option("State folder to go on from.", "")
    events_file: str = option("JSON-lines events; empty: <output_dir>/events.jsonl.", "")
    logging_dir: str = option("TensorBoard folder; empty: none written.", "")
    no_metadata: bool = option("Leave all facts about the training out of the file.", False)
    training_comment: str = option("Free text stored in the LoRA.", "")
    metadata_title: str = option("Title stored in the LoRA; empty: output_name.", "")
    metadata_author: str = option("Author stored in the LoRA.", "")
    metadata_description: str = option("Description stored in the LoRA; empty: training_comment.", "")
    metadata_license: str = option("Licence stored in the LoRA.", "")
    metadata_tags: str = option("Comma-separated tags stored in the LoRA.", "")
    metadata_trigger_phrase: str = option("Trigger phrase stored in the LoRA.", "")
    metadata_usage_hint: str = option("Usage hint stored in the LoRA.", "")
    metadata: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "Table of strings, stored in the LoRA as lorapilot_<key>."}
    )

    # the adapter
    network_module: str = option("sd-scripts' name of the adapter; this is the only one.", "networks.lora",
                                 choices=("networks.lora",))  # fmt: skip
    network_dim: int = option("Rank of the LoRA.", 16, minimum=1, maximum=1024)
    network_alpha: float = option("The LoRA is scaled by alpha / rank.", 1.0, above=0)
    network_args: tuple[str, ...] = option(
        "conv_dim, conv_alpha, block_dims, block_alphas, conv_block_dims, conv_block_alphas, "
        "include_patterns, exclude_patterns, network_reg_dims: see docs/trainer.md.",
        (),
    )
    network_dropout: float = option("Dropout on the LoRA's input, 0 to below 1.", 0.0, minimum=0, maximum=0.99)
    network_train_unet_only: bool = option("Leave the text encoders as they are.", False)
    network_train_text_encoder_only: bool = option("Leave the UNet as it is.", False)
    network_weights: str = option("A LoRA in Kohya's format to start from.", "")
    dim_from_weights: bool = option("Take ranks and alphas from network_weights.", False)

    # the optimisation
    max_train_steps: int = option("Optimizer steps.", 1600, minimum=1)
    max_train_epochs: int = option("Epochs; 0: as max_train_steps says.", 0, minimum=0)
    train_batch_size: int = option("Pictures a forward pass.", 1, minimum=1)
    gradient_accumulation_steps: int = option("Forward passes an optimizer step.", 1, minimum=1)
    learning_rate: float = option("Highest learning rate.", 1e-4, above=0)
    unet_lr: float | None = option("Learning rate of the UNet's LoRA; unset: learning_rate.", None, minimum=0)
    text_encoder_lr: tuple[float, ...] = option(
        "Learning rate of the text encoders' LoRA, one number or one for each; unset: learning_rate.", (), minimum=0
    )
    optimizer_type: str = option("The optimizer.", "AdamW", choices=OPTIMIZERS)
    optimizer_args: tuple[str, ...] = option("name=value, such as weight_decay=0.01 or betas=0.9,0.99.", ())
    lr_scheduler: str = option("Shape of the learning rate over the run.", "constant", choices=SCHEDULES)
    lr_warmup_steps: int | float = option("Steps of linear warm-up; below 1: a share of all steps.", 0, minimum=0)
    lr_decay_steps: int | float = option(
        "Steps of the decay at the end of warmup_stable_decay; below 1: a share.", 0, minimum=0
    )
    lr_scheduler_num_cycles: int = option(
        "Periods of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay.", 1, minimum=1
    )
    lr_scheduler_power: float = option("Exponent of polynomial.", 1.0, above=0)
    lr_scheduler_min_lr_ratio: float = option(
        "Lowest learning rate as a share (cosine_with_min_lr, warmup_stable_decay).", 0.0, minimum=0, maximum=1
    )
    max_grad_norm: float = option("Gradients are clipped to this norm; 0 turns clipping off.", 1.0, minimum=0)
    ema_decay: float = option(
        "Save an exponential moving average of the weights, 0.999 is usual; 0: off.", 0.0, minimum=0, maximum=0.99999
    )
    seed: int = option(
        "Decides the LoRA's first weights, picture order, noise and timesteps.", 42, minimum=0, maximum=2**32 - 1
    )

    # noise and loss
    min_timestep: int = option("Lowest timestep that is trained.", 0, minimum=0, maximum=999)
    max_timestep: int = option("First timestep that is not trained any more.", 1000, minimum=1, maximum=1000)
    noise_offset: float = option("Strength of per-channel offset noise; 0 turns it off.", 0.0, minimum=0, maximum=1)
    noise_offset_random_strength: bool = option("Draw the offset's strength from 0 to noise_offset.", False)
    adaptive_noise_scale: float = option("Adds this times the latents' mean to noise_offset.", 0.0)
    multires_noise_iterations: int = option("Pyramid noise: how many resolutions; 0: off.", 0, minimum=0, maximum=64)
    multires_noise_discount: float = option("Pyramid noise: weight of each coarser one.", 0.3, minimum=0, maximum=1)
    ip_noise_gamma: float = option("Input perturbation noise; 0: off.", 0.0, minimum=0, maximum=1)
    ip_noise_gamma_random_strength: bool = option("Draw the perturbation's strength from 0 to ip_noise_gamma.", False)
    loss_type: str = option("Distance between answer and target.", "l2", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "How the threshold of huber and smooth_l1 follows the timestep.",
        "snr",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option("Threshold of huber and smooth_l1.", 0.1, above=0)
    huber_scale: float = option("Factor on the threshold (constant, exponential).", 1.0, above=0)
    min_snr_gamma: float = option("Min-SNR loss weighting, 5 is usual; 0 turns it off.", 0.0, minimum=0)
    debiased_estimation_loss: bool = option("Weight the loss by 1 / sqrt(SNR).", False)
    scale_v_pred_loss_like_noise_pred: bool = option("Weight a velocity loss like a noise loss.", False)
    v_pred_like_loss: float = option(
        "Adds a velocity-like loss with this weight to a noise loss; 0: off.", 0.0, minimum=0
    )

    # the machine
    mixed_precision: str = option("Number format of the forward pass.", "no", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool | None = option(
        "Less memory, about a third slower; unset: only when the GPU's memory would not do.", None
    )
    attention: str = option(
        "auto: PyTorch's; xformers is tried on a real tensor first.", "auto", choices=("auto", "sdpa", "xformers")
    )
    torch_compile: bool = option("Compile the UNet: minutes at first, faster steps later; GPUs.", False)
    threads: int = option("CPU threads; 0 chooses.", 0, minimum=0, maximum=1024)

    # validation and sample pictures
    validation_split: float = option(
        "Share of the pictures kept for validation, not trained.", 0.0, minimum=0, maximum=0.5
    )
    validation_seed: int | None = option("Decides which pictures, noise and timesteps; unset: seed.", None, minimum=0)
    validate_every_n_steps: int = option("Steps between validations; 0: by epochs.", 0, minimum=0)
    validate_every_n_epochs: int = option("Epochs between validations; 0: every epoch unless by steps.", 0, minimum=0)
    max_validation_steps: int = option("At most so many validation batches; 0: all.", 0, minimum=0)
    early_stopping_patience: int = option(
        "Stop after so many validations without a better loss; 0: never.", 0, minimum=0
    )
    sample_every_n_steps: int = option("Steps between sample pictures; 0: only at the end.", 0, minimum=0)
    sample_every_n_epochs: int = option("Epochs between sample pictures; 0: none by epochs.", 0, minimum=0)
    sample_at_first: bool = option("Draw the samples before the first step too.", False)
    sample_sampler: str = option("Sampler of the samples; empty: the base model's own.", "", choices=SAMPLERS)
    sample_prompts: tuple[SamplePrompt, ...] = option(
        "Tables {prompt, negative_prompt, seed, width, height, steps, scale}, or a text file: --n --d --w --h --s --l.",
        (),
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
    def network(self) -> NetworkArguments:
        """`network_args`, read."""
        return NetworkArguments.read(self.network_args)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments for the optimizer."""
        return optimizer_arguments(self.optimizer_type, self.optimizer_args)

    @property
    def trains_unet(self) -> bool:
        """Whether the UNet gets a LoRA."""
        return not self.network_train_text_encoder_only and self.unet_rate > 0

    @property
    def unet_rate(self) -> float:
        """Highest learning rate of the UNet's LoRA."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    def text_encoder_rates(self, encoders: int) -> list[float]:
        """Highest learning rate of each text encoder's LoRA; 0: that one is not trained."""
        if self.network_train_unet_only:
            return [0.0] * encoders
        given = self.text_encoder_lr or (self.learning_rate,)
        return [given[min(index, len(given) - 1)] for index in range(encoders)]

    @property
    def keeps_latents(self) -> bool:
        """Whether each picture is encoded once."""
        return not (self.color_aug or self.random_crop) if self.cache_latents is None else self.cache_latents

    @property
    def noise_seed_of_validation(self) -> int:
        """What the validation's noise and timesteps come from."""
        return self.seed if self.validation_seed is None else self.validation_seed


FIELDS: dict[str, Field[Any]] = {one.name: one for one in fields(TrainingConfig)}
TYPES: dict[str, Any] = get_type_hints(TrainingConfig)


def option_rows() -> list[str]:
    """A row of a Markdown table for each option: name, default, meaning. docs/trainer-options.md holds them."""
    return [f"| `{name}` | {_default(one)} | {one.metadata['help']}{_choices(one)} |" for name, one in FIELDS.items()]


def _default(one: Field[Any]) -> str:
    if one.default is MISSING:
        return "required" if one.default_factory is MISSING else "`{}`"
    if one.default is None:
        return "not set"
    if one.name == "resolution":
        return "`1024`"
    return "" if one.default == "" else f"`{_toml(one.default)}`"


def _choices(one: Field[Any]) -> str:
    named = [f"`{choice}`" for choice in one.metadata.get("choices", ()) if choice != ""]
    return f" One of {', '.join(named)}." if len(named) > 1 else ""


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
    known = {key: value for key, value in table.items() if not _is_refused(key, value)}
    for key, one in FIELDS.items():
        if one.default is MISSING and one.default_factory is MISSING and key not in table:
            raise ConfigError(f"The option '{key}' is missing: {one.metadata['help']}")
    plain = {key: _value(FIELDS[key], value) for key, value in known.items() if key != "sample_prompts"}
    config = TrainingConfig(**plain)
    prompts = read_prompts(known.get("sample_prompts", []), size=config.resolution, seed=config.seed)
    config = dataclasses.replace(config, sample_prompts=prompts)
    _check_combinations(config)
    return config


def _is_refused(key: str, value: Any) -> bool:
    """True for a key of sd-scripts whose value says what this trainer does anyway. Raises for every other stranger."""
    if key in FIELDS:
        return False
    if refusal := refusal_of(key, value):
        raise ConfigError(refusal)
    if refusal is None:
        near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else " See docs/trainer.md for the list."
        raise ConfigError(f"Unknown option '{key}'.{hint}")
    return True


def to_toml(config: TrainingConfig) -> str:
    """The configuration as TOML that `load` reads back to an equal one. Options that are not set are left out."""
    values = dataclasses.asdict(config)
    metadata = values.pop("metadata")
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
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


def _value(one: Field[Any], value: Any) -> Any:
    """The value in the field's type, within its bounds, or ConfigError."""
    key, wanted = one.name, TYPES[one.name]
    if wanted == Size:
        return _size(key, value)
    if wanted == tuple[str, ...]:
        return _strings(key, value)
    if wanted == tuple[float, ...]:
        return tuple(_scalar(one, float, number) for number in (value if isinstance(value, list) else [value]))
    if wanted == Mapping[str, str]:
        return _string_table(key, value)
    kinds = [kind for kind in get_args(wanted) if kind is not type(None)] if isinstance(wanted, UnionType) else [wanted]
    # int | float: a whole number is steps, a fraction is a share
    return _scalar(one, type(value) if type(value) in kinds else kinds[0], value)


def _scalar(one: Field[Any], wanted: type, value: Any) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"'{one.name}' must be {_TYPE_NAMES[wanted]}, not {value!r}.")
    _check_bounds(one, value)
    return value


_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _check_bounds(one: Field[Any], value: Any) -> None:
    limits = one.metadata
    if limits["choices"] and value not in limits["choices"]:
        allowed = ", ".join(str(choice) for choice in limits["choices"] if choice != "")
        raise ConfigError(f"'{one.name}' must be one of {allowed}, not {value!r}.")
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


def _check_combinations(config: TrainingConfig) -> None:
    if bool(config.dataset_manifest) == bool(config.train_data_dir):
        raise ConfigError("Give exactly one of 'dataset_manifest' and 'train_data_dir'.")
    if not config.output_name or Path(config.output_name).name != config.output_name:
        raise ConfigError(f"'output_name' must be a plain file name, not {config.output_name!r}.")
    _check_buckets(config)
    _check_pictures(config)
    _check_what_is_trained(config)
    _check_optimisation(config)
    _check_validation(config)


def _check_buckets(config: TrainingConfig) -> None:
    if config.bucket_reso_steps % 8:
        raise ConfigError(f"'bucket_reso_steps' must be a multiple of 8, not {config.bucket_reso_steps}.")
    if not config.enable_bucket:
        return
    if config.min_bucket_reso % config.bucket_reso_steps:
        raise ConfigError("'min_bucket_reso' must be a multiple of 'bucket_reso_steps'.")
    if not config.min_bucket_reso <= min(config.resolution) <= max(config.resolution) <= config.max_bucket_reso:
        raise ConfigError("'resolution' must lie between 'min_bucket_reso' and 'max_bucket_reso'.")


def _check_pictures(config: TrainingConfig) -> None:
    if config.cache_latents and (config.color_aug or config.random_crop):
        name = "color_aug" if config.color_aug else "random_crop"
        raise ConfigError(
            f"'{name}' makes each picture new at every use: set 'cache_latents' to false, or leave it out."
        )
    if not config.caption_separator:
        raise ConfigError("'caption_separator' must not be empty.")


def _check_what_is_trained(config: TrainingConfig) -> None:
    if config.network_train_unet_only and config.network_train_text_encoder_only:
        raise ConfigError("Give only one of 'network_train_unet_only' and 'network_train_text_encoder_only'.")
    if config.network_train_unet_only and not config.trains_unet:
        raise ConfigError("'unet_lr' is 0 and 'network_train_unet_only' is true: nothing would be trained.")
    if not config.trains_unet and not any(config.text_encoder_rates(2)):
        raise ConfigError("Every learning rate is 0: nothing would be trained.")
    if config.dim_from_weights and not config.network_weights:
        raise ConfigError("'dim_from_weights' needs 'network_weights'.")
    _ = config.network  # raises ConfigError by itself


def _check_optimisation(config: TrainingConfig) -> None:
    _check_optimizer(config)
    if config.adaptive_noise_scale and not config.noise_offset:
        raise ConfigError("'adaptive_noise_scale' needs 'noise_offset'.")
    if config.min_timestep >= config.max_timestep:
        raise ConfigError("'min_timestep' must be below 'max_timestep'.")
    for key in ("lr_warmup_steps", "lr_decay_steps"):
        value = getattr(config, key)
        if isinstance(value, float) and value >= 1 and not value.is_integer():
            raise ConfigError(f"'{key}' must be a whole number of steps, or a share below 1, not {value:g}.")


def _rates(config: TrainingConfig) -> set[float]:
    """Of what is trained."""
    of_text_encoders = {rate for rate in config.text_encoder_rates(2) if rate}
    return of_text_encoders | ({config.unet_rate} if config.trains_unet else set())


def _check_optimizer(config: TrainingConfig) -> None:
    options = config.optimizer_options  # raises ConfigError by itself
    if config.optimizer_type == "Prodigy" and len(_rates(config)) > 1:
        raise ConfigError(
            "'optimizer_type' = 'Prodigy' takes one learning rate: 'unet_lr' and 'text_encoder_lr' differ."
        )
    if config.optimizer_type != "AdamWScheduleFree":
        return
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise ConfigError(
            "'optimizer_type' = 'AdamWScheduleFree' works without a schedule: "
            f"'lr_scheduler' must be constant or constant_with_warmup, not '{config.lr_scheduler}'."
        )
    if config.ema_decay:
        raise ConfigError("'optimizer_type' = 'AdamWScheduleFree' averages the weights itself: leave out 'ema_decay'.")
    if 0.0 in options.get("betas", ()):
        raise ConfigError("'optimizer_args': the betas of AdamWScheduleFree must be above 0.")


def _check_validation(config: TrainingConfig) -> None:
    for key in ("save_best", "early_stopping_patience", "validate_every_n_steps", "validate_every_n_epochs"):
        if getattr(config, key) and not config.validation_split:
            raise ConfigError(f"'{key}' needs validation pictures: set 'validation_split', such as 0.1.")
