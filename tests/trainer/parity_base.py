"""The base models of the comparison with sd-scripts: true SDXL and SD 1.5 topology at a twentieth of the width.

Their weights are not stored. Each tensor comes from NumPy's RandomState, whose numbers NumPy promises never to change,
and its seed from the tensor's name; so the side of sd-scripts built the same models by the same rule.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ASSETS = Path(__file__).resolve().parents[2] / "lora_trainer" / "assets"
TINY = ASSETS / "pilot-tiny"  # lends its tokenizers and VAE; the VAE is never used
KINDS = ("sdxl", "sd15")

_UNET = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 4}
UNETS = {
    "sdxl": _UNET
    | {
        "block_out_channels": [16, 32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 40,
        "attention_head_dim": [2, 4, 8],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 24 + 6 * 256,
    },
    "sd15": _UNET
    | {
        "block_out_channels": [16, 32, 64, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
    },
}
_CLIP = {"vocab_size": 627, "num_hidden_layers": 3, "bos_token_id": 625, "eos_token_id": 626, "pad_token_id": 626}
_SMALL = _CLIP | {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
_LARGE = _CLIP | {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "projection_dim": 24}
TEXT_ENCODERS = {
    "sdxl": {
        "text_encoder": ("CLIPTextModel", _SMALL),
        "text_encoder_2": ("CLIPTextModelWithProjection", _LARGE | {"hidden_act": "gelu"}),
    },
    "sd15": {"text_encoder": ("CLIPTextModel", _LARGE | {"hidden_act": "quick_gelu"})},
}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon",
}  # fmt: skip


def tensor(name: str, shape: tuple[int, ...], *, strength: float = 1.0) -> torch.Tensor:
    """What belongs to this name: weights with the variance strength² / inputs, norms around 1, biases around 0."""
    drawn = 2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 1
    if len(shape) > 1:
        drawn *= strength * np.sqrt(3 / np.prod(shape[1:]))
    else:
        drawn = 0.2 * drawn + ("norm" in name and name.endswith("weight"))
    return torch.from_numpy(drawn.astype(np.float32))


def lora_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A LoRA tensor before the first step, by its name in Kohya's file. `up` is not zero, so that everything moves."""
    return tensor(name, shape, strength=1.0 if "lora_down" in name else 0.3)


def write_base(kind: str, folder: Path) -> Path:
    """The model as a diffusers folder, its tensors named as in published ones."""
    pipeline = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {part: ["transformers", name] for part, (name, _) in TEXT_ENCODERS[kind].items()}
    parts |= {
        part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in TEXT_ENCODERS[kind]
    }
    parts["scheduler"] = ["diffusers", "DDIMScheduler"]
    _write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.42.0"} | parts)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_unet(kind, folder / "unet")
    for part, (name, config) in TEXT_ENCODERS[kind].items():
        _write_text_encoder(f"{kind}/{part}", folder / part, name, config)
        tokenizer = part.replace("text_encoder", "tokenizer")
        (folder / tokenizer).symlink_to(TINY / tokenizer)
    (folder / "vae").symlink_to(TINY / "vae")
    return folder


def _write_unet(kind: str, folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in UNet2DConditionModel(**UNETS[kind]).state_dict().items()}
    _write_json(folder / "config.json", {"_class_name": "UNet2DConditionModel", **UNETS[kind]})
    weights = {name: tensor(f"{kind}/unet/{name}", shape) for name, shape in shapes.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _write_text_encoder(prefix: str, folder: Path, name: str, config: dict) -> None:
    import transformers

    with torch.device("meta"):
        encoder = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    # libraries have called the transformer's own part differently over the years; published files all call it so
    shapes = {
        own if own.startswith("text_projection") else f"text_model.{own.removeprefix('text_model.')}": tuple(one.shape)
        for own, one in encoder.state_dict().items()
        if not own.endswith("position_ids")
    }
    _write_json(folder / "config.json", {"architectures": [name], "model_type": "clip_text_model", **config})
    weights = {one: tensor(f"{prefix}/{one}", shape) for one, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def projections(name: str, weights: torch.Tensor) -> np.ndarray:
    """Sums of all the tensor's numbers with four sets of random signs. Of a difference between two tensors, the mean of
    their squares is an estimate of its squared length, so these stand for the tensor itself."""
    signs = 2 * np.random.RandomState(zlib.crc32(name.encode())).randint(0, 2, (4, weights.numel())) - 1
    return signs @ weights.double().flatten().numpy()


def base_digest(folder: Path) -> str:
    """Of all weights of the UNet and the text encoders."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("unet/*.safetensors"), *folder.glob("text_encoder*/*.safetensors")]):
        weights = load_file(path)
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].numpy().tobytes())
    return digest.hexdigest()
