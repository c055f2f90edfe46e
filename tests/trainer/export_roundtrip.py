"""Run as a script: save a LoRA on all parts of pilot-tiny in both formats, load each into a plain pipeline, compare.

Arguments: base model folder, folder for the files. Prints one JSON object: names that the architectures give to
full-size modules, and for each format what diffusers made of the file.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer

from lora_trainer import adapter, export
from lora_trainer.architectures import load_base_model, sd, sdxl
from lora_trainer.architectures.base import LoadOptions
from lora_trainer.config import from_table
from lora_trainer.layouts import full_size

base, folder = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)


def names(key):
    layout = full_size(key)
    model_class = sdxl.StableDiffusionXL if key == "sdxl" else sd.StableDiffusion
    model = SimpleNamespace(key=key, unet=SimpleNamespace(config=layout.unet_config))
    return {
        f"{part} {path}": model_class.file_name(model, part, path)
        for part, modules in layout.parts.items()
        for path in modules
    }


def config(**changes):
    options = {"pretrained_model_name_or_path": str(base), "train_data_dir": "pictures", "output_dir": str(folder)}
    return from_table(options | {"save_precision": "float"} | changes)


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red circle on a blue background",
        num_inference_steps=2,
        guidance_scale=3.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]


def parts(pipeline):
    return {"unet": pipeline.unet, "te1": pipeline.text_encoder, "te2": pipeline.text_encoder_2}


options = LoadOptions(
    path=base,
    vae=None,
    device=torch.device("cpu"),
    dtype=torch.float32,
    max_token_length=75,
    clip_skip=0,
    v_parameterization=None,
)
model = load_base_model(options)
without = draw(model.pipeline)
network = {
    "network_dim": 4,
    "network_alpha": 1.5,
    "network_args": ["conv_dim=2", "conv_alpha=3", "network_reg_dims=mlp=2"],
}
pairs = adapter.add_lora(model, config(**network))
for number, pair in enumerate(pairs):
    generator = torch.Generator().manual_seed(number)
    pair.up.data = torch.randn(pair.up.shape, generator=generator) * 0.05
ours = draw(model.pipeline)
expected = {(pair.part, pair.name): pair.alpha / pair.rank for pair in pairs}
plain = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
found = {}
for kind in ("safetensors", "diffusers"):
    tensors, metadata = export.lora_file(pairs, config(save_model_as=kind), {"ss_v2": "False"})
    path = folder / f"{kind}.safetensors"
    export.write_lora(path, tensors, metadata)
    plain.load_lora_weights(str(path))
    scales = {
        (part, name): next(iter(layer.scaling.values()))
        for part, module in parts(plain).items()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }
    found[kind] = {
        "modules": len(scales),
        "same_scales": scales == expected,
        "difference": float(np.abs(draw(plain) - ours).max()),
    }
    plain.unload_lora_weights()
report = {
    "names": {key: names(key) for key in ("sd15", "sdxl")},
    "formats": found,
    "scales": sorted(set(expected.values())),
    "effect": float(np.abs(ours - without).max()),
}
sys.stdout.write(json.dumps(report) + "\n")
