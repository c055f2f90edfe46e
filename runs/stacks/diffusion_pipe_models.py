"""Which files of a base model Diffusion Pipe takes, and under which keys of its `[model]`, by architecture.

Read from models/*.py and docs/supported_models.md of 8f83dbf2. Roles are those of the models registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorapilot import workspace
from lorapilot.errors import UserError
from models_registry.enums import role_within
from runs.stacks.base import ATTACH, ModelFacts, TrainingJob, hub_snapshots, without_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How Diffusion Pipe trains models of one architecture. `parts` and `folder_parts`: the key of each further file.

    `weights`: roles that may be a folder of .safetensors; `complete`: roles that must be a folder with configuration
    and tokenizer. `pipeline_of`: the role of a part that lies in a diffusers folder, which is needed as a whole.
    """

    type: str
    file: str = ""  # the key of a base model that is a single file; empty: it cannot be one
    folder: str = ""  # as `file`, for a diffusers folder
    parts: Mapping[str, str] = field(default_factory=dict)  # beside a single file
    folder_parts: Mapping[str, str] = field(default_factory=dict)  # beside a folder, which has its own
    optional: Mapping[str, str] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)  # role → type of an entry of text_encoders
    weights: frozenset[str] = frozenset()
    complete: frozenset[str] = frozenset()
    pipeline_of: str = ""
    pipeline: str = ""  # what the diffusers folder is called
    checkpoint_vaes: tuple[str, ...] = ()  # a file lies in the folder of its publisher, with one of these
    hub_configuration: str = ""  # read from the Hugging Face cache, also offline
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the user's options win over it
    has_lokr: bool = True
    min_snr: bool = False
    trains_text_encoders: bool = False


SDXL_CONFIGURATION = "stabilityai/stable-diffusion-xl-base-1.0"
WAN_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
WAN = Family(
    type="wan", file="transformer_path", optional={"t5": "llm_path"}, checkpoint_vaes=WAN_VAES,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "sdxl": Family(
        type="sdxl", file="checkpoint_path", hub_configuration=SDXL_CONFIGURATION, has_lokr=False, min_snr=True,
        trains_text_encoders=True,
    ),
    "sd3": Family(type="sd3", folder="diffusers_path"),
    "flux": Family(type="flux", folder="diffusers_path", has_lokr=False),
    "chroma": Family(type="chroma", file="transformer_path", pipeline_of="t5", pipeline="FLUX.1"),
    "lumina2": Family(type="lumina_2", file="transformer_path", parts={"llm": "llm_path", "vae": "vae_path"}),
    "hunyuan_image": Family(
        type="hunyuan_image", file="transformer_path",
        parts={"llm": "text_encoder_path", "byt5": "byt5_path", "vae": "vae_path"}, weights=frozenset({"llm", "vae"}),
    ),
    "anima": Family(
        type="anima", file="transformer_path", parts={"llm": "llm_path", "vae": "vae_path"}, weights=frozenset({"llm"}),
    ),
    "wan": WAN,
    "wan22": WAN,
    "qwen_image": Family(
        type="qwen_image", file="transformer_path", folder="diffusers_path",
        parts={"llm": "text_encoder_path", "vae": "vae_path"}, weights=frozenset({"llm", "vae"}),
    ),
    "hidream": Family(
        type="hidream", folder="diffusers_path", folder_parts={"llm": "llama3_path"}, complete=frozenset({"llm"}),
    ),
    "z_image": Family(type="z_image", file="diffusion_model", parts={"vae": "vae"}, encoders={"llm": "lumina2"}),
    "flux2": Family(
        type="flux2", file="diffusion_model", parts={"vae": "vae"}, encoders={"llm": "flux2"},
        fixed={"shift": 3},  # its VAE has more channels: noise has to be stronger
    ),
    "ltx": Family(type="ltx-video", file="single_file_path", pipeline_of="t5", pipeline="LTX-Video"),
    "hunyuan_video": Family(
        type="hunyuan-video", file="transformer_path",
        parts={"llm": "llm_path", "clip_l": "clip_path", "vae": "vae_path"}, complete=frozenset({"llm", "clip_l"}),
    ),
    "auraflow": Family(
        type="auraflow", file="transformer_path", parts={"t5": "text_encoder_path", "vae": "vae_path"},
        weights=frozenset({"t5", "vae"}), fixed={"max_sequence_length": 256},
    ),
    "omnigen2": Family(type="omnigen2", folder="diffusers_path"),
}  # fmt: skip


def refusal_of(model: ModelFacts) -> str:
    """Why Diffusion Pipe cannot train a base model of a known architecture as it is; empty when it can."""
    family = FAMILIES[model.architecture]
    if model.layout == "folder" and not family.folder:
        return f"Diffusion Pipe reads {model.name} from a single file, not from a diffusers folder: register the file."
    if model.layout != "folder" and not family.file:
        return f"Diffusion Pipe reads {model.name} from a diffusers folder, not from a single file: register that one."
    if family.pipeline_of and family.pipeline_of not in model.parts:
        return (
            f"{model.name} has no {role_within(family.pipeline_of)} for Diffusion Pipe: add the folder of that text "
            f"encoder in a diffusers folder of {family.pipeline} {ATTACH}. "
            "The VAE and the tokenizers are read from there, too."
        )
    parts = family.folder_parts if model.layout == "folder" else family.parts
    if lacking := without_parts("Diffusion Pipe", model, [*parts, *family.encoders]):
        return lacking
    if family.hub_configuration and not has_configuration(family.hub_configuration):
        return (
            f"Diffusion Pipe reads the configuration and tokenizers of {family.hub_configuration} from the Hugging "
            f"Face cache, and they are not there: on the host, HF_HOME={workspace.cache() / 'huggingface'} "
            f"hf download {family.hub_configuration} --include '*.json' '*.txt' gets them (a few MB)."
        )
    return ""


def has_configuration(repository: str) -> bool:
    """Whether the trainers' Hugging Face cache has a snapshot of it."""
    return any(hub_snapshots(workspace.cache(), repository).glob("*/model_index.json"))


def model_files(job: TrainingJob) -> dict[str, Any]:
    """The keys of `[model]` that name files. Raises UserError for a part that does not have the shape it needs."""
    family = FAMILIES[job.architecture]
    is_folder = job.layout == "folder"
    keys: dict[str, Any] = {family.folder if is_folder else family.file: str(job.base_model)}
    parts = family.folder_parts if is_folder else family.parts
    keys |= {key: str(_part(job, role)) for role, key in parts.items()}
    keys |= {key: str(_part(job, role)) for role, key in family.optional.items() if role in job.parts}
    if family.encoders:
        keys["text_encoders"] = [
            {"path": str(_part(job, role)), "type": kind} for role, kind in family.encoders.items()
        ]
    if family.pipeline_of:
        keys["diffusers_path"] = str(_pipeline(job, family))
    if family.checkpoint_vaes:
        keys["ckpt_path"] = str(_checkpoint_folder(job, family))
    return keys


def _part(job: TrainingJob, role: str) -> Path:
    family = FAMILIES[job.architecture]
    if role not in job.parts:
        raise UserError(f"The base model has no {role_within(role)} any more: add the file {ATTACH}.")
    path = job.parts[role]
    if role in family.complete:
        return _complete_folder(path, role)
    if path.is_dir() and role not in family.weights:
        return _only_file(path, role)
    return path


def _complete_folder(path: Path, role: str) -> Path:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file() or not any(folder.glob("tokenizer*")):
        raise UserError(
            f"Diffusion Pipe loads the {role_within(role)} of this model from a folder with its config.json and its "
            f"tokenizer. Put them into {folder.name}, beside the weights."
        )
    return folder


def _only_file(folder: Path, role: str) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(
            f"Diffusion Pipe reads the {role_within(role)} of this model from one .safetensors file: add that one."
        )
    return files[0]


def _pipeline(job: TrainingJob, family: Family) -> Path:
    """The diffusers folder that a part lies in."""
    folder = job.parts[family.pipeline_of].parent if family.pipeline_of in job.parts else job.base_model
    if not (folder / "model_index.json").is_file() or not folder.is_relative_to(workspace.models()):
        raise UserError(
            f"Diffusion Pipe needs a whole diffusers folder of {family.pipeline} for this model: "
            f"add the {family.pipeline_of} folder that lies in it {ATTACH}."
        )
    return folder


def _checkpoint_folder(job: TrainingJob, family: Family) -> Path:
    """The folder of the model's publisher, with its VAE, tokenizer and config.json: the nearest around the file."""
    around = [folder for folder in job.base_model.parents if folder.is_relative_to(workspace.models())]
    for folder in around:
        if any((folder / name).is_file() for name in family.checkpoint_vaes):
            return folder
    vae = " or ".join(family.checkpoint_vaes)
    raise UserError(
        "Diffusion Pipe needs the folder that Wan was published in, though without its large files: "
        f"put {job.base_model.name} into a folder with config.json, {vae} and google/umt5-xxl."
    )
