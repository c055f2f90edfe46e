"""The modules of a base model, by name and weight shape, worked out from its configuration instead of its weights.

Names are diffusers' dotted paths, in text encoders always with `text_model.` in front. A shape is the weight's:
[out, in] for a linear module, [out, in, height, width] for a convolution. Torch-free.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lora_trainer.architectures.detection import CONFIGS, detect
from lora_trainer.errors import ModelError
from lora_trainer.sgm_names import sgm_name

Shape = tuple[int, ...]
Modules = dict[str, Shape]

UNET, TEXT_1, TEXT_2 = "unet", "te1", "te2"
KOHYA_PREFIXES = {
    "lora_unet_": UNET,
    "lora_te_": TEXT_1,
    "lora_te1_": TEXT_1,
    "lora_te2_": TEXT_2,
}
DIFFUSERS_PREFIXES = {"unet.": UNET, "text_encoder.": TEXT_1, "text_encoder_2.": TEXT_2}


@dataclass(frozen=True)
class Layout:
    """What a base model is made of, as far as a LoRA can reach it."""

    key: str
    """sd15, sd2 or sdxl"""
    unet_config: Mapping[str, Any]
    parts: Mapping[str, Modules]
    """unet, te1, te2"""

    def original_name(self, path: str) -> str:
        """The UNet module's name in the original code, such as `input_blocks.4.1.proj_in`."""
        return sgm_name(path, self.unet_config)


@cache
def full_size(key: str) -> Layout:
    """The published SD 1.5, SD 2 or SDXL base model."""
    folder = CONFIGS / key
    texts = [_read_json(path) for path in sorted(folder.glob("text_encoder*.json"))]
    return _layout(key, _read_json(folder / "unet.json"), texts)


def read_layout(base: Path) -> Layout:
    """The base model at `base`, a diffusers folder or a single file; ModelError when it is none of the three."""
    key = detect(base, has_vae=True)
    if base.is_file():
        return full_size(key)
    names = ("text_encoder", "text_encoder_2") if key == "sdxl" else ("text_encoder",)
    try:
        texts = [_read_json(base / name / "config.json") for name in names]
        return _layout(key, _read_json(base / "unet" / "config.json"), texts)
    except OSError as error:
        raise ModelError(f"The base model {base} is incomplete: {error.filename} is missing.") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"The base model {base} has a damaged configuration ({error!r}).") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _layout(key: str, unet: Mapping[str, Any], texts: list[Mapping[str, Any]]) -> Layout:
    parts = {UNET: dict(_unet(unet))}
    parts |= {f"te{number}": dict(_text_encoder(text)) for number, text in enumerate(texts, 1)}
    if key == "sdxl":
        parts[TEXT_2]["text_projection"] = (texts[1]["projection_dim"], texts[1]["hidden_size"])
    return Layout(key, unet, parts)


def _unet(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    channels = config["block_out_channels"]
    time = 4 * channels[0]
    depths = config.get("transformer_layers_per_block") or 1
    depths = [depths] * len(channels) if isinstance(depths, int) else depths
    yield "conv_in", (channels[0], config["in_channels"], 3, 3)
    yield from _two_linear("time_embedding", channels[0], time)
    if config.get("addition_embed_type") == "text_time":
        yield from _two_linear("add_embedding", config["projection_class_embeddings_input_dim"], time)
    yield from _down(config, channels, depths, time)
    yield from _middle(config, channels[-1], depths[-1], time)
    yield from _up(config, channels[::-1], depths[::-1], time)
    yield "conv_out", (config["out_channels"], channels[0], 3, 3)


def _two_linear(path: str, inside: int, time: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.linear_1", (time, inside)
    yield f"{path}.linear_2", (time, time)


def _down(config: Mapping[str, Any], channels: list[int], depths: list[int], time: int) -> Iterator[tuple[str, Shape]]:
    for block, kind in enumerate(config["down_block_types"]):
        path, width = f"down_blocks.{block}", channels[block]
        for layer in range(config["layers_per_block"]):
            before = width if layer else channels[max(0, block - 1)]
            yield from _resnet(f"{path}.resnets.{layer}", before, width, time)
            if "CrossAttn" in kind:
                yield from _transformer(f"{path}.attentions.{layer}", width, depths[block], config)
        if block + 1 < len(channels):
            yield f"{path}.downsamplers.0.conv", (width, width, 3, 3)


def _middle(config: Mapping[str, Any], width: int, depth: int, time: int) -> Iterator[tuple[str, Shape]]:
    for number in range(2):
        yield from _resnet(f"mid_block.resnets.{number}", width, width, time)
    yield from _transformer("mid_block.attentions.0", width, depth, config)


def _up(config: Mapping[str, Any], channels: list[int], depths: list[int], time: int) -> Iterator[tuple[str, Shape]]:
    last = config["layers_per_block"]
    for block, kind in enumerate(config["up_block_types"]):
        path, width = f"up_blocks.{block}", channels[block]
        for layer in range(last + 1):
            before = width if layer else channels[max(0, block - 1)]
            # what the way down left at this resolution joins in; the last of it has the next one's width
            skip = channels[min(block + 1, len(channels) - 1)] if layer == last else width
            yield from _resnet(f"{path}.resnets.{layer}", before + skip, width, time)
            if "CrossAttn" in kind:
                yield from _transformer(f"{path}.attentions.{layer}", width, depths[block], config)
        if block + 1 < len(channels):
            yield f"{path}.upsamplers.0.conv", (width, width, 3, 3)


def _resnet(path: str, before: int, after: int, time: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.conv1", (after, before, 3, 3)
    yield f"{path}.time_emb_proj", (after, time)
    yield f"{path}.conv2", (after, after, 3, 3)
    if before != after:
        yield f"{path}.conv_shortcut", (after, before, 1, 1)


def _transformer(path: str, width: int, depth: int, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    projection = (width, width) if config.get("use_linear_projection") else (width, width, 1, 1)
    yield f"{path}.proj_in", projection
    for number in range(depth):
        block = f"{path}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", config["cross_attention_dim"])):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, context)
            yield f"{block}.{attention}.to_v", (width, context)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)  # GEGLU: 4 × the width, twice
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{path}.proj_out", projection


def _text_encoder(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, inside = config["hidden_size"], config["intermediate_size"]
    for number in range(config["num_hidden_layers"]):
        path = f"text_model.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{path}.self_attn.{name}", (width, width)
        yield f"{path}.mlp.fc1", (inside, width)
        yield f"{path}.mlp.fc2", (width, inside)
