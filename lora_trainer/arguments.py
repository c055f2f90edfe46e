"""sd-scripts' `name=value` lists, read into plain values: `network_args` and `optimizer_args`. Torch-free."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lora_trainer.errors import ConfigError

Reader = Callable[[str], Any]


@dataclass(frozen=True)
class NetworkArguments:
    """`network_args`: ranks by kind and by block, and which modules get a LoRA at all."""

    conv_dim: int = 0
    """Rank of the 3x3 convolutions; 0: they get none."""
    conv_alpha: float = 0.0
    """0: 1, as in sd-scripts."""
    block_dims: tuple[int, ...] = ()
    """Rank of each UNet block in sd-scripts' order; 0: none there."""
    block_alphas: tuple[float, ...] = ()
    conv_block_dims: tuple[int, ...] = ()
    conv_block_alphas: tuple[float, ...] = ()
    include_patterns: tuple[re.Pattern[str], ...] = ()
    """Only modules whose name in the file (`lora_unet_…`) one of these is found in."""
    exclude_patterns: tuple[re.Pattern[str], ...] = ()
    network_reg_dims: Mapping[re.Pattern[str], int] = field(default_factory=dict)
    """Rank of the modules whose name in the file the pattern is found in; their alpha is network_alpha."""

    @classmethod
    def read(cls, arguments: tuple[str, ...]) -> Self:
        """From `["conv_dim=8", …]`; ConfigError for names and values that mean nothing."""
        found = cls(**_read("network_args", arguments, NETWORK_READERS))
        if found.conv_dim < 0 or found.conv_alpha < 0:
            raise ConfigError("'network_args': conv_dim must be at least 1 and conv_alpha above 0.")
        if found.conv_alpha and not found.conv_dim and not found.conv_block_dims:
            raise ConfigError("'network_args': conv_alpha means nothing without conv_dim.")
        return found


def optimizer_arguments(optimizer: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments for the optimizer from `["weight_decay=0.01", …]`; ConfigError names what it takes."""
    given = _read("optimizer_args", arguments, OPTIMIZER_READERS[optimizer])
    betas = given.get("betas", ())
    if betas and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        raise ConfigError("'optimizer_args': betas takes two numbers from 0 to below 1, such as betas=0.9,0.99.")
    return given


def _read(option: str, arguments: tuple[str, ...], readers: Mapping[str, Reader]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        name = name.strip()
        if name not in readers:
            known = ", ".join(readers) or "none"
            raise ConfigError(f"'{option}' knows {known}, not {name!r}.")
        try:
            found[name] = readers[name](text.strip())
        except (ValueError, re.error) as error:
            raise ConfigError(
                f"'{option}': {argument!r} needs {WANTED[readers[name]]} after the equals sign."
            ) from error
    return found


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.strip("()[]").split(","))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("()[]").split(","))


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _patterns(text: str) -> tuple[re.Pattern[str], ...]:
    """Regular expressions, as a list of quoted texts or separated by commas."""
    parts = re.findall(r"""['"]([^'"]+)['"]""", text) or [part.strip() for part in text.strip("[]").split(",")]
    return tuple(re.compile(part) for part in parts if part)


def _ranks_by_pattern(text: str) -> dict[re.Pattern[str], int]:
    pairs = [part.rpartition("=") for part in text.split(",")]
    return {re.compile(pattern.strip()): int(rank) for pattern, _, rank in pairs}


WANTED: dict[Reader, str] = {
    float: "a number",
    int: "a whole number",
    _numbers: "numbers",
    _whole_numbers: "whole numbers",
    _flag: "True or False",
    _patterns: "regular expressions",
    _ranks_by_pattern: "pattern=rank pairs",
}
NETWORK_READERS: dict[str, Reader] = {
    "conv_dim": int,
    "conv_alpha": float,
    "block_dims": _whole_numbers,
    "block_alphas": _numbers,
    "conv_block_dims": _whole_numbers,
    "conv_block_alphas": _numbers,
    "include_patterns": _patterns,
    "exclude_patterns": _patterns,
    "network_reg_dims": _ranks_by_pattern,
}
_ADAM: dict[str, Reader] = {"weight_decay": float, "betas": _numbers, "eps": float}
OPTIMIZER_READERS: dict[str, dict[str, Reader]] = {
    "AdamW": _ADAM,
    "AdamW8bit": _ADAM,
    "SGD": {"weight_decay": float, "momentum": float},
    "SGDNesterov": {"weight_decay": float, "momentum": float},
    "Lion": {"weight_decay": float, "betas": _numbers},
    "Adafactor": {"weight_decay": float, "clip_threshold": float, "decay_rate": float, "scale_parameter": _flag},
    "Prodigy": {
        **_ADAM,
        "beta3": float,
        "decouple": _flag,
        "use_bias_correction": _flag,
        "safeguard_warmup": _flag,
        "d0": float,
        "d_coef": float,
        "growth_rate": float,
        "slice_p": int,
    },
    "AdamWScheduleFree": {**_ADAM, "warmup_steps": int, "r": float, "weight_lr_power": float},
}
