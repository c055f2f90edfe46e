"""LoRA files of every spelling, as small as they can be: tensors of zeros with the shapes that tell what it is."""

from __future__ import annotations

from tests.models_registry.conftest import write_file


def kohya(*names, rank=4, inside=768, prefix="lora_unet_"):
    shapes = {}
    for name in names:
        shapes[f"{prefix}{name}.lora_down.weight"] = (rank, inside)
        shapes[f"{prefix}{name}.lora_up.weight"] = (inside, rank)
        shapes[f"{prefix}{name}.alpha"] = ()
    return shapes


def peft(*names, rank=4, inside=3072, prefix="transformer.", ending="weight"):
    shapes = {}
    for name in names:
        shapes[f"{prefix}{name}.lora_A.{ending}"] = (rank, inside)
        shapes[f"{prefix}{name}.lora_B.{ending}"] = (inside, rank)
    return shapes


UNET = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SD15 = kohya(UNET) | kohya("text_model_encoder_layers_0_mlp_fc1", prefix="lora_te_")
SDXL = kohya(UNET, inside=2048)


def write_lora(path, shapes=None, *, metadata=None, dtype="F16"):
    return write_file(path, SDXL if shapes is None else shapes, metadata=metadata, dtype=dtype)
