"""The optimizers by sd-scripts' names, each from the package that sd-scripts takes it from.

All of them can be stopped and resumed exactly: `state_dict` through `torch.save` and `torch.load(weights_only=True)`
into a new optimizer, and the next steps are, bit for bit, those that would have followed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch.optim import SGD, AdamW, Optimizer
from transformers.optimization import Adafactor

from lora_trainer.config import TrainingConfig
from lora_trainer.ema import restored_afterwards
from lora_trainer.errors import ConfigError, explain

_CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "SGD": (SGD, {}),
    "SGDNesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Lion": (Lion, {}),
    # its own relative steps would leave no meaning to learning_rate and lr_scheduler
    "Adafactor": (Adafactor, {"relative_step": False}),
    "Prodigy": (Prodigy, {}),
    "AdamWScheduleFree": (AdamWScheduleFree, {}),
}
"""Class and the arguments that differ from its defaults."""
_FUSED = ("cpu", "cuda")
_EIGHT_BIT_FROM = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bits."""


def make_optimizer(config: TrainingConfig, groups: list[dict[str, Any]], device: torch.device) -> Optimizer:
    """The optimizer for `groups`, each with "params" on `device` and "lr". ConfigError when its arguments do not go
    together, or when this machine lacks what it needs."""
    name = config.optimizer_type
    kind, arguments = (_eight_bit_adamw(device), {}) if name == "AdamW8bit" else _CLASSES[name]
    if kind is AdamW:
        arguments = {"fused": device.type in _FUSED}
    try:
        optimizer: Optimizer = kind(groups, lr=config.learning_rate, **(arguments | config.optimizer_options))
    except ValueError as error:
        raise ConfigError(f"'optimizer_args' does not suit {name}: {error}.") from error
    if isinstance(optimizer, AdamWScheduleFree):
        optimizer.train()
    return optimizer


def effective_rate(optimizer: Optimizer) -> float:
    """The first group's learning rate; for Prodigy times its own estimate d, as sd-scripts logs it."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group["d"] if isinstance(optimizer, Prodigy) else group["lr"])


@contextlib.contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters of a schedule-free optimizer are the averaged ones (Defazio et al., "The Road Less
    Scheduled", 2024), which are the result of the training. Afterwards those of the training are back, bit for bit:
    its own way back is a rounded interpolation. Other optimizers have one set of parameters only."""
    if not isinstance(optimizer, AdamWScheduleFree):
        yield
        return
    groups = optimizer.param_groups
    modes = [group["train_mode"] for group in groups]
    with restored_afterwards([one for group in groups for one in group["params"]]):
        try:
            optimizer.eval()
            yield
        finally:
            for group, mode in zip(groups, modes, strict=True):
                group["train_mode"] = mode


def _eight_bit_adamw(device: torch.device) -> Any:
    """bitsandbytes' class, after one step on a small tensor: a build without kernels for the device imports, too."""
    try:
        from bitsandbytes.optim import AdamW8bit

        weights = torch.zeros(_EIGHT_BIT_FROM, device=device, requires_grad=True)
        weights.grad = torch.ones_like(weights)
        AdamW8bit([weights]).step()
    except ImportError as error:
        advice = "Install it (pip install bitsandbytes), or use 'AdamW'."
        raise ConfigError(f"'optimizer_type' = 'AdamW8bit' needs the package bitsandbytes. {advice}") from error
    except Exception as error:
        if explain(error):  # out of memory, which says nothing of the package
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f"'optimizer_type' = 'AdamW8bit' does not work on this machine's {device.type} ({reason}). Use 'AdamW'."
        ) from error
    return AdamW8bit
