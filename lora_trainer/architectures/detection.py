"""What a base model is, from its JSON files and the names and shapes of its tensors. Torch-free; takes milliseconds.

Names of files prove nothing. Every refusal is a ModelError: what is wrong, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.errors import ModelError
from lora_trainer.safetensors_header import Header, HeaderError, Tensor, read_header

Tensors = Mapping[str, Tensor]

WANTED = "Choose an SD 1.5, SD 2 or SDXL model: a folder in diffusers' layout or one .safetensors file."
AGAIN = "Copy or download the model again."
NOT_TRAINED = "which is not trained by the built-in trainer; choose Kohya."

# diffusers folders
SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SDXL_PARTS = (*SD_PARTS, "text_encoder_2", "tokenizer_2")
PARTS = {"StableDiffusionPipeline": SD_PARTS, "StableDiffusionXLPipeline": SDXL_PARTS}
ELSEWHERE = {"StableDiffusion3Pipeline": "a Stable Diffusion 3 model", "FluxPipeline": "a FLUX.1 model"}
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"
WEIGHTS = {
    "unet": DIFFUSERS_WEIGHTS,
    "vae": DIFFUSERS_WEIGHTS,
    "text_encoder": TRANSFORMERS_WEIGHTS,
    "text_encoder_2": TRANSFORMERS_WEIGHTS,
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

# single files
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
VAE_MARK = "decoder.conv_in.weight"
FIRST_CONVOLUTION = "input_blocks.0.0.weight"
EXTRA_CONDITIONING = "label_emb.0.0.weight"
LORA_MARKS = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.", ".hada_w1_", ".lokr_w")
CONTROLNET_MARKS = ("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_down_blocks.")
FLUX_MARKS = ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight")
SD3_MARKS = ("joint_blocks.0.x_block.attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight")
DIFFUSERS_UNET_MARK = "down_blocks.0.resnets.0.conv1.weight"
TEXT_ENCODER_MARKS = (
    "encoder.layers.0.self_attn.q_proj.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
)
V_PREDICTION_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Empty tensors that SDXL checkpoints carry when they predict velocity and end in pure noise."""


CONFIGS = Path(__file__).parent.parent / "assets" / "configs"
"""What the published models look like, for single files, which do not say it themselves."""


def unet_config(path: Path) -> dict[str, Any]:
    """The UNet's configuration, without its weights."""
    key = detect(path, has_vae=True)
    return _read_json(path / "unet" / "config.json" if path.is_dir() else CONFIGS / key / "unet.json", path)


def detect(path: Path, *, has_vae: bool) -> str:
    """sd15, sd2 or sdxl. `has_vae`: the model's own VAE is not needed."""
    if path.is_dir():
        return _detect_folder(path)
    return _detect_file(path, _header("base model", path), has_vae=has_vae)


def check_vae(path: Path) -> None:
    """Raise ModelError when this is no VAE: a diffusers folder (or a model's, with one in it) or one file."""
    if not path.is_dir():
        names = _header("VAE", path).tensors
        if VAE_MARK not in names and VAE_PREFIX + VAE_MARK not in names:
            raise ModelError(f"The VAE {path} holds no VAE. Choose another file, or leave 'vae' empty.")
        return
    folder = vae_folder(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"The VAE {path} has no config.json. Choose a VAE in diffusers' layout or one .safetensors file."
        )
    _check_weights("VAE", path, folder, DIFFUSERS_WEIGHTS)


def vae_folder(path: Path) -> Path:
    """The folder of the VAE itself, also when `path` is a whole model."""
    return path / "vae" if (path / "vae").is_dir() else path


def weights_variant(part: Path, stem: str) -> str | None:
    """'fp16' when a part's folder holds only half-precision files under their variant name."""
    is_plain = any((part / f"{stem}.safetensors{ending}").exists() for ending in ("", ".index.json"))
    return "fp16" if not is_plain and any(part.glob(f"{stem}*fp16*.safetensors")) else None


def prediction_facts(path: Path) -> dict[str, Any]:
    """What a single file says about its noise schedule, as keys of a scheduler's configuration."""
    header = _header("base model", path)
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    facts: dict[str, Any] = {}
    if stated in ("epsilon", "v", "v_prediction"):
        facts["prediction_type"] = "epsilon" if stated == "epsilon" else "v_prediction"
    if V_PREDICTION_MARK in header.tensors:
        facts["prediction_type"] = "v_prediction"
    if ZERO_SNR_MARK in header.tensors:
        facts |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return facts


def _detect_folder(folder: Path) -> str:
    index = _read_json(folder / "model_index.json", folder)
    name = str(index.get("_class_name"))
    if name in ELSEWHERE:
        raise ModelError(f"The base model {folder} is {ELSEWHERE[name]}, {NOT_TRAINED}")
    if name not in PARTS:
        raise ModelError(f"The base model {folder} is a {name[:60]}, which cannot be trained here. {WANTED}")
    for part in PARTS[name]:
        if not (folder / part).is_dir():
            raise ModelError(f"The base model {folder} lacks its folder '{part}'. {AGAIN}")
    unet = _read_json(folder / "unet" / "config.json", folder)
    _check_channels(folder, unet.get("in_channels", 4))
    for part in PARTS[name]:
        if part in WEIGHTS:
            _read_json(folder / part / "config.json", folder)
            _check_weights("base model", folder, folder / part, WEIGHTS[part])
    is_sdxl = unet.get("addition_embed_type") == "text_time"
    if is_sdxl != (name == "StableDiffusionXLPipeline") or unet.get("class_embed_type"):
        raise ModelError(f"The base model {folder} has a UNet of another kind than its {name} needs. {WANTED}")
    return "sdxl" if is_sdxl else _generation(unet)


def _generation(unet: Mapping[str, Any]) -> str:
    """By the width of the text embedding; for a UNet unlike the published ones by what else version 2 changed."""
    known = {768: "sd15", 1024: "sd2"}.get(unet.get("cross_attention_dim", 0))
    return known or ("sd2" if unet.get("use_linear_projection") else "sd15")


def _check_weights(what: str, model: Path, part: Path, stem: str) -> None:
    variant = weights_variant(part, stem)
    files = sorted(part.glob("*.safetensors"))
    wanted = [file for file in files if file.name.startswith(stem) and (variant is None or variant in file.name)]
    if not wanted:
        pickles = sorted(file.name for file in part.glob("*") if file.suffix.lower() in PICKLES)
        found = f"only a pickle file ({pickles[0]}), which can run any program when it is opened" if pickles else "none"
        raise ModelError(f"The {what} {model} needs {part.name}/{stem}.safetensors, but there is {found}. {AGAIN}")
    for file in wanted:
        _header(what, file)


def _check_channels(path: Path, channels: Any) -> None:
    if channels != 4:
        kind = "an inpainting model" if channels == 9 else "a depth, upscaling or video model"
        raise ModelError(
            f"The base model {path} is {kind}: its UNet takes {channels} channels instead of 4. "
            "Choose the plain model that it comes from."
        )


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        missing = path.relative_to(folder)
        raise ModelError(
            f"The base model {folder} has no {missing}, so it is no whole diffusers folder. {WANTED}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The base model {folder} is damaged: {path.name} cannot be read ({error}). {AGAIN}"
        ) from error
    return content if isinstance(content, dict) else {}


def _header(what: str, path: Path) -> Header:
    if not path.exists():
        raise ModelError(f"The {what} {path} does not exist. Check the path.")
    try:
        if path.is_file():
            _refuse_pickle(what, path)
        return read_header(path)
    except HeaderError as error:
        raise ModelError(f"The {what} {path} cannot be used: {error}") from error
    except OSError as error:
        raise ModelError(f"The {what} {path} cannot be read: {error.strerror}.") from error


def _refuse_pickle(what: str, path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(9)
    # a .safetensors file starts with the length of its header, which may look like anything, and the header's brace
    is_pickle = first.startswith((b"PK\x03\x04", b"\x80\x02")) and first[8:] != b"{"
    if path.suffix.lower() in PICKLES or is_pickle:
        raise ModelError(
            f"The {what} {path} is a pickle file, which can run any program when it is opened. "
            "Convert it to .safetensors, or get the .safetensors version of this model."
        )


def _detect_file(path: Path, header: Header, *, has_vae: bool) -> str:
    tensors = header.tensors
    _refuse_other_kinds(path, tensors)
    first = tensors.get(UNET_PREFIX + FIRST_CONVOLUTION)
    if first is None or len(first.shape) != 4:
        raise ModelError(f"The base model {path} {_what_it_is_instead(tensors)}. {WANTED}")
    _check_channels(path, first.shape[1])
    key = _by_text_encoders(path, tensors)
    if not has_vae and VAE_PREFIX + VAE_MARK not in tensors:
        raise ModelError(f"The base model {path} holds no VAE. Choose the full checkpoint, or give one with 'vae'.")
    return key


def _by_text_encoders(path: Path, tensors: Tensors) -> str:
    def holds(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    has_extra = UNET_PREFIX + EXTRA_CONDITIONING in tensors
    if has_extra and holds("conditioner.embedders.0.model."):
        raise ModelError(f"The base model {path} is SDXL's refiner. Choose the SDXL base model.")
    if has_extra and holds("conditioner.embedders.0.transformer.") and holds("conditioner.embedders.1.model."):
        return "sdxl"
    if has_extra and holds("cond_stage_model."):
        raise ModelError(f"The base model {path} has extra conditioning (unCLIP or the like). {WANTED}")
    if not has_extra and holds("cond_stage_model.transformer."):
        return "sd15"
    if not has_extra and holds("cond_stage_model.model."):
        return "sd2"
    raise ModelError(
        f"The base model {path} holds a UNet without its text encoders. "
        "Choose the full checkpoint, or the diffusers folder that it belongs to."
    )


def _refuse_other_kinds(path: Path, tensors: Tensors) -> None:
    """What also has the tensors of a UNet, or none at all, and has a name of its own."""
    for marks, sentence in (
        (LORA_MARKS, "is a LoRA. Choose the base model that it was trained on."),
        (CONTROLNET_MARKS, "is a ControlNet. Choose the base model that it steers."),
        ((".bitsandbytes__",), "is quantised with bitsandbytes. Choose the 16-bit version of this model."),
        (("edm_mean", "edm_vpred."), "uses an EDM noise schedule, which cannot be trained here. Choose another model."),
        (FLUX_MARKS, f"is a FLUX.1 model, {NOT_TRAINED}"),
        (SD3_MARKS, f"is a Stable Diffusion 3 model, {NOT_TRAINED}"),
    ):
        if any(mark in name for name in tensors for mark in marks):
            raise ModelError(f"The base model {path} {sentence}")


def _what_it_is_instead(tensors: Tensors) -> str:
    if any(DIFFUSERS_UNET_MARK in name for name in tensors) or FIRST_CONVOLUTION in tensors:
        return "holds only a UNet"
    if any(name in tensors for name in (VAE_MARK, VAE_PREFIX + VAE_MARK)):
        return "holds only a VAE"
    if any(name.endswith(mark) for name in tensors for mark in TEXT_ENCODER_MARKS):
        return "holds only a text encoder"
    few = ", ".join(ascii(name)[1:-1][:60] for name in sorted(tensors)[:3]) or "none"
    return f"has {len(tensors):,} tensors that fit none of the known models (the first: {few})"
