"""Sample pictures in the middle of training, without touching anything that training depends on.

Each picture is drawn alone from its own seed, so StableDiffusionXLPipeline draws the same one from the saved LoRA.
"""

import io
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lora_trainer.config import SamplePrompt


def draw_sample(pipeline: Any, sample: SamplePrompt, accelerator: Accelerator) -> Image.Image:
    """One picture with the LoRA as it is now. The UNet is back in its former mode afterwards, and no RNG has moved."""
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    try:
        # fork_rng: no scheduler of today draws from the global generator, but dropout does, and resuming must be exact
        with torch.no_grad(), torch.random.fork_rng(), accelerator.autocast():
            latents = _latents(pipeline, sample)
        return _decode(pipeline, latents)
    finally:
        pipeline.unet.train(was_training)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _latents(pipeline: Any, sample: SamplePrompt) -> Tensor:
    latents: Tensor = pipeline(
        prompt=sample.prompt,
        # None, not "": then the pipeline uses what the base model was trained with for "no prompt"
        negative_prompt=sample.negative_prompt or None,
        width=sample.width,
        height=sample.height,
        num_inference_steps=sample.steps,
        guidance_scale=sample.scale,
        generator=torch.Generator("cpu").manual_seed(sample.seed),
        output_type="latent",
    ).images
    return latents


@torch.no_grad()
def _decode(pipeline: Any, latents: Tensor) -> Image.Image:
    # outside autocast: the VAE works in float32
    scaled = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
    decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
    image: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    return image
