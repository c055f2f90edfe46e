"""The untrained pilot-tiny: a tokenizer of its few words and an SDXL-layout pipeline with random weights.

Everything has SDXL's architecture at a fraction of its width, so that tools made for SDXL take it as it is.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_trainer.pilot_tiny.draw import PIXELS
from lora_trainer.pilot_tiny.train_vae import as_floats, draw_pictures
from lora_trainer.pilot_tiny.vae_start import start_near_identity

WORDS = """
a an of on with and the in picture photo image background
red orange yellow green blue purple white black pink gray brown
circle square triangle ring cross diamond star heart striped dotted big small large style by
"""
"""Each of these becomes one token; any other word is spelled out."""
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
NARROW, WIDE = 48, 80
"""Widths of the two text encoders."""
TIME_IDS_WIDTH = 32
PICTURES_FOR_SCALES = 24
"""The autoencoder's start is fitted to so many."""

Pair = tuple[str, str]
Pieces = tuple[str, ...]


def build_pipeline(seed: int) -> Any:
    """The untrained pipeline in float32, with weights from the seed."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = build_tokenizer(padding=END), build_tokenizer(padding="!")
    vae = build_vae()
    start_near_identity(vae, as_floats(draw_pictures(PICTURES_FOR_SCALES, seed, clutter=0.35)))
    pipeline_class: Any = StableDiffusionXLPipeline
    return pipeline_class(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(len(tokenizer), NARROW, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(len(tokenizer), WIDE, layers=3)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=build_unet(),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def build_vae() -> Any:
    """0.67 million parameters: 128 × 128 pixels to 16 × 16 latents with 4 channels."""
    vae_class: Any = AutoencoderKL
    return vae_class(
        block_out_channels=(16, 16, 32, 64),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )


def build_unet() -> Any:
    """3.4 million parameters; its residual branches start at zero, so that training starts calmly."""
    unet_class: Any = UNet2DConditionModel
    unet = unet_class(
        sample_size=PIXELS // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 80),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[2, 4, 5],
        cross_attention_dim=NARROW + WIDE,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_IDS_WIDTH + WIDE,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def build_scheduler() -> Any:
    """SDXL's own noise schedule."""
    scheduler_class: Any = EulerDiscreteScheduler
    return scheduler_class(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def _text_config(tokens: int, width: int, *, layers: int) -> Any:
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=width,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


def build_tokenizer(*, padding: str) -> Any:
    """A CLIP tokenizer for WORDS; SDXL's two tokenizers differ in nothing but the padding."""
    with TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder), padding)
        return CLIPTokenizer.from_pretrained(folder)


def _write_tokenizer(folder: Path, padding: str) -> None:
    merges = learn_merges(WORDS.split())
    vocabulary = {token: number for number, token in enumerate(_tokens(merges))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": padding,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Byte-pair encoding until every word is one token: the commonest pair of neighbours first."""
    spellings: list[Pieces] = [(*word[:-1], word[-1] + WORD_END) for word in words]
    merges: list[Pair] = []
    while pairs := Counter(pair for pieces in spellings for pair in pairwise(pieces)):
        # sorted first, so that a tie does not depend on the order of the words
        commonest = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(commonest)
        spellings = [_merged(pieces, commonest) for pieces in spellings]
    return merges


def _merged(pieces: Pieces, pair: Pair) -> Pieces:
    merged: list[str] = []
    rest = list(pieces)
    while rest:
        take = 2 if tuple(rest[:2]) == pair else 1
        merged.append("".join(rest[:take]))
        rest = rest[take:]
    return tuple(merged)


def _tokens(merges: Iterable[Pair]) -> list[str]:
    """All tokens in the order of their numbers: bytes, bytes that end a word, merged pairs, start and end."""
    letters = _byte_letters()
    merged = ("".join(pair) for pair in merges)
    # a dict instead of a set, as it keeps the order
    return [*dict.fromkeys([*letters, *(letter + WORD_END for letter in letters), *merged]), START, END]


def _byte_letters() -> list[str]:
    """CLIP's one printable letter for each of the 256 bytes: printable bytes for themselves, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + others)]]
