"""The LoRA on the UNet: which modules get one, with which rank, and its tensors by name.

For a linear module W [out, in] the trained pair is down [rank, in] and up [out, rank]; for a 3x3 convolution
down [rank, in, 3, 3] and up [out, rank, 1, 1]. The module then computes W x + (alpha / rank) * up(down(x)).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_trainer.config import TrainingConfig

ADAPTER = "default"
# sd-scripts' choice: everything inside the transformers; with conv_dim also inside the residual and resizing blocks
TRANSFORMER_BLOCKS = {"Transformer2DModel"}
CONVOLUTION_BLOCKS = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}


@dataclass(frozen=True)
class LoraPair:
    """The trained tensors of one module; `name` is its path in the diffusers UNet."""

    name: str
    down: nn.Parameter
    up: nn.Parameter
    rank: int
    alpha: float


def add_lora(unet: nn.Module, config: TrainingConfig) -> list[LoraPair]:
    """Put an untrained LoRA into the UNet: up starts at zero, so nothing changes before the first step."""
    shapes = _targets(unet, config)
    torch.manual_seed(config.seed)  # the first weights of `down`
    add_adapter: Any = unet.add_adapter
    alpha: Any = config.network_alpha  # peft says int, but only divides it
    add_adapter(
        LoraConfig(
            r=config.network_dim,
            lora_alpha=alpha,
            lora_dropout=config.network_dropout,
            target_modules=list(shapes),
            rank_pattern={name: rank for name, (rank, _) in shapes.items()},
            alpha_pattern={name: alpha for name, (_, alpha) in shapes.items()},
        )
    )
    pairs = list(_pairs(unet))
    for pair in pairs:
        # small updates would be lost in half precision, whatever the frozen weights are
        pair.down.data, pair.up.data = pair.down.data.float(), pair.up.data.float()
    return pairs


def _targets(unet: nn.Module, config: TrainingConfig) -> dict[str, tuple[int, float]]:
    """Module path -> (rank, alpha)."""
    plain = config.network_dim, config.network_alpha
    convolution = config.convolution
    found: dict[str, tuple[int, float]] = {}
    for block_name, block in unet.named_modules():
        kind = type(block).__name__
        if kind not in TRANSFORMER_BLOCKS and not (convolution and kind in CONVOLUTION_BLOCKS):
            continue
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
                found[name] = plain
            elif isinstance(module, nn.Conv2d) and convolution:
                found[name] = convolution
    return found


def _pairs(unet: nn.Module) -> Iterator[LoraPair]:
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            down: Any = module.lora_A[ADAPTER]
            up: Any = module.lora_B[ADAPTER]
            yield LoraPair(name, down.weight, up.weight, module.r[ADAPTER], float(module.lora_alpha[ADAPTER]))


def parameters(pairs: list[LoraPair]) -> list[nn.Parameter]:
    """Everything that is trained, in a fixed order."""
    return [tensor for pair in pairs for tensor in (pair.down, pair.up)]


def tensors(pairs: list[LoraPair]) -> dict[str, Tensor]:
    """Copies in float32 on the CPU, under the names that `load_tensors` takes."""
    copies = {f"{pair.name}.down": pair.down for pair in pairs} | {f"{pair.name}.up": pair.up for pair in pairs}
    return {name: tensor.detach().float().cpu().clone() for name, tensor in copies.items()}


def load_tensors(pairs: list[LoraPair], saved: dict[str, Tensor]) -> None:
    """Put saved tensors back; ValueError when they belong to a LoRA of another shape."""
    expected = {name: tensor.shape for name, tensor in tensors(pairs).items()}
    if expected != {name: tensor.shape for name, tensor in saved.items()}:
        raise ValueError("the saved LoRA has other modules or another rank")
    with torch.no_grad():
        for pair in pairs:
            pair.down.copy_(saved[f"{pair.name}.down"])
            pair.up.copy_(saved[f"{pair.name}.up"])
