"""Sample pictures in the middle of training, without touching anything that training depends on.

Each picture is drawn alone from its own seed, so the diffusers pipeline draws the same one from the saved LoRA.
"""

import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lora_trainer.architectures.base import BaseModel, Conditioning
from lora_trainer.prompts import SamplePrompt

# config.SAMPLERS → diffusers' scheduler; "" is the model's own
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


def draw_sample(model: BaseModel, sample: SamplePrompt, accelerator: Accelerator, sampler: str = "") -> Image.Image:
    """One picture with the LoRA as it is now. The modules are back in their former mode afterwards, no RNG has moved.

    `sampler` is one of config.SAMPLERS.
    """
    # fork_rng: no scheduler of today draws from the global generator, but dropout does, and resuming must be exact
    with _for_drawing(model, sampler), torch.no_grad(), torch.random.fork_rng():
        with accelerator.autocast():
            latents = _latents(model, sample)
        return _decode(model, latents)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_scheduler(model: BaseModel, sampler: str) -> Any:
    """A fresh scheduler on the model's noise schedule."""
    own = type(model.pipeline.scheduler)
    scheduler_class = getattr(diffusers, SCHEDULERS[sampler]) if sampler else own
    # some schedulers clip to ±1 unless told otherwise, which is for pixels
    changes: dict[str, Any] = {"clip_sample": False}
    if model.scheduler_config.get("rescale_betas_zero_snr"):
        # any other spacing would leave out the last timestep, the one of pure noise
        changes |= {"timestep_spacing": "trailing", **_zero_snr(scheduler_class, model.scheduler_config)}
    return scheduler_class.from_config(model.scheduler_config, **changes)


def _zero_snr(scheduler_class: Any, config: Any) -> dict[str, Any]:
    """How to tell a scheduler of a schedule that ends in pure noise: by the option, or by all the betas."""
    if "rescale_betas_zero_snr" in inspect.signature(scheduler_class).parameters:
        return {"rescale_betas_zero_snr": True}
    euler: Any = diffusers.EulerDiscreteScheduler
    kept = euler.from_config(config, rescale_betas_zero_snr=True).alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    return {"trained_betas": (1 - kept / before).tolist()}


@contextmanager
def _for_drawing(model: BaseModel, sampler: str) -> Iterator[None]:
    """All modules in eval mode (dropout in a LoRA would blur the picture), and the sampler in the pipeline."""
    scheduler = model.pipeline.scheduler
    modes = [(module, module.training) for module in model.parts().values()]
    model.pipeline.scheduler = make_scheduler(model, sampler)
    try:
        for module, _ in modes:
            module.eval()
        yield
    finally:
        for module, was_training in modes:
            module.train(was_training)
        model.pipeline.scheduler = scheduler


def _latents(model: BaseModel, sample: SamplePrompt) -> Tensor:
    # encoded as in training: the pipelines would cut long prompts and know nothing of clip_skip
    prompt = model.encode(model.tokenize([sample.prompt]))
    negative = _negative(model, sample.negative_prompt, prompt)
    embeddings: dict[str, Tensor | None] = {
        "prompt_embeds": prompt.sequence,
        "negative_prompt_embeds": negative.sequence,
    }
    if prompt.pooled is not None:
        embeddings |= {"pooled_prompt_embeds": prompt.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    latents: Tensor = model.pipeline(
        **embeddings,
        width=sample.width,
        height=sample.height,
        num_inference_steps=sample.steps,
        guidance_scale=sample.scale,
        generator=torch.Generator("cpu").manual_seed(sample.seed),
        output_type="latent",
    ).images
    return latents


def _negative(model: BaseModel, text: str, prompt: Conditioning) -> Conditioning:
    """An empty one is what the base model was trained with for "no prompt": zeros for most SDXL models."""
    if text or not model.pipeline.config.get("force_zeros_for_empty_prompt") or prompt.pooled is None:
        return model.encode(model.tokenize([text]))
    return Conditioning(torch.zeros_like(prompt.sequence), torch.zeros_like(prompt.pooled))


def _decode(model: BaseModel, latents: Tensor) -> Image.Image:
    # outside autocast: the VAE works in float32
    scaled = latents.to(model.vae.dtype) / model.vae.config.scaling_factor
    decoded = model.vae.decode(scaled, return_dict=False)[0]
    image: Image.Image = model.pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    return image
