"""Real, tiny model files, written at test time: a checkpoint's tensors with the shapes that tell what it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import lora_trainer

ASSETS = Path(lora_trainer.__file__).parent / "assets"
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "U8": 1}


def write_file(path, shapes, *, dtype="F16", metadata=None):
    """A .safetensors file of zeros with tensors of these shapes."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return write_raw(path, json.dumps(header).encode(), data_bytes=offset)


def write_raw(path, header, *, data_bytes=0, length=None):
    """Any bytes as the header, a length that may lie, and data without using disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = (len(header) if length is None else length).to_bytes(8, "little") + header
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(len(start) + data_bytes)
    return path


def original_unet(context, *, channels=4, linear=False, label=None):
    unet = {
        "model.diffusion_model.input_blocks.0.0.weight": (8, channels, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8) if linear else (8, 8, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, context),
    }
    if label:
        unet["model.diffusion_model.label_emb.0.0.weight"] = (8, label)
    return unet


VAE = {"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3)}
SD15 = original_unet(768) | VAE | {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,)}
SD2 = original_unet(1024, linear=True) | VAE | {"cond_stage_model.model.ln_final.weight": (8,)}
SDXL = (
    original_unet(2048, linear=True, label=2816)
    | VAE
    | {
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (8,),
        "conditioner.embedders.1.model.ln_final.weight": (8,),
    }
)
SD3 = {
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (24, 8),
    "model.diffusion_model.context_embedder.weight": (8, 16),
    "model.diffusion_model.x_embedder.proj.weight": (8, 16, 2, 2),
}
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "vector_in.in_layer.weight": (8, 16),
    "txt_in.weight": (8, 16),
    "img_in.weight": (8, 64),
}
DIFFUSERS_UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 2048),
    "add_embedding.linear_1.weight": (8, 2816),
}


@pytest.fixture
def models(workspace):
    """The models folder of an empty workspace."""
    folder = workspace / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def tiny(models):
    """pilot-tiny's files in the models folder, not registered; free to be damaged."""
    shutil.copytree(ASSETS / "pilot-tiny", models / "tiny")
    return models / "tiny"


@pytest.fixture
def edit_json():
    def edit(path, **changes):
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


@pytest.fixture
def hub(models, settings, monkeypatch):
    """A hub and its storage on this machine, which pulls may ask; nobody waits before another try."""
    from models_registry import downloads_http
    from tests.models_registry.hub import running_hub

    monkeypatch.setattr(downloads_http, "PAUSES", (0,) * 5)
    with running_hub() as hub:
        settings.HF_ENDPOINT = hub.address
        settings.DOWNLOAD_LOCAL_HOSTS = [hub.host, hub.storage_host]
        yield hub


@pytest.fixture
def manifest_of(settings, tmp_path):
    """manifest_of("a line", …): the installation's manifest has these lines."""
    path = tmp_path / "models.manifest"
    settings.MODELS_MANIFEST = path

    def write(*lines):
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    write()
    return write
