"""Words of the model registry."""

from django.db import models


class Architecture(models.TextChoices):
    SD15 = "sd15", "Stable Diffusion 1.5"
    SD2 = "sd2", "Stable Diffusion 2"
    SDXL = "sdxl", "Stable Diffusion XL"
    SD3 = "sd3", "Stable Diffusion 3"
    FLUX = "flux", "FLUX.1"
    CHROMA = "chroma", "Chroma"
    LUMINA2 = "lumina2", "Lumina Image 2.0"
    HUNYUAN_IMAGE = "hunyuan_image", "HunyuanImage 2.1"
    ANIMA = "anima", "Anima"
    WAN = "wan", "Wan 2.1"
    WAN22 = "wan22", "Wan 2.2"
    QWEN_IMAGE = "qwen_image", "Qwen-Image"
    HIDREAM = "hidream", "HiDream-I1"
    Z_IMAGE = "z_image", "Z-Image"
    FLUX2 = "flux2", "FLUX.2"
    LTX = "ltx", "LTX-Video"
    HUNYUAN_VIDEO = "hunyuan_video", "HunyuanVideo"
    AURAFLOW = "auraflow", "AuraFlow"
    OMNIGEN2 = "omnigen2", "OmniGen2"
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
    CLIP_L = "clip_l", "CLIP-L text encoder"
    CLIP_G = "clip_g", "CLIP-G text encoder"
    T5 = "t5", "T5 text encoder"
    LLM = "llm", "Language model"
    BYT5 = "byt5", "ByT5 text encoder"
    OTHER = "other", "Other"


# What a base model can be given beside its own files, one file or folder of each.
ATTACHABLE = (Role.VAE, Role.CLIP_L, Role.CLIP_G, Role.T5, Role.LLM, Role.BYT5)
# Of these also a folder of the transformers or diffusers kind: config.json beside .safetensors files.
ATTACHABLE_AS_FOLDER = (Role.VAE, Role.T5, Role.LLM)


def describe_role(role: str) -> str:
    """What people call the role, e.g. “CLIP-L text encoder”. Raises ValueError for an unknown one."""
    return str(Role(role).label)


def role_within(role: str) -> str:
    """The same within a sentence: “language model”, but “VAE” and “ByT5 text encoder”. Raises ValueError."""
    first, *others = describe_role(role).split()
    return " ".join([first.lower() if first[1:].islower() else first, *others])


def describe_architecture(architecture: str) -> str:
    """What people call it, e.g. “FLUX.1”; one that has no name here as it is written."""
    return str(Architecture(architecture).label) if architecture in Architecture.values else architecture
