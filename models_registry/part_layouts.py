"""Which part of a model a set of tensors is, VAE or text encoder: by their names and shapes.

No Django, no torch. The names and numbers come from the published files of each part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_trainer.safetensors_header import Tensor

Tensors = Mapping[str, Tensor]

VAE_PREFIXES = ("", "first_stage_model.", "vae.")
# Channels of the latent picture → whose VAE it is. Families that share one VAE have the same tensors.
PICTURE_VAES = {
    4: "Stable Diffusion 1.5, 2, XL and AuraFlow",
    16: "FLUX.1, Stable Diffusion 3, Z-Image and the like",
    32: "FLUX.2",
    64: "HunyuanImage 2.1",
}
VIDEO_VAES = {16: "Wan 2.1 and Qwen-Image", 48: "Wan 2.2 5B"}
CAUSAL_VAES = {16: "HunyuanVideo", 128: "LTX-Video"}
# Where a language model's layers begin: alone, inside a model with a head, inside one that also sees pictures.
LANGUAGE_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")
LANGUAGE_SIZES = {
    ("Gemma 2", 2304): "2B",
    ("Qwen2.5-VL", 2048): "3B",
    ("Qwen2.5-VL", 3584): "7B",
    ("Qwen3", 1024): "0.6B",
    ("Qwen3", 2048): "1.7B",
    ("Qwen3", 2560): "4B",
    ("Qwen3", 4096): "8B",
    ("Llama 3", 4096): "8B",
    ("Mistral", 5120): "24B",
}
LLAMA_3_WORDS = 128_256  # the size of its vocabulary; Mistral's are smaller or its width is 5120
# The first layer in the layouts of transformers (older and newer) and OpenCLIP, and what a picture's encoder lacks.
CLIP_MARKS = (
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.embeddings.token_embedding.weight"),
    ("encoder.layers.0.self_attn.q_proj.weight", "embeddings.token_embedding.weight"),
    ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
)
CLIP_BY_WIDTH = {768: ("clip_l", "CLIP-L"), 1024: ("text_encoder", "CLIP-H"), 1280: ("clip_g", "CLIP-G")}
BYT5_WIDTH = 1472


@dataclass(frozen=True)
class FoundPart:
    """`role` is one of the registry's, `title` says whose part it is, e.g. “T5-XXL”."""

    role: str
    title: str


def find_part(tensors: Tensors) -> FoundPart | None:
    """The part that these tensors are, and nothing else: None for a checkpoint that also holds one."""
    return _vae(tensors) or _clip(tensors) or _t5(tensors) or _language_model(tensors)


def is_vae(tensors: Tensors) -> bool:
    """Whether these are a VAE's tensors in the diffusers layout."""
    return "decoder.conv_in.weight" in tensors or "decoder.conv_in.conv.weight" in tensors


def _vae(tensors: Tensors) -> FoundPart | None:
    for prefix in VAE_PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            whose = _whose_vae(tensors, f"{prefix}decoder.")
            if whose is not None:
                return FoundPart("vae", f"VAE of {whose}" if whose else "VAE")
    return None


def _whose_vae(tensors: Tensors, decoder: str) -> str | None:
    """None when it is no VAE, empty when it is an unknown one."""
    if f"{decoder}middle.0.residual.0.gamma" in tensors:
        return VIDEO_VAES[48 if f"{decoder}upsamples.0.upsamples.0.residual.2.weight" in tensors else 16]
    for name, known in ((f"{decoder}conv_in.weight", None), (f"{decoder}conv_in.conv.weight", CAUSAL_VAES)):
        if name in tensors:
            shape = tensors[name].shape
            by_channels = known or (VIDEO_VAES if len(shape) == 5 else PICTURE_VAES)
            return by_channels.get(shape[1], "") if len(shape) > 1 else ""
    return None


def _clip(tensors: Tensors) -> FoundPart | None:
    shape = next((tensors[name].shape for name, beside in CLIP_MARKS if name in tensors and beside in tensors), ())
    if len(shape) != 2 or shape[1] not in CLIP_BY_WIDTH:
        return None
    role, title = CLIP_BY_WIDTH[shape[1]]
    return FoundPart(role, title)


def _t5(tensors: Tensors) -> FoundPart | None:
    first = tensors.get("encoder.block.0.layer.0.SelfAttention.k.weight")
    if first is not None and len(first.shape) == 2:
        width = first.shape[1]
        if width == BYT5_WIDTH:
            return FoundPart("byt5", "ByT5 small")
        # UMT5 has a bias of its own for the positions in every block, T5 one for all of them.
        is_umt5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors
        return FoundPart("t5", _title_of_t5("UMT5" if is_umt5 else "T5", width))
    if "blocks.0.pos_embedding.embedding.weight" in tensors and "token_embedding.weight" in tensors:  # Wan's own layout
        return FoundPart("t5", _title_of_t5("UMT5", tensors["token_embedding.weight"].shape[-1]))
    return None


def _title_of_t5(family: str, width: int) -> str:
    size = {4096: "XXL", 2048: "XL"}.get(width)
    return f"{family}-{size}" if size else f"{family} of width {width:,}"


def _language_model(tensors: Tensors) -> FoundPart | None:
    for prefix in LANGUAGE_PREFIXES:
        layer = f"{prefix}layers.0."
        names = (f"{prefix}embed_tokens.weight", f"{layer}input_layernorm.weight", f"{layer}self_attn.q_proj.weight")
        if all(name in tensors for name in names) and tensors[names[1]].shape:
            width, words = tensors[names[1]].shape[0], tensors[names[0]].shape[0]
            family = _language_family(tensors, layer, width, words)
            return FoundPart("llm", f"{family} {LANGUAGE_SIZES.get((family, width), f'of width {width:,}')}")
    return None


def _language_family(tensors: Tensors, layer: str, width: int, words: int) -> str:
    sees = any(key.startswith(("visual.", "model.visual.")) for key in tensors)
    has_q_norm = f"{layer}self_attn.q_norm.weight" in tensors
    if f"{layer}pre_feedforward_layernorm.weight" in tensors:
        return "Gemma 3" if has_q_norm else "Gemma 2"
    if f"{layer}self_attn.k_proj.bias" in tensors:
        return "Qwen2.5-VL" if sees else "Qwen2.5"
    if has_q_norm:
        return "Qwen3-VL" if sees else "Qwen3"
    return "Llama 3" if words >= LLAMA_3_WORDS and width != 5120 else "Mistral"
