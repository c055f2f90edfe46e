"""What a file or folder that is only a part of a model is: a VAE or a text encoder, read from its headers.

As in recognition.py: no Django, no torch, names of files prove nothing, milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.safetensors_header import Header, Tensor
from models_registry import tensor_layouts
from models_registry.part_layouts import find_part
from models_registry.recognition import Unrecognised, header_of, is_pickle, pickle_sentence

# What a diffusers folder calls its text encoders → what they are, by architecture.
FOLDER_ENCODERS: Mapping[str, Mapping[str, str]] = {
    "sd15": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5"},
    "chroma": {"text_encoder": "t5"},
    "lumina2": {"text_encoder": "llm"},
    "hunyuan_image": {"text_encoder": "llm", "text_encoder_2": "byt5"},
    "wan": {"text_encoder": "t5"},
    "wan22": {"text_encoder": "t5"},
    "qwen_image": {"text_encoder": "llm"},
    "hidream": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"},
    "z_image": {"text_encoder": "llm"},
    "flux2": {"text_encoder": "llm"},
    "ltx": {"text_encoder": "t5"},
    "hunyuan_video": {"text_encoder": "llm", "text_encoder_2": "clip_l"},
    "auraflow": {"text_encoder": "t5"},
}


@dataclass(frozen=True)
class RecognisedPart:
    """One part. Of a folder, `bytes` counts the files that `part_files` names."""

    role: str
    title: str
    bytes: int
    dtype: str
    parameters: int


def recognise_part(path: Path) -> RecognisedPart:
    """What part of a model the .safetensors file or the folder is. Raises Unrecognised with a sentence."""
    if path.is_dir():
        return _recognise_folder(path)
    if is_pickle(path.name):
        remedy = "Convert it to .safetensors, or get the .safetensors version."
        raise Unrecognised(f"{pickle_sentence(path.name)} {remedy}")
    if path.suffix.lower() != ".safetensors":
        raise Unrecognised(f"{path.name} is no .safetensors file.")
    if is_sharded(file.name for file in path.parent.iterdir()):
        raise Unrecognised(f"{path.name} is one of several pieces. Name the folder {path.parent.name} instead.")
    header = header_of(path)
    return _named(path.name, header.tensors, header.file_bytes)


def part_files(folder: Path) -> list[Path]:
    """What belongs to a part that is a folder: its configuration and weights, by name."""
    files = {folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")}
    return sorted(file for file in files if file.is_file())


def is_part_folder(names: list[str]) -> bool:
    """Whether a folder with files of these names may be a part as a whole."""
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def is_sharded(names: Iterable[str]) -> bool:
    """Whether the weights among files of these names are pieces of one whole."""
    return any(name.endswith(".safetensors.index.json") for name in names)


def _recognise_folder(folder: Path) -> RecognisedPart:
    files = part_files(folder)
    if not is_part_folder([file.name for file in files]):
        raise Unrecognised(
            f"{folder.name} is no folder of a text encoder or a VAE: "
            "it needs a config.json and the weights as .safetensors."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors |= header_of(file).tensors
    return _named(folder.name, tensors, sum(file.stat().st_size for file in files))


def _named(name: str, tensors: Mapping[str, Tensor], size: int) -> RecognisedPart:
    tensor_layouts.refuse_others(name, tensors)
    found = find_part(tensors)
    if found is None:
        raise Unrecognised(
            f"{name} is no part of a model that is known here: VAE, CLIP-L, CLIP-G, T5 or UMT5, ByT5, "
            "or a language model (Gemma, Qwen, Llama, Mistral)."
        )
    header = Header(metadata={}, tensors=tensors, file_bytes=size)
    return RecognisedPart(found.role, found.title, size, header.dtype, header.parameters)
