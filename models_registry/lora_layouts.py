"""How programs name the tensors of LoRA files, and which modules show which base model. Facts only.

No Django, no torch. A module's path is compared with `_` for `.`, since Kohya's names have no dots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KOHYA, PEFT, DIFFUSERS, LYCORIS = "kohya", "peft", "diffusers", "lycoris"
STYLES = {
    KOHYA: "Kohya (lora_down, lora_up)",
    PEFT: "PEFT (lora_A, lora_B)",
    DIFFUSERS: "diffusers before 0.22 (lora.down, lora.up)",
    LYCORIS: "LyCORIS",
}
LORA, LOHA, LOKR, OFT, FULL, NORM = "LoRA", "LoHa", "LoKr", "OFT", "Full difference", "Norm"


@dataclass(frozen=True)
class Ending:
    """The end of a tensor's name. `rank_at`: which of its dimensions is the rank; `inside_at`: which one takes the
    module's input. -1: none."""

    text: str
    style: str = ""
    algorithm: str = ""
    rank_at: int = -1
    inside_at: int = -1


# The longest that fits counts: `.lora.down.weight` before `_lora.down.weight`.
ENDINGS = (
    Ending(".lora_down.weight", KOHYA, LORA, rank_at=0, inside_at=1),
    Ending(".lora_up.weight", KOHYA, LORA, rank_at=1),
    Ending(".lora_mid.weight", KOHYA, LORA),
    Ending(".lora_A.weight", PEFT, LORA, rank_at=0, inside_at=1),
    Ending(".lora_B.weight", PEFT, LORA, rank_at=1),
    Ending(".lora_A.default.weight", PEFT, LORA, rank_at=0, inside_at=1),
    Ending(".lora_B.default.weight", PEFT, LORA, rank_at=1),
    Ending(".lora_magnitude_vector", PEFT),
    Ending(".lora_linear_layer.down.weight", DIFFUSERS, LORA, rank_at=0, inside_at=1),
    Ending(".lora_linear_layer.up.weight", DIFFUSERS, LORA, rank_at=1),
    Ending(".lora.down.weight", DIFFUSERS, LORA, rank_at=0, inside_at=1),
    Ending(".lora.up.weight", DIFFUSERS, LORA, rank_at=1),
    Ending("_lora.down.weight", DIFFUSERS, LORA, rank_at=0, inside_at=1),
    Ending("_lora.up.weight", DIFFUSERS, LORA, rank_at=1),
    Ending(".hada_w1_a", LYCORIS, LOHA, rank_at=1),
    Ending(".hada_w1_b", LYCORIS, LOHA, rank_at=0, inside_at=1),
    Ending(".hada_w2_a", LYCORIS, LOHA, rank_at=1),
    Ending(".hada_w2_b", LYCORIS, LOHA, rank_at=0),
    Ending(".hada_t1", LYCORIS, LOHA),
    Ending(".hada_t2", LYCORIS, LOHA),
    Ending(".lokr_w1", LYCORIS, LOKR),
    Ending(".lokr_w1_a", LYCORIS, LOKR, rank_at=1),
    Ending(".lokr_w1_b", LYCORIS, LOKR, rank_at=0),
    Ending(".lokr_w2", LYCORIS, LOKR),
    Ending(".lokr_w2_a", LYCORIS, LOKR, rank_at=1),
    Ending(".lokr_w2_b", LYCORIS, LOKR, rank_at=0),
    Ending(".lokr_t2", LYCORIS, LOKR),
    Ending(".oft_blocks", LYCORIS, OFT),
    Ending(".oft_diag", LYCORIS, OFT),
    Ending(".diff", LYCORIS, FULL),
    Ending(".diff_b", LYCORIS, FULL),
    Ending(".w_norm", LYCORIS, NORM),
    Ending(".b_norm", LYCORIS, NORM),
    Ending(".dora_scale"),
    Ending(".alpha"),
    Ending(".scale"),
)
ALPHA = ".alpha"

TEXT = "Text encoder"
DENOISER = "Denoiser"
# Where the module's own path begins, and the part that it belongs to. The first that fits counts.
PREFIXES = (
    ("lora_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("lycoris_text_encoder_", TEXT),
    ("lycoris_", DENOISER),
    ("lora_te1_", TEXT),
    ("lora_te2_", f"{TEXT} 2"),
    ("lora_te3_", f"{TEXT} 3"),
    ("lora_te_", TEXT),
    ("lora_prior_te_", TEXT),
    ("text_encoders.clip_l.", TEXT),
    ("text_encoders.clip_g.", f"{TEXT} 2"),
    ("text_encoders.", f"{TEXT} 3"),
    ("text_encoder_2.", f"{TEXT} 2"),
    ("text_encoder_3.", f"{TEXT} 3"),
    ("text_encoder.", TEXT),
    ("unet.", DENOISER),
    ("transformer.", DENOISER),
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
)
WRAPPER = "base_model.model."  # PEFT's own, before all others


@dataclass(frozen=True)
class Mark:
    """Modules of the denoiser that show an architecture: a part of their path, and how wide what goes into them is
    (empty: any)."""

    architecture: str
    path: re.Pattern[str]
    widths: tuple[int, ...] = ()


def _mark(architecture: str, path: str, *widths: int) -> Mark:
    return Mark(architecture, re.compile(path), widths)


UNET = r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_"
CROSS_ATTENTION = UNET + r".*attn2_(processor_)?to_[kv]$"
# The first that fits counts. Widths are those of the published models.
MARKS = (
    _mark("sdxl", CROSS_ATTENTION, 2048),
    _mark("sd2", CROSS_ATTENTION, 1024),
    _mark("sd15", CROSS_ATTENTION, 768),
    _mark("sdxl", UNET + r".*transformer_blocks_[2-9]_"),  # the others have one in each place
    _mark("hidream", r"(double|single)_stream_blocks_\d+_block_"),
    _mark("auraflow", r"joint_transformer_blocks_\d+_|double_layers_\d+_|single_layers_\d+_"),
    _mark("sd3", r"joint_blocks_\d+_"),
    _mark("qwen_image", r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
    _mark("flux2", r"(double|single)_stream_modulation|attn_to_qkv_mlp_proj"),
    _mark("hunyuan_image", r"double_blocks_\d+_(img|txt)_(attn_qkv|mlp_fc1)|single_blocks_\d+_linear1", 3584),
    _mark("flux2", r"double_blocks_\d+_(img|txt)_(attn_qkv|mlp_0)|single_blocks_\d+_linear1", 4096, 6144),
    _mark(
        "hunyuan_video",
        r"token_refiner|double_blocks_\d+_(img|txt)_(mlp_fc|mod_linear)|single_blocks_\d+_modulation_linear",
    ),
    _mark("chroma", r"distilled_guidance_layer"),
    _mark("flux", r"(double|single)_blocks_\d+_", 3072),
    _mark("flux", r"single_transformer_blocks_\d+_", 3072),
    _mark("qwen_image", r"^transformer_blocks_(2[4-9]|[345]\d)_attn_", 3072),  # FLUX.1 has 19
    _mark("sd3", r"^transformer_blocks_\d+_attn_(add_[qkv]_proj|to_[qkv])$", 1536, 2432),
    _mark("anima", r"^(net_)?blocks_\d+_((self|cross)_attn_[qkv]_proj|adaln_modulation|mlp_layer[12])|llm_adapter"),
    _mark("wan22", r"^blocks_\d+_((self|cross)_attn_[qkv]|attn[12]_to_[qkv])$", 3072),
    _mark("wan", r"^blocks_\d+_((self|cross)_attn_[qkvo]|attn[12]_to_[qkv]|ffn_)"),
    _mark("omnigen2", r"ref_image_refiner_\d+_"),
    _mark("omnigen2", r"layers_\d+_attn_to_[qkv]$", 2520),
    _mark("lumina2", r"layers_\d+_(attention_qkv|attn_to_[qkv]|attention_to_[qkv])$", 2304),
    _mark("z_image", r"layers_\d+_(attention_qkv|attention_to_[qkv])$", 3840),
    _mark("ltx", r"^transformer_blocks_\d+_attn[12]_to_[qkv]$", 2048, 4096),
)
# Architectures whose LoRAs have the same modules: there the metadata may say the other one.
SAME_MODULES = {"flux": ("chroma", "flux2"), "wan": ("wan22",), "z_image": ("lumina2",)}
# What ss_base_model_version and modelspec.architecture begin with, letters and digits only. The first that fits counts.
BASE_VERSIONS = (
    ("sdxl", "sdxl"),
    ("stablediffusionxl", "sdxl"),
    ("sdv1", "sd15"),
    ("sd1", "sd15"),
    ("stablediffusionv1", "sd15"),
    ("sdv2", "sd2"),
    ("sd2", "sd2"),
    ("stablediffusionv2", "sd2"),
    ("sd3", "sd3"),
    ("stablediffusion3", "sd3"),
    ("flux2", "flux2"),
    ("flux", "flux"),
    ("chroma", "chroma"),
    ("lumina", "lumina2"),
    ("hunyuanimage", "hunyuan_image"),
    ("hunyuanvideo", "hunyuan_video"),
    ("anima", "anima"),
    ("wan22", "wan22"),
    ("wan", "wan"),
    ("qwenimage", "qwen_image"),
    ("zimage", "z_image"),
    ("hidream", "hidream"),
    ("ltx", "ltx"),
    ("auraflow", "auraflow"),
    ("omnigen2", "omnigen2"),
)
