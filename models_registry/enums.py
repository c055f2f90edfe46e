"""Words of the model registry."""

from django.db import models


class Architecture(models.TextChoices):
    SD15 = "sd15", "Stable Diffusion 1.5"
    SD2 = "sd2", "Stable Diffusion 2"
    SDXL = "sdxl", "Stable Diffusion XL"
    SD3 = "sd3", "Stable Diffusion 3"
    FLUX = "flux", "FLUX.1"
    UNKNOWN = "unknown", "Not recognised"


class Layout(models.TextChoices):
    FOLDER = "folder", "Diffusers folder"
    FILE = "file", "Single file"


class Role(models.TextChoices):
    CHECKPOINT = "checkpoint", "Checkpoint"
    UNET = "unet", "UNet"
    TRANSFORMER = "transformer", "Transformer"
    VAE = "vae", "VAE"
    TEXT_ENCODER = "text_encoder", "Text encoder"
    TEXT_ENCODER_2 = "text_encoder_2", "Text encoder 2"
    TEXT_ENCODER_3 = "text_encoder_3", "Text encoder 3"
    TOKENIZER = "tokenizer", "Tokenizer"
    TOKENIZER_2 = "tokenizer_2", "Tokenizer 2"
    SCHEDULER = "scheduler", "Scheduler"
    OTHER = "other", "Other"
