"""What a model file or folder is: architecture, precision, sizes and parts, read from tensors and configurations.

Names of files prove nothing and are not looked at. Plain Python, no Django and no torch: headers and small JSON files
are all that is read, so a 24 GB model takes milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_trainer.safetensors_header import Header, HeaderError, Tensor, read_header
from models_registry import tensor_layouts
from models_registry.tensor_layouts import TITLES, Denoiser, Unrecognised

# What a single file does not say itself. A folder's configurations do, of UNets and of the first transformers.
DEFAULT_RESOLUTION = {
    **dict.fromkeys(TITLES, 1024),
    "sd15": 512,
    "sd2": 768,
    "hunyuan_image": 2048,
    "qwen_image": 1328,
    "wan": 480,
    "wan22": 720,
    "ltx": 512,
    "hunyuan_video": 720,
}
DEFAULT_PREDICTION = {
    **dict.fromkeys(TITLES, "flow_prediction"),
    "sd15": "epsilon",
    "sd2": "v_prediction",
    "sdxl": "epsilon",
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
RESOLUTIONS = range(32, 8193)
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Component:
    """One file of a model. `path` is relative to the model's folder (its own name for a single file)."""

    role: str
    path: str
    bytes: int
    dtype: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class Part:
    """What one file holds of a model: a checkpoint contains UNet, VAE and text encoders."""

    title: str
    tensors: int
    parameters: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Recognised:
    """A model that can be registered. `notes` are sentences about what the files leave open."""

    layout: str
    architecture: str
    resolution: int
    prediction_type: str
    components: tuple[Component, ...]
    parts: tuple[Part, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components)


def recognise(path: Path, *, root: Path) -> Recognised:
    """What `path`, a folder or file inside `root`, is. Raises Unrecognised (a sentence) when it cannot be trained on.

    Files that leave `root` through links are refused.
    """
    from models_registry.diffusers_folder import recognise_folder  # it builds on the classes above

    if path.is_dir():
        return recognise_folder(path, root=root)
    if is_pickle(path.name):
        remedy = "Convert it to .safetensors, or get the .safetensors version of this model."
        raise Unrecognised(f"{pickle_sentence(path.name)} {remedy}")
    if path.suffix.lower() != ".safetensors":
        raise Unrecognised(f"{path.name} is no .safetensors file. Only .safetensors files can be base models.")
    return recognise_file(path)


def recognise_file(path: Path) -> Recognised:
    header = header_of(path)
    denoiser = tensor_layouts.find_denoiser(path.name, header.tensors)
    parts = tensor_layouts.split_checkpoint(header.tensors, denoiser)
    notes = _what_is_missing(path.name, denoiser, parts)
    return Recognised(
        layout="file",
        architecture=denoiser.architecture,
        resolution=_resolution(header, denoiser),
        prediction_type=_prediction_type(header, denoiser),
        components=(
            Component(
                role=denoiser.role if len(parts) == 1 else "checkpoint",
                path=path.name,
                bytes=header.file_bytes,
                dtype=header.dtype,
                parameters=header.parameters,
            ),
        ),
        parts=tuple(part_of(title, tensors) for title, tensors in parts.items()),
        metadata=header.metadata,
        notes=(*notes, *_assumptions(header, denoiser)),
    )


def is_pickle(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in PICKLES


def pickle_sentence(name: str) -> str:
    """Why nothing here opens such a file."""
    return f"{name} is a pickle file, which can run any program when it is opened."


def header_of(path: Path) -> Header:
    try:
        return read_header(path)
    except HeaderError as error:
        raise Unrecognised(str(error)) from None
    except OSError as error:
        raise Unrecognised(f"{path.name} cannot be read: {error.strerror}.") from None


def part_of(title: str, tensors: Mapping[str, Tensor]) -> Part:
    header = Header(metadata={}, tensors=tensors, file_bytes=0)
    return Part(
        title=title,
        tensors=len(tensors),
        parameters=header.parameters,
        bytes=sum(tensor.bytes for tensor in tensors.values()),
        dtype=header.dtype,
    )


def _what_is_missing(name: str, denoiser: Denoiser, parts: Mapping[str, object]) -> tuple[str, ...]:
    """A UNet alone cannot be trained on; models with a transformer are commonly kept in several files."""
    title = TITLES[denoiser.architecture]
    encoders = [part for part in parts if part.startswith("Text encoder")]
    missing = [
        what for what, is_there in (("the VAE", "VAE" in parts), ("the text encoders", bool(encoders))) if not is_there
    ]
    if not missing:
        return ()
    if denoiser.role == "unet":
        raise Unrecognised(
            f"{name} holds the UNet of a {title} model, but not {' and '.join(missing)}. "
            "Register the full checkpoint, or the diffusers folder that it belongs to."
        )
    held = " and ".join(missing)
    return (f"The file does not hold {held}: staff add them under “Other files it is trained with”.",)


def _resolution(header: Header, denoiser: Denoiser) -> int:
    stated = re.fullmatch(r"(\d{2,4})x(\d{2,4})", header.metadata.get("modelspec.resolution", ""))
    side = max(int(stated[1]), int(stated[2])) if stated else 0
    return side if side in RESOLUTIONS else DEFAULT_RESOLUTION[denoiser.architecture]


def _prediction_type(header: Header, denoiser: Denoiser) -> str:
    if "v_pred" in header.tensors:  # the usual marker of SDXL v-prediction checkpoints
        return "v_prediction"
    stated = MODELSPEC_PREDICTION.get(header.metadata.get("modelspec.prediction_type", "").lower())
    if stated and denoiser.role == "unet":
        return stated
    return DEFAULT_PREDICTION[denoiser.architecture]


def _assumptions(header: Header, denoiser: Denoiser) -> tuple[str, ...]:
    if denoiser.note:
        return (denoiser.note,)
    if denoiser.architecture != "sd2" or "modelspec.prediction_type" in header.metadata:
        return ()
    sentence = (
        "The file does not say which Stable Diffusion 2 it is. Taken for the 768-pixel one with v-prediction; "
        "the 512-pixel base model has the same tensors and predicts epsilon."
    )
    return (sentence,)


__all__ = [
    "TITLES",
    "Component",
    "Part",
    "Recognised",
    "Unrecognised",
    "header_of",
    "is_pickle",
    "part_of",
    "pickle_sentence",
    "recognise",
    "recognise_file",
]
