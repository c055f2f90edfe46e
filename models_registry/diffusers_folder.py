"""A diffusers folder: model_index.json names the parts, each has a folder with its configuration and weights.

Everything is read inside the folder under fixed names; what the JSON files say is checked against the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from lora_trainer.safetensors_header import Header, Tensor
from models_registry import tensor_layouts
from models_registry.part_layouts import is_vae
from models_registry.recognition import (
    DEFAULT_PREDICTION,
    DEFAULT_RESOLUTION,
    PREDICTION_TYPES,
    RESOLUTIONS,
    TITLES,
    Component,
    Part,
    Recognised,
    Unrecognised,
    header_of,
    is_pickle,
    part_of,
)
from models_registry.tensor_layouts import Denoiser

MAX_JSON_BYTES = 16 * 1024**2
UNET_PIPELINE = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TWO_ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
ONE_ENCODER = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
# Pipeline class → architectures that it can be, and the parts that it cannot do without.
PIPELINES = {
    "StableDiffusionPipeline": (("sd15", "sd2"), UNET_PIPELINE),
    "StableDiffusionXLPipeline": (("sdxl",), ("unet", *TWO_ENCODERS)),
    "StableDiffusion3Pipeline": (("sd3",), ("transformer", *TWO_ENCODERS)),
    "FluxPipeline": (("flux",), ("transformer", *TWO_ENCODERS)),
    "ChromaPipeline": (("chroma",), ONE_ENCODER),
    "Lumina2Pipeline": (("lumina2",), ONE_ENCODER),
    "Lumina2Text2ImgPipeline": (("lumina2",), ONE_ENCODER),  # its first name
    "HunyuanImagePipeline": (("hunyuan_image",), ("transformer", *TWO_ENCODERS)),
    "WanPipeline": (("wan", "wan22"), ONE_ENCODER),
    "WanImageToVideoPipeline": (("wan", "wan22"), ONE_ENCODER),
    "QwenImagePipeline": (("qwen_image",), ONE_ENCODER),
    "HiDreamImagePipeline": (("hidream",), ("transformer", *TWO_ENCODERS, "text_encoder_3", "tokenizer_3")),
    "ZImagePipeline": (("z_image",), ONE_ENCODER),
    "Flux2Pipeline": (("flux2",), ONE_ENCODER),
    "Flux2KleinPipeline": (("flux2",), ONE_ENCODER),
    "LTXPipeline": (("ltx",), ONE_ENCODER),
    "LTXConditionPipeline": (("ltx",), ONE_ENCODER),
    "HunyuanVideoPipeline": (("hunyuan_video",), ("transformer", *TWO_ENCODERS)),
    "AuraFlowPipeline": (("auraflow",), ONE_ENCODER),
    "OmniGen2Pipeline": (("omnigen2",), ("transformer", "vae", "mllm", "processor", "scheduler")),
}
# What the configuration of the transformer calls itself. UNets are all called the same.
TRANSFORMER_CLASSES = {
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "lumina2": "Lumina2Transformer2DModel",
    "hunyuan_image": "HunyuanImageTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "wan22": "WanTransformer3DModel",
    "qwen_image": "QwenImageTransformer2DModel",
    "hidream": "HiDreamImageTransformer2DModel",
    "z_image": "ZImageTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "hunyuan_video": "HunyuanVideoTransformer3DModel",
    "auraflow": "AuraFlowTransformer2DModel",
    "omnigen2": "OmniGen2Transformer2DModel",
}
# Whose `sample_size` times the VAE's factor is the size of the pictures that it was trained on.
STATES_ITS_SIZE = {"sd15", "sd2", "sdxl", "sd3", "flux", "lumina2"}
# Part → role. Parts that are not listed (safety checkers, image encoders) play no role in training.
ROLES = {
    "unet": "unet",
    "transformer": "transformer",
    "transformer_2": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "text_encoder_4": "llm",
    "mllm": "llm",
    "tokenizer": "tokenizer",
    "tokenizer_2": "tokenizer_2",
    "tokenizer_3": "other",
    "tokenizer_4": "other",
    "processor": "tokenizer",
    "scheduler": "scheduler",
}
PART_TITLES = {
    "unet": "UNet",
    "transformer": "Transformer",
    "transformer_2": "Transformer 2",
    "vae": "VAE",
    "text_encoder": "Text encoder",
    "text_encoder_2": "Text encoder 2",
    "text_encoder_3": "Text encoder 3",
    "text_encoder_4": "Text encoder 4",
    "mllm": "Language model",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_WHOLE = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"tokenizer.model"})


def recognise_folder(folder: Path, *, root: Path) -> Recognised:
    """What the diffusers folder is. Raises Unrecognised with a sentence when it cannot be trained on."""
    return _Folder(folder, root).recognise()


class _Folder:
    """One reading of a folder: collects its components while it checks them."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root.resolve()
        self.components: list[Component] = []
        self.parts: list[Part] = []
        self.notes: list[str] = []

    def recognise(self) -> Recognised:
        if not (self.folder / "model_index.json").exists():
            raise Unrecognised(
                f"{self.folder.name} is no diffusers folder: it has no model_index.json. "
                "Register a folder that has one, or a single .safetensors file."
            )
        index = self._json("model_index.json", role="other")
        architectures, required = self._pipeline(index)
        tensors = {part: self._part(part) for part in self._listed_parts(index, required)}
        denoiser, metadata = self._denoiser(required[0], tensors, architectures)
        if not is_vae(tensors["vae"].tensors):
            raise Unrecognised(f"The vae of {self.folder.name} holds no VAE. Copy or download the model again.")
        return Recognised(
            layout="folder",
            architecture=denoiser.architecture,
            resolution=self._resolution(required[0], denoiser),
            prediction_type=self._prediction_type(denoiser),
            components=tuple(self.components),
            parts=tuple(self.parts),
            metadata=metadata,
            notes=tuple(self.notes),
        )

    def _pipeline(self, index: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        name = index.get("_class_name")
        if not isinstance(name, str) or name not in PIPELINES:
            raise Unrecognised(
                f"{self.folder.name} is a {ascii(name)[:80]}, which cannot be trained on here. "
                f"These can: {', '.join(PIPELINES)}."
            )
        return PIPELINES[name]

    def _listed_parts(self, index: Mapping[str, Any], required: tuple[str, ...]) -> Iterator[str]:
        """The parts that model_index.json names; `[null, null]` means that the model has none."""
        for part in ROLES:
            entry = index.get(part)
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
                yield part
            elif part in required:
                raise Unrecognised(f"{self.folder.name} is incomplete: its model_index.json names no {part}.")

    def _part(self, part: str) -> Header:
        """Collect one part's files. Returns its tensors (none for tokenizers and schedulers)."""
        if part.startswith("tokenizer") or part == "processor":
            self._tokenizer(part)
        elif part == "scheduler":
            self._json("scheduler/scheduler_config.json", role="scheduler")
        else:
            return self._weights(part)
        return Header(metadata={}, tensors={}, file_bytes=0)

    def _tokenizer(self, part: str) -> None:
        present = {name for name in TOKENIZER_FILES if (self.folder / part / name).is_file()}
        if not any(whole <= present for whole in TOKENIZER_WHOLE) and not self._reads_bytes(part, present):
            raise Unrecognised(
                f"{self.folder.name} is incomplete: its folder {part} holds no tokenizer "
                "(tokenizer.json, or vocab.json with merges.txt). Copy or download the model again."
            )
        for name in sorted(present):
            self._add(f"{part}/{name}", ROLES[part])

    def _reads_bytes(self, part: str, present: set[str]) -> bool:
        """ByT5's tokenizer has no vocabulary, only a configuration."""
        name = "tokenizer_config.json"
        return name in present and self._read(f"{part}/{name}").get("tokenizer_class") == "ByT5Tokenizer"

    def _weights(self, part: str) -> Header:
        self._json(f"{part}/config.json", role=ROLES[part])
        tensors: dict[str, Tensor] = {}
        metadata: Mapping[str, str] = {}
        for name in self._weight_files(part):
            header = header_of(self._file(name))
            self._add(name, ROLES[part], header)
            tensors |= header.tensors
            metadata = header.metadata
        self.parts.append(part_of(PART_TITLES[part], tensors))
        return Header(metadata=metadata, tensors=tensors, file_bytes=0)

    def _weight_files(self, part: str) -> list[str]:
        """The part's .safetensors files: one, or the shards of an index; full precision before the fp16 variant."""
        stem = "model" if part.startswith(("text_encoder", "mllm")) else "diffusion_pytorch_model"
        for variant in ("", ".fp16"):
            single = f"{part}/{stem}{variant}.safetensors"
            if (self.folder / single).exists():
                self._note_variant(part, variant)
                return [single]
            index = f"{part}/{stem}.safetensors.index{variant}.json"
            if (self.folder / index).exists():
                self._note_variant(part, variant)
                return self._shards(part, index)
        pickles = sorted(file.name for file in (self.folder / part).iterdir() if is_pickle(file.name))
        if pickles:
            raise Unrecognised(
                f"The {part} of {self.folder.name} is a pickle file ({pickles[0]}), which can run any program when it "
                "is opened. Get the .safetensors version of this model."
            )
        raise Unrecognised(
            f"{self.folder.name} is incomplete: {part}/{stem}.safetensors is missing. Copy or download the model again."
        )

    def _note_variant(self, part: str, variant: str) -> None:
        if variant and part in {"unet", "transformer"}:
            self.notes.append("The folder holds the fp16 variant of the weights only.")

    def _shards(self, part: str, index: str) -> list[str]:
        weight_map = self._json(index, role=ROLES[part]).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if not names or not all(name.endswith(".safetensors") and Path(name).name == name for name in names):
            raise Unrecognised(f"{index} of {self.folder.name} is damaged: it does not name .safetensors files.")
        return [f"{part}/{name}" for name in names]

    def _denoiser(
        self, part: str, tensors: Mapping[str, Header], architectures: tuple[str, ...]
    ) -> tuple[Denoiser, Mapping[str, str]]:
        """The denoiser by its tensors, when model_index.json and the configuration say the same of it."""
        where = f"{self.folder.name}/{part}"
        denoiser = tensor_layouts.find_denoiser(where, tensors[part].tensors)
        if (
            "transformer_2" in tensors and denoiser.architecture == "wan"
        ):  # one for the noisy half of the way, one for the rest
            denoiser = replace(denoiser, architecture="wan22")
        if denoiser.architecture not in architectures:
            stated_titles = " or ".join(TITLES[name] for name in architectures)
            raise Unrecognised(
                f"model_index.json says {stated_titles}, but the tensors of {where} are those of "
                f"{TITLES[denoiser.architecture]}. Copy or download the model again."
            )
        config = self._read(f"{part}/config.json")
        expected = TRANSFORMER_CLASSES.get(denoiser.architecture)
        if expected and (stated := config.get("_class_name", expected)) != expected:
            raise Unrecognised(
                f"The configuration of {where} says {ascii(stated)[:80]}, its tensors are those of a {expected}. "
                "Copy or download the model again."
            )
        stated = config.get("cross_attention_dim")
        if denoiser.context_size and isinstance(stated, int) and stated != denoiser.context_size:
            raise Unrecognised(
                f"The configuration of {where} says cross_attention_dim = {stated}, its tensors say "
                f"{denoiser.context_size}. Copy or download the model again."
            )
        if denoiser.architecture == "sdxl" and config.get("addition_embed_type") != "text_time":
            raise Unrecognised(f"The UNet of {self.folder.name} is not conditioned as Stable Diffusion XL is.")
        return denoiser, tensors[part].metadata

    def _resolution(self, part: str, denoiser: Denoiser) -> int:
        """Pixels = the denoiser's sample_size × the factor by which the VAE shrinks a side."""
        if denoiser.architecture not in STATES_ITS_SIZE:
            return DEFAULT_RESOLUTION[denoiser.architecture]
        size = self._read(f"{part}/config.json").get("sample_size")
        size = max(size) if _are_numbers(size) else size
        channels = self._read("vae/config.json").get("block_out_channels")
        if type(size) is int and _are_numbers(channels) and len(channels) <= 8:
            pixels: int = size * 2 ** (len(channels) - 1)
            if pixels in RESOLUTIONS:
                return pixels
        default = DEFAULT_RESOLUTION[denoiser.architecture]
        self.notes.append(f"The configuration states no size of pictures; {default} is the usual one.")
        return default

    def _prediction_type(self, denoiser: Denoiser) -> str:
        config = self._read("scheduler/scheduler_config.json")
        name = str(config.get("_class_name", ""))
        if name.startswith("EDM"):
            raise Unrecognised(f"{self.folder.name} uses an EDM noise schedule, which no trainer here supports.")
        if denoiser.role == "transformer":
            return DEFAULT_PREDICTION[denoiser.architecture]
        stated = config.get("prediction_type", "epsilon")  # diffusers' own default
        if stated not in PREDICTION_TYPES:
            raise Unrecognised(
                f"The scheduler of {self.folder.name} predicts {ascii(stated)[:80]}, which no trainer here supports."
            )
        return str(stated)

    def _add(self, name: str, role: str, header: Header | None = None) -> None:
        self.components.append(
            Component(
                role=role,
                path=name,
                bytes=header.file_bytes if header else self._file(name).stat().st_size,
                dtype=header.dtype if header else "",
                parameters=header.parameters if header else 0,
            )
        )

    def _json(self, name: str, *, role: str) -> dict[str, Any]:
        content = self._read(name)
        self._add(name, role)
        return content

    def _read(self, name: str) -> dict[str, Any]:
        file = self._file(name)
        try:
            if file.stat().st_size > MAX_JSON_BYTES:
                raise Unrecognised(f"{name} of {self.folder.name} is too large for a configuration.")
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise Unrecognised(
                f"{name} of {self.folder.name} is no readable JSON file. Copy or download the model again."
            ) from None
        if not isinstance(content, dict):
            raise Unrecognised(f"{name} of {self.folder.name} is damaged: it is no JSON object.")
        return content

    def _file(self, name: str) -> Path:
        """The file of that fixed name. Raises Unrecognised when it is missing or a link out of the models folder."""
        file = (self.folder / name).resolve()
        if not file.is_relative_to(self.root):
            raise Unrecognised(
                f"{name} of {self.folder.name} is a link that leaves the models folder. Copy the file itself there."
            )
        if not file.is_file():
            raise Unrecognised(
                f"{self.folder.name} is incomplete: {name} is missing. Copy or download the model again."
            )
        return file


def _are_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)
