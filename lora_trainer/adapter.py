"""The LoRA on the base model: which modules get one, with which rank, and its tensors by name.

For a linear module W [out, in] the trained pair is down [rank, in] and up [out, rank]; for a 3x3 convolution
down [rank, in, 3, 3] and up [out, rank, 1, 1]. The module then computes W x + (alpha / rank) * up(down(x)).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_trainer.architectures.base import UNET, BaseModel
from lora_trainer.arguments import NetworkArguments
from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError
from lora_trainer.lora_layers import ADAPTER, FusedLinear

# sd-scripts' choice: everything inside the transformers; with conv_dim also inside the residual and resizing blocks
TRANSFORMER_BLOCKS = {"Transformer2DModel"}
CONVOLUTION_BLOCKS = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
TEXT_BLOCKS = {"CLIPAttention", "CLIPMLP"}


@dataclass(frozen=True)
class LoraPair:
    """The trained tensors of one module."""

    part: str
    """unet, te1, te2, …"""
    name: str
    """The module's dotted path inside the part."""
    file_name: str
    """Its name in Kohya's format."""
    down: nn.Parameter
    up: nn.Parameter
    rank: int
    alpha: float


@dataclass(frozen=True)
class Size:
    """Of one module's LoRA."""

    rank: int
    alpha: float


def rates(model: BaseModel, config: TrainingConfig) -> dict[str, float]:
    """Part -> its highest learning rate, for the parts that are trained."""
    encoders = config.text_encoder_rates(len(model.text_encoders))
    every = {UNET: config.unet_rate if config.trains_unet else 0.0}
    every |= {f"te{number}": rate for number, rate in enumerate(encoders, 1)}
    return {part: rate for part, rate in every.items() if rate}


def add_lora(
    model: BaseModel, config: TrainingConfig, *, start_from: Mapping[str, Size] | None = None
) -> list[LoraPair]:
    """Put an untrained LoRA into the parts that are trained: up starts at zero, so nothing changes before the first
    step. `start_from`: ranks and alphas by name in the file (dim_from_weights). ConfigError when nothing is left."""
    torch.manual_seed(config.seed)  # the first weights of `down`
    pairs: list[LoraPair] = []
    modules = model.parts()
    for part in rates(model, config):
        pairs += _add_to_part(model, part, modules[part], config, start_from)
    if not pairs:
        raise ConfigError(
            "'network_args' leave no module to train. Loosen include_patterns, exclude_patterns or ranks."
        )
    return pairs


def _add_to_part(
    model: BaseModel, part: str, module: nn.Module, config: TrainingConfig, start_from: Mapping[str, Size] | None
) -> list[LoraPair]:
    names = {path: model.file_name(part, path) for path, _ in _candidates(part, module, config.network, start_from)}
    sizes = dict(_sizes(model, part, module, config, names, start_from))
    if not sizes:
        return []
    plan = LoraConfig(
        r=config.network_dim,
        lora_alpha=config.network_alpha,  # type: ignore[arg-type]  # peft says int, but only divides it
        lora_dropout=config.network_dropout,
        target_modules=_any_of(sizes),
        rank_pattern={_any_of(paths): rank for rank, paths in _by_value(sizes, "rank").items()},
        alpha_pattern={_any_of(paths): alpha for alpha, paths in _by_value(sizes, "alpha").items()},
    )
    if not config.network_dropout:
        plan._register_custom_module({nn.Linear: FusedLinear})
    inject_adapter_in_model(plan, module, adapter_name=ADAPTER)
    pairs = list(_pairs(part, module, names))
    for pair in pairs:
        # small updates would be lost in half precision, whatever the frozen weights are
        pair.down.data, pair.up.data = pair.down.data.float(), pair.up.data.float()
    return pairs


def _any_of(paths: Iterable[str]) -> str:
    """One pattern for all of them: peft would try a list one by one for every module."""
    return "|".join(re.escape(path) for path in paths)


def _by_value(sizes: Mapping[str, Size], what: str) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for path, size in sizes.items():
        groups.setdefault(getattr(size, what), []).append(path)
    return groups


def _candidates(
    part: str, module: nn.Module, network: NetworkArguments, start_from: Mapping[str, Size] | None
) -> Iterator[tuple[str, nn.Module]]:
    """Linear and convolution modules inside the blocks that sd-scripts looks into."""
    blocks = TRANSFORMER_BLOCKS if part == UNET else TEXT_BLOCKS
    if part == UNET and (network.conv_dim or network.conv_block_dims or start_from is not None):
        blocks = blocks | CONVOLUTION_BLOCKS
    found: dict[str, nn.Module] = {}
    for block_name, block in module.named_modules():
        if type(block).__name__ in blocks:
            inner = block.named_modules(prefix=block_name)
            found |= {name: one for name, one in inner if isinstance(one, (nn.Linear, nn.Conv2d))}
    yield from found.items()


def _sizes(
    model: BaseModel,
    part: str,
    module: nn.Module,
    config: TrainingConfig,
    names: Mapping[str, str],
    start_from: Mapping[str, Size] | None,
) -> Iterator[tuple[str, Size]]:
    network = config.network
    for path, one in _candidates(part, module, network, start_from):
        name = names[path]
        if start_from is not None:
            size = start_from.get(name)
        elif _is_wanted(name, network):
            size = _size(name, one, config, is_unet=part == UNET, is_sdxl=model.key == "sdxl")
        else:
            size = None
        if size and size.rank:
            yield path, size


def _is_wanted(name: str, network: NetworkArguments) -> bool:
    included = not network.include_patterns or any(pattern.search(name) for pattern in network.include_patterns)
    return included and not any(pattern.search(name) for pattern in network.exclude_patterns)


def _size(name: str, module: nn.Module, config: TrainingConfig, *, is_unet: bool, is_sdxl: bool) -> Size:
    network = config.network
    is_plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    rank, alpha = config.network_dim, config.network_alpha
    if not is_plain:
        rank, alpha = network.conv_dim, network.conv_alpha or 1.0
    elif by_pattern := [rank for pattern, rank in network.network_reg_dims.items() if pattern.search(name)]:
        return Size(by_pattern[0], alpha)
    if not is_unet:
        return Size(rank, alpha)
    block = block_index(name, is_sdxl=is_sdxl)
    ranks, alphas = (
        (network.block_dims, network.block_alphas) if is_plain else (network.conv_block_dims, network.conv_block_alphas)
    )
    return Size(_of_block(ranks, block, rank, is_sdxl=is_sdxl), _of_block(alphas, block, alpha, is_sdxl=is_sdxl))


def _of_block(given: tuple[Any, ...], block: int, default: Any, *, is_sdxl: bool) -> Any:
    blocks = SDXL_BLOCKS if is_sdxl else SD_BLOCKS
    if given and len(given) != blocks:
        raise ConfigError(f"'network_args': ranks and alphas by block are {blocks} numbers here, not {len(given)}.")
    return given[block] if given else default


SD_BLOCKS, SDXL_BLOCKS = 25, 23
_SD_NAME = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions|upsamplers|downsamplers)_(\d+)_")
_SDXL_NAME = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_")
_SDXL_FIRST = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def block_index(name: str, *, is_sdxl: bool) -> int:
    """Which of sd-scripts' UNet blocks a module (by its name in the file) belongs to: 25 for SD 1.5 and 2 (12 down,
    the middle, 12 up), 23 for SDXL (1–9 in, 10–12 the middle, 13–21 out; 0 and 22 have no LoRA)."""
    if is_sdxl:
        match = _SDXL_NAME.search(name)
        return _SDXL_FIRST[match[1]] + int(match[2]) if match else 0
    match = _SD_NAME.search(name)
    if not match:
        return 12
    way, resolution, kind, number = match.groups()
    inside = int(number) if kind in ("resnets", "attentions") else 2
    return (1 if way == "down" else 13) + 3 * int(resolution) + inside


def _pairs(part: str, module: nn.Module, names: Mapping[str, str]) -> Iterator[LoraPair]:
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            down: Any = layer.lora_A[ADAPTER]
            up: Any = layer.lora_B[ADAPTER]
            size = layer.r[ADAPTER], float(layer.lora_alpha[ADAPTER])
            yield LoraPair(part, name, names[name], down.weight, up.weight, *size)


def parameters(pairs: Iterable[LoraPair]) -> list[nn.Parameter]:
    """Everything that is trained, in a fixed order."""
    return [tensor for pair in pairs for tensor in (pair.down, pair.up)]


def tensors(pairs: Iterable[LoraPair]) -> dict[str, Tensor]:
    """Copies in float32 on the CPU, under the names that `load_tensors` takes."""
    copies: dict[str, Tensor] = {}
    for pair in pairs:
        copies |= {f"{pair.part}.{pair.name}.down": pair.down, f"{pair.part}.{pair.name}.up": pair.up}
    return {name: tensor.detach().float().cpu().clone() for name, tensor in copies.items()}


def load_tensors(pairs: list[LoraPair], saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors back; ValueError when they belong to a LoRA of another shape."""
    expected = {name: tensor.shape for name, tensor in tensors(pairs).items()}
    if expected != {name: tensor.shape for name, tensor in saved.items()}:
        raise ValueError("the saved LoRA has other modules or another rank")
    with torch.no_grad():
        for pair in pairs:
            pair.down.copy_(saved[f"{pair.part}.{pair.name}.down"])
            pair.up.copy_(saved[f"{pair.part}.{pair.name}.up"])
