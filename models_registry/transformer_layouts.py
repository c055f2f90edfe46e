"""How the transformers of each architecture are told apart: a table of tensor names and of the input's channels.

No Django, no torch. The names and numbers come from the published checkpoints of each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_trainer.safetensors_header import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Transformer:
    """One architecture in one layout: all `marks` and `first` are there. `first` takes the latent picture: its shape is
    (width, channels, …), of `dimensions` dimensions when that tells it from another one."""

    architecture: str
    first: str
    channels: int
    marks: tuple[str, ...]
    dimensions: int = 0

    def fits(self, tensors: Tensors, prefix: str) -> bool:
        if not all(f"{prefix}{name}" in tensors for name in (*self.marks, self.first)):
            return False
        dimensions = len(tensors[f"{prefix}{self.first}"].shape)
        return dimensions == self.dimensions if self.dimensions else dimensions > 1


# The first that fits counts. Several trainers keep the original layout, diffusers has its own; some have but one.
TRANSFORMERS = (
    # Double and single stream blocks, FLUX.1's family.
    Transformer(
        "flux",
        "img_in.weight",
        64,
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "txt_in.weight"),
    ),
    Transformer(
        "flux",
        "x_embedder.weight",
        64,
        (
            "single_transformer_blocks.0.attn.to_q.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "context_embedder.weight",
        ),
    ),
    Transformer(
        "chroma",
        "img_in.weight",
        64,
        ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "txt_in.weight"),
    ),
    Transformer(
        "chroma",
        "x_embedder.weight",
        64,
        ("distilled_guidance_layer.in_proj.weight", "transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"),
    ),
    Transformer(
        "flux2",
        "img_in.weight",
        128,
        ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight", "txt_in.weight"),
    ),
    Transformer(
        "flux2",
        "x_embedder.weight",
        128,
        ("double_stream_modulation_img.linear.weight", "context_embedder.weight"),
    ),
    # The same, with a refiner for the tokens of a language model. Pictures have patches of 2 dimensions, videos of 3.
    Transformer(
        "hunyuan_image",
        "img_in.proj.weight",
        64,
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "txt_in.input_embedder.weight"),
        dimensions=4,
    ),
    Transformer(
        "hunyuan_image",
        "x_embedder.proj.weight",
        64,
        (
            "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
            "time_guidance_embed.timestep_embedder.linear_1.weight",
        ),
        dimensions=4,
    ),
    Transformer(
        "hunyuan_video",
        "img_in.proj.weight",
        16,
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "vector_in.in_layer.weight"),
        dimensions=5,
    ),
    Transformer(
        "hunyuan_video",
        "x_embedder.proj.weight",
        16,
        (
            "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        ),
        dimensions=5,
    ),
    Transformer(
        "sd3",
        "x_embedder.proj.weight",
        16,
        ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight"),
    ),
    Transformer(
        "sd3",
        "pos_embed.proj.weight",
        16,
        ("transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),
    ),
    Transformer(
        "auraflow",
        "init_x_linear.weight",
        16,
        ("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight"),
    ),
    Transformer(
        "auraflow",
        "pos_embed.proj.weight",
        16,
        ("joint_transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),
    ),
    # Refiners for noise and caption. OmniGen2 has all that Lumina has, and references: it comes first.
    # Z-Image modulates without the SiLU before it, hence 0 instead of 1.
    Transformer(
        "omnigen2",
        "x_embedder.weight",
        64,
        (
            "time_caption_embed.caption_embedder.1.weight",
            "noise_refiner.0.attn.to_q.weight",
            "ref_image_patch_embedder.weight",
        ),
    ),
    Transformer(
        "lumina2",
        "x_embedder.weight",
        64,
        ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"),
    ),
    Transformer(
        "lumina2",
        "x_embedder.weight",
        64,
        (
            "time_caption_embed.caption_embedder.1.weight",
            "noise_refiner.0.attn.to_q.weight",
            "layers.0.norm1.linear.weight",
        ),
    ),
    Transformer(
        "z_image",
        "x_embedder.weight",
        64,
        (
            "cap_embedder.1.weight",
            "cap_pad_token",
            "noise_refiner.0.attention.qkv.weight",
            "layers.0.adaLN_modulation.0.weight",
        ),
    ),
    Transformer(
        "z_image",
        "all_x_embedder.2-1.weight",
        64,
        ("cap_embedder.1.weight", "noise_refiner.0.attention.to_q.weight", "layers.0.adaLN_modulation.0.weight"),
    ),
    Transformer(
        "qwen_image",
        "img_in.weight",
        64,
        ("txt_norm.weight", "txt_in.weight", "transformer_blocks.0.img_mod.1.weight"),
    ),
    Transformer(
        "hidream",
        "x_embedder.proj.weight",
        64,
        ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight"),
    ),
    Transformer(
        "anima",
        "x_embedder.proj.1.weight",
        68,  # 2 × 2 pixels of 16 channels and a mask
        ("llm_adapter.blocks.0.cross_attn.q_proj.weight", "blocks.0.mlp.layer1.weight"),
    ),
    Transformer(
        "ltx",
        "patchify_proj.weight",
        128,
        ("adaln_single.emb.timestep_embedder.linear_1.weight", "transformer_blocks.0.attn2.to_k.weight"),
    ),
    Transformer(
        "ltx",
        "proj_in.weight",
        128,
        (
            "time_embed.emb.timestep_embedder.linear_1.weight",
            "caption_projection.linear_1.weight",
            "transformer_blocks.0.attn2.to_k.weight",
        ),
    ),
)
# Wan is decided by wan_of(): (layout's marks, its last projection, the projection of a picture that it starts from).
WAN_LAYOUTS = (
    (("head.modulation", "blocks.0.self_attn.q.weight"), "head.head.weight", "img_emb.proj.1.weight"),
    (
        ("condition_embedder.text_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"),
        "proj_out.weight",
        "condition_embedder.image_embedder.ff.net.0.proj.weight",
    ),
)
WAN_PATCH = 4  # values of the last projection for each channel: a patch is 1 × 2 × 2
WAN_CHANNELS = {16: (16, 36), 48: (48,)}  # of the latent video → of the input; 36: with a first picture and its mask

# A tensor that shows a relative of an architecture above that is none of them → what it is.
RELATIVES = {
    "vace_patch_embedding.weight": "Wan VACE",
    "control_adapter.conv.weight": "Wan Fun Camera",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan Animate",
    "face_adapter.0.norm_k.weight": "Wan Animate",
    "casual_audio_encoder.encoder.final_linear.weight": "Wan S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "audio_adaln_single.linear.weight": "LTX-2",
    "audio_proj_in.weight": "LTX-2",
    "clean_x_embedder.proj.weight": "FramePack",
    "cond_type_embedding.weight": "HunyuanVideo 1.5",
    "cond_type_embed.weight": "HunyuanVideo 1.5",
    "nerf_blocks.0.norm.scale": "Chroma Radiance",
    "nerf_blocks.0.norm.weight": "Chroma Radiance",
    "clip_text_pooled_proj.0.weight": "NewBie",
    "dec_net.cond_embed.weight": "Z-Image in pixel space",
    "siglip_embedder.0.weight": "Z-Image Omni",
    "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight": "Boogu-Image",
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
}
# What the tensors leave open, said on the page of a single file.
OPEN_QUESTIONS = {
    "qwen_image": "Qwen-Image and Qwen-Image-Edit have the same tensors: the file does not say which of them it is. "
    "Taken for Qwen-Image.",
    "wan": "Wan 2.1 and the A14B models of Wan 2.2 have the same tensors: the file does not say which of them it is. "
    "Taken for Wan 2.1.",
}


def relative_of(tensors: Tensors, prefix: str) -> str:
    """What related model it is that nobody here trains; empty when it is none."""
    found = next((title for mark, title in RELATIVES.items() if f"{prefix}{mark}" in tensors), "")
    if not found and f"{prefix}blocks.0.mlp.layer1.weight" in tensors:
        adapter = f"{prefix}llm_adapter.blocks.0.cross_attn.q_proj.weight"
        return "" if adapter in tensors else "Cosmos-Predict2"
    return found


@dataclass(frozen=True)
class Wan:
    """`channels` is what its input takes. `is_usual` tells whether that is one of the published models."""

    architecture: str
    channels: int
    latent_channels: int
    is_usual: bool
    note: str


def wan_of(tensors: Tensors, prefix: str) -> Wan | None:
    """Which Wan it is: 2.2 5B has 48 latent channels; an image-to-video model of 2.2 has lost the picture's
    own projection, which that of 2.1 has; the others cannot be told apart."""
    for marks, last, picture in WAN_LAYOUTS:
        if not all(f"{prefix}{name}" in tensors for name in (*marks, last, "patch_embedding.weight")):
            continue
        shape = tensors[f"{prefix}patch_embedding.weight"].shape
        if len(shape) != 5 or not tensors[f"{prefix}{last}"].shape:
            return None
        latent = tensors[f"{prefix}{last}"].shape[0] // WAN_PATCH
        starts_from_picture = shape[1] == 36
        is_22 = latent == 48 or (starts_from_picture and f"{prefix}{picture}" not in tensors)
        note = OPEN_QUESTIONS["wan"] if not is_22 and not starts_from_picture else ""
        if starts_from_picture:
            note = "It is an image-to-video model: it makes a video from a first picture."
        return Wan("wan22" if is_22 else "wan", shape[1], latent, shape[1] in WAN_CHANNELS.get(latent, ()), note)
    return None
