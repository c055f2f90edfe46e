"""Module names of the UNet: diffusers' paths to those of the original code, which single-file models have, and which
other programs expect in a LoRA for SDXL.

The original counts blocks through the whole network, diffusers counts inside each resolution. With L layers a
resolution, resolution i of the way down owns input_blocks 1 + (L+1) i … and of the way up output_blocks (L+1) i ….
"""

import re
from collections.abc import Mapping
from typing import Any

_OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_INSIDE_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PATH = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def sgm_name(path: str, unet_config: Mapping[str, Any]) -> str:
    """The original name of a module, such as `input_blocks.4.1.proj_in`; KeyError for a path of another network."""
    match = _PATH.fullmatch(path)
    if not match:
        return _OUTSIDE_BLOCKS[path]
    way, resolution, kind, number, inner = match.groups()
    if kind == "resnets":
        inner = _INSIDE_RESNET[inner]
    if way is None:
        # resnet, attention, resnet
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{inner}"
    layers = int(unet_config["layers_per_block"])
    if way == "down":
        return _down(kind, int(resolution), int(number), inner, layers)
    has_attention = "CrossAttn" in unet_config["up_block_types"][int(resolution)]
    return _up(kind, int(resolution), int(number), inner, layers, has_attention=has_attention)


def _down(kind: str, resolution: int, number: int, inner: str, layers: int) -> str:
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (resolution + 1)}.0.op"
    block = 1 + (layers + 1) * resolution + number
    return f"input_blocks.{block}.{0 if kind == 'resnets' else 1}.{inner}"


def _up(kind: str, resolution: int, number: int, inner: str, layers: int, *, has_attention: bool) -> str:
    # an upsampler shares the last block of its resolution: after the resnet and, where there is one, the attention
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * resolution + layers}.{2 if has_attention else 1}.{inner}"
    return f"output_blocks.{(layers + 1) * resolution + number}.{0 if kind == 'resnets' else 1}.{inner}"
