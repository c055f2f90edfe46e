"""Run as a script: load a saved LoRA into a plain diffusers pipeline, draw, and say what was loaded as JSON.

Arguments: base model folder, LoRA file, picture to write, prompt, seed, size in pixels, steps, guidance scale.
"""

import json
import sys

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer

base, file, picture, prompt, seed, size, steps, scale = sys.argv[1:]
torch.set_num_threads(1)
pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
pipeline.load_lora_weights(file)
layers = [module for module in pipeline.unet.modules() if isinstance(module, LoraLayer)]
name = next(iter(layers[0].lora_A))
images = pipeline(
    prompt,
    num_inference_steps=int(steps),
    guidance_scale=float(scale),
    width=int(size),
    height=int(size),
    generator=torch.Generator().manual_seed(int(seed)),
).images
images[0].save(picture)
scales = sorted({(module.r[name], module.scaling[name]) for module in layers})
sys.stdout.write(json.dumps({"layers": len(layers), "scales": scales}) + "\n")
