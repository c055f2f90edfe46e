"""Which network a set of tensors is: by their names and shapes, in the original and in the diffusers layout.

No Django, no torch. The names and numbers come from the published checkpoints of each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_trainer.safetensors_header import Tensor
from models_registry.part_layouts import find_part
from models_registry.transformer_layouts import OPEN_QUESTIONS, TRANSFORMERS, relative_of, wan_of

Tensors = Mapping[str, Tensor]

TITLES = {
    "sd15": "Stable Diffusion 1.5",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "chroma": "Chroma",
    "lumina2": "Lumina Image 2.0",
    "hunyuan_image": "HunyuanImage 2.1",
    "anima": "Anima",
    "wan": "Wan 2.1",
    "wan22": "Wan 2.2",
    "qwen_image": "Qwen-Image",
    "hidream": "HiDream-I1",
    "z_image": "Z-Image",
    "flux2": "FLUX.2",
    "ltx": "LTX-Video",
    "hunyuan_video": "HunyuanVideo",
    "auraflow": "AuraFlow",
    "omnigen2": "OmniGen2",
}

LORA_MARKS = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.", ".hada_w1_", ".lokr_w")
CONTROLNET_MARKS = ("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_down_blocks.")
VAE_MARKS = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight", "encoder.conv_in.weight")
TEXT_ENCODER_MARKS = (
    "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
)
# A full checkpoint, the denoiser alone, and as the trainers of Cosmos (Anima) and AuraFlow save it.
PREFIXES = ("model.diffusion_model.", "", "net.", "model.")

# Where each part of a full checkpoint begins.
CHECKPOINT_PARTS = {
    "VAE": ("first_stage_model.", "vae."),
    "Text encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "Text encoder 2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "Text encoder 3": ("text_encoders.t5xxl.",),
    "Text encoders": ("text_encoders.",),
}


class Unrecognised(Exception):
    """Not a model that can be trained on. `str(error)` is a sentence: what was found, and what to do."""


@dataclass(frozen=True)
class Denoiser:
    """The network that a LoRA is trained on."""

    architecture: str
    role: str  # unet | transformer
    prefix: str
    context_size: int  # width of the text embedding that its cross-attention takes; 0 for transformers
    note: str = ""  # a sentence on what the tensors leave open


def find_denoiser(name: str, tensors: Tensors) -> Denoiser:
    """The denoiser among these tensors. Raises Unrecognised; `name` is the file's, for the sentence."""
    refuse_others(name, tensors)
    for prefix in PREFIXES:
        found = (
            _transformer(name, tensors, prefix)
            or _original_unet(name, tensors, prefix)
            or _diffusers_unet(name, tensors, prefix)
        )
        if found:
            return found
    raise Unrecognised(_what_it_is_instead(name, tensors))


def split_checkpoint(tensors: Tensors, denoiser: Denoiser) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part that the file holds, by the part's title."""
    titles = {prefix: title for title, prefixes in CHECKPOINT_PARTS.items() for prefix in prefixes}
    parts: dict[str, dict[str, Tensor]] = {"UNet" if denoiser.role == "unet" else "Transformer": {}}
    own = next(iter(parts))
    for key, tensor in tensors.items():
        title = next((title for prefix, title in titles.items() if key.startswith(prefix)), own)
        if title == own and not key.startswith(denoiser.prefix):
            title = "Other"
        parts.setdefault(title, {})[key] = tensor
    return parts


def refuse_others(name: str, tensors: Tensors) -> None:
    """What has the tensors of a denoiser, but is none that these trainers can use."""
    if any(mark in key for key in tensors for mark in LORA_MARKS):
        raise Unrecognised(f"{name} is a LoRA. Register the base model that it was trained on instead.")
    if any(mark in key for key in tensors for mark in CONTROLNET_MARKS):
        raise Unrecognised(f"{name} is a ControlNet. Register the base model that it steers instead.")
    if any(".bitsandbytes__" in key for key in tensors):
        raise Unrecognised(
            f"{name} is quantised with bitsandbytes, which cannot be trained on. Get the 16-bit version of this model."
        )
    if "edm_mean" in tensors or "edm_vpred.sigma_max" in tensors:
        raise Unrecognised(f"{name} uses an EDM noise schedule, which no trainer here supports.")


def _what_it_is_instead(name: str, tensors: Tensors) -> str:
    part = find_part(tensors)
    if (part and part.role == "vae") or any(mark in tensors for mark in VAE_MARKS):
        return (
            f"{name} holds only a VAE. Register the model that it belongs to; "
            "a transformer is then given its VAE on its page."
        )
    if part or any(key.endswith(mark) for key in tensors for mark in TEXT_ENCODER_MARKS):
        return (
            f"{name} holds only a text encoder. Register the model that it belongs to; "
            "a transformer is then given its text encoders on its page."
        )
    if "emb_params" in tensors or set(tensors) == {"clip_l", "clip_g"}:
        return f"{name} is a textual inversion embedding, which is no base model."
    few = ", ".join(ascii(key)[1:-1][:60] for key in sorted(tensors)[:3]) or "none"
    return f"{name} has {len(tensors):,} tensors that fit none of {', '.join(TITLES.values())}. The first ones: {few}."


def _original_unet(name: str, tensors: Tensors, prefix: str) -> Denoiser | None:
    return _unet(
        name,
        tensors,
        prefix,
        first=f"{prefix}input_blocks.0.0.weight",
        blocks=f"{prefix}input_blocks.",
        extra=f"{prefix}label_emb.0.0.weight",
    )


def _diffusers_unet(name: str, tensors: Tensors, prefix: str) -> Denoiser | None:
    return _unet(
        name,
        tensors,
        prefix,
        first=f"{prefix}conv_in.weight",
        blocks=f"{prefix}down_blocks.",
        extra=f"{prefix}add_embedding.linear_1.weight",
    )


def _unet(name: str, tensors: Tensors, prefix: str, *, first: str, blocks: str, extra: str) -> Denoiser | None:
    attention = next(
        (key for key in sorted(tensors) if key.startswith(blocks) and key.endswith(".attn2.to_k.weight")), None
    )
    if first not in tensors or attention is None or len(tensors[attention].shape) != 2:
        return None
    shape = tensors[first].shape  # (width, channels, 3, 3); a video model has one dimension more
    if len(shape) != 4:
        return None
    if shape[1] != 4:
        raise Unrecognised(_takes_other_input(name, "UNet", shape[1], 4))
    context_size = tensors[attention].shape[1]
    if extra in tensors:
        _refuse_other_conditioned_unets(name, tensors, prefix, context_size)
        return Denoiser("sdxl", "unet", prefix, context_size)
    generation = {768: "sd15", 1024: "sd2"}.get(context_size)
    if generation is None and context_size < 768:
        generation = _by_projection(tensors, attention)
    return Denoiser(generation, "unet", prefix, context_size) if generation else None


def _by_projection(tensors: Tensors, attention: str) -> str:
    """For UNets smaller than any published one: version 2 projects into its attention linearly (2 dimensions),
    version 1 by a convolution (4)."""
    block = attention.partition(".transformer_blocks.")[0]
    projection = tensors.get(f"{block}.proj_in.weight")
    return "sd2" if projection is not None and len(projection.shape) == 2 else "sd15"


def _refuse_other_conditioned_unets(name: str, tensors: Tensors, prefix: str, context_size: int) -> None:
    if context_size == 1280:
        raise Unrecognised(f"{name} is the refiner of Stable Diffusion XL. Register the SDXL base model instead.")
    if context_size in {768, 1024} or f"{prefix}encoder_hid_proj.weight" in tensors:
        raise Unrecognised(
            f"{name} is a UNet with extra conditioning that is not Stable Diffusion XL's (unCLIP, Kolors or the like), "
            "which no trainer here supports."
        )


def _takes_other_input(name: str, network: str, channels: int, expected: int) -> str:
    return (
        f"The {network} of {name} takes {channels} channels instead of {expected}: it is an inpainting, depth, control "
        "or video model. Register the plain model instead."
    )


def _transformer(name: str, tensors: Tensors, prefix: str) -> Denoiser | None:
    if relative := relative_of(tensors, prefix):
        raise Unrecognised(f"{name} is {relative}, which no trainer here supports.")
    known = next((layout for layout in TRANSFORMERS if layout.fits(tensors, prefix)), None)
    if known:
        channels = tensors[f"{prefix}{known.first}"].shape[1]
        if channels != known.channels:
            raise Unrecognised(_takes_other_input(name, "transformer", channels, known.channels))
        note = OPEN_QUESTIONS.get(known.architecture, "")
        return Denoiser(known.architecture, "transformer", prefix, 0, note)
    wan = wan_of(tensors, prefix)
    if wan:
        if not wan.is_usual:
            raise Unrecognised(_takes_other_input(name, "transformer", wan.channels, wan.latent_channels))
        return Denoiser(wan.architecture, "transformer", prefix, 0, wan.note)
    return None
