"""What a run will need, without its weights: memory and time, for the dry run.

The denoiser is built on PyTorch's meta device, where tensors have shapes but no data, and one forward and backward pass
is done there: what autograd keeps is counted in bytes, what is computed in floating-point operations. How fast this
machine computes is measured with a large matrix product.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lora_trainer.architectures import unet_config
from lora_trainer.config import TrainingConfig
from lora_trainer.console import clock
from lora_trainer.data import Dataset
from lora_trainer.export import DTYPES
from lora_trainer.plan import Plan

SHARE_OF_PEAK = 0.35
"""What a UNet's many small operations usually reach of a large matrix product's speed."""
BYTES_A_PARAMETER = 16
"""Trained: weight, gradient and AdamW's two moments, in float32."""
MATRIX = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Estimate:
    """Of one run on this machine's first device."""

    weights_bytes: int
    """Frozen denoiser."""
    trained_bytes: int
    """LoRA with gradients and optimizer."""
    activation_bytes: int
    checkpointed_bytes: int
    flops_per_step: float
    flops_per_second: float
    """Measured, in a large matrix product."""
    device: str
    steps: int

    @property
    def seconds_per_step(self) -> float:
        return self.flops_per_step / (self.flops_per_second * SHARE_OF_PEAK)

    def sentences(self) -> list[str]:
        """For a person, a line each."""
        always = self.weights_bytes + self.trained_bytes
        plain, checkpointed = _size(always + self.activation_bytes), _size(always + self.checkpointed_bytes)
        duration, step = clock(self.seconds_per_step * self.steps), f"{self.seconds_per_step:.2g} s a step"
        needed, speed = f"{self.flops_per_step / 1e12:.3g} TFLOP", f"{self.flops_per_second / 1e12:.3g} TFLOP/s"
        memory = f"Memory for the UNet and its LoRA: about {plain}, {checkpointed} with gradient_checkpointing"
        how = f"{needed} at {SHARE_OF_PEAK:.0%} of the {speed} measured on {self.device}"
        return [memory, f"Time: about {duration}, {step}: {how}"]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def estimate(config: TrainingConfig, dataset: Dataset, plan: Plan) -> Estimate:
    """For the largest bucket of the dataset with a whole batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES["float" if config.mixed_precision == "no" or device.type == "cpu" else config.mixed_precision]
    unet = _meta_unet(config, dtype)
    width, height = max((picture.placement.bucket for picture in dataset.pictures), key=lambda size: size[0] * size[1])
    forward = _forward(unet, dtype, batch=config.train_batch_size, height=height // 8, width=width // 8)
    with FlopCounterMode(display=False) as counter, _FlashAttention():
        torch.autograd.backward(forward().sum())
    unet.enable_gradient_checkpointing()
    unet.train()
    checkpointed = _kept_bytes(unet, forward)
    unet.disable_gradient_checkpointing()
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    return Estimate(
        weights_bytes=sum(p.numel() * p.element_size() for p in unet.parameters() if not p.requires_grad),
        trained_bytes=BYTES_A_PARAMETER * trained,
        activation_bytes=_kept_bytes(unet, forward),
        checkpointed_bytes=checkpointed,
        flops_per_step=float(counter.get_total_flops()) * config.gradient_accumulation_steps,
        flops_per_second=_flops_per_second(device, dtype),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        steps=plan.total_steps,
    )


def _meta_unet(config: TrainingConfig, dtype: torch.dtype) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    with torch.device("meta"):
        model_class: Any = UNet2DConditionModel
        unet = model_class.from_config(unet_config(Path(config.pretrained_model_name_or_path)))
    unet.to(dtype).requires_grad_(False)
    targets = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"
    if config.network.conv_dim:
        targets = rf"{targets}|.*(conv1|conv2|time_emb_proj|conv_shortcut|samplers\.0\.conv)"
    inject_adapter_in_model(LoraConfig(r=config.network_dim, target_modules=targets), unet)
    return unet


def _forward(unet: Any, dtype: torch.dtype, *, batch: int, height: int, width: int) -> Callable[[], Tensor]:
    config = unet.config
    shape: Any = {"device": "meta", "dtype": dtype}
    noisy = torch.empty(batch, config.in_channels, height, width, **shape)
    timesteps = torch.empty(batch, device="meta", dtype=torch.long)
    text = torch.empty(batch, 77, config.cross_attention_dim, **shape)
    more = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more = {
            "text_embeds": torch.empty(batch, pooled, **shape),
            "time_ids": torch.empty(batch, 6, **shape),
        }
    return lambda: unet(noisy, timesteps, text, added_cond_kwargs=more).sample


class _FlashAttention(TorchFunctionMode):
    """On the meta device attention would be counted as if the whole matrix were kept, as no GPU does today."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[0]
        return func(*args, **(kwargs or {}))


def _kept_bytes(unet: Any, forward: Callable[[], Tensor]) -> int:
    """What autograd keeps for the backward pass, each storage once, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its address is not given away again
        return tensor

    with _FlashAttention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = forward()
    del answer
    return sum(storage.nbytes() for storage in kept.values())


def _flops_per_second(device: torch.device, dtype: torch.dtype, *, least_seconds: float = 0.3) -> float:
    side = MATRIX[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    done, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < least_seconds:
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done * 2 * side**3 / seconds
