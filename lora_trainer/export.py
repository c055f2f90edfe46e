"""Writing the LoRA as a safetensors file, in Kohya's key format or diffusers' own, and reading Kohya's back.

Kohya's format is what every common program reads. A module gives three tensors: `lora_<part>_<name>.lora_down.weight`,
`.lora_up.weight` and `.alpha` (the real alpha, so that alpha / rank is right elsewhere too). diffusers' format has no
room for alpha beside the tensors: ranks and alphas stand in the metadata, which diffusers reads from 0.34 on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lora_trainer.adapter import LoraPair, Size
from lora_trainer.atomic import write_file
from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError
from lora_trainer.layouts import DIFFUSERS_PREFIXES
from lora_trainer.lora_contents import ADAPTER_METADATA, KOHYA, FileModule, read_lora_file
from lora_trainer.safetensors_header import HeaderError

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PREFIX_OF_PART = {part: prefix for prefix, part in DIFFUSERS_PREFIXES.items()}
_NAMES_IN_A_SENTENCE = 3


@dataclass(frozen=True)
class WrittenFile:
    """A checkpoint on disk."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedModule:
    """One module of a LoRA on disk: down [rank, in, …], up [out, rank, …], in the file's number format."""

    down: Tensor
    up: Tensor
    size: Size


def lora_file(
    pairs: list[LoraPair], config: TrainingConfig, metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint in the format that `save_model_as` and `save_precision` ask for."""
    if config.save_model_as == "diffusers":
        tensors = diffusers_tensors(pairs, config.save_precision)
        return tensors, {**metadata, **diffusers_metadata(pairs)}
    return kohya_tensors(pairs, config.save_precision), dict(metadata)


def kohya_tensors(pairs: Iterable[LoraPair], precision: str) -> dict[str, Tensor]:
    """The LoRA under Kohya's keys, in the number format asked for."""
    dtype = DTYPES[precision]
    result: dict[str, Tensor] = {}
    for pair in pairs:
        result[f"{pair.file_name}.lora_down.weight"] = _saved(pair.down, dtype)
        result[f"{pair.file_name}.lora_up.weight"] = _saved(pair.up, dtype)
        result[f"{pair.file_name}.alpha"] = torch.tensor(pair.alpha, dtype=dtype)
    return result


def diffusers_tensors(pairs: Iterable[LoraPair], precision: str) -> dict[str, Tensor]:
    """The LoRA under the keys that `pipeline.load_lora_weights` takes as they are; see diffusers_metadata for alpha."""
    dtype = DTYPES[precision]
    result: dict[str, Tensor] = {}
    for pair in pairs:
        key = _diffusers_key(pair.part, pair.name)
        result[f"{key}.lora_A.weight"] = _saved(pair.down, dtype)
        result[f"{key}.lora_B.weight"] = _saved(pair.up, dtype)
    return result


def diffusers_metadata(pairs: Iterable[LoraPair]) -> dict[str, str]:
    """What makes diffusers scale by alpha / rank: PEFT's settings of each part, as JSON under one key."""
    by_part: dict[str, list[LoraPair]] = {}
    for pair in pairs:
        by_part.setdefault(pair.part, []).append(pair)
    facts: dict[str, Any] = {}
    for part, group in by_part.items():
        facts |= {f"{_PREFIX_OF_PART[part]}{key}": value for key, value in _peft_settings(group).items()}
    return {"format": "pt", ADAPTER_METADATA: json.dumps(facts, sort_keys=True)}


def _peft_settings(pairs: list[LoraPair]) -> dict[str, Any]:
    rank = Counter(pair.rank for pair in pairs).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs).most_common(1)[0][0]
    # PEFT compares endings, so these names hold for text encoders with and without `text_model.`
    names = {pair.name.removeprefix("text_model."): pair for pair in pairs}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: pair.rank for name, pair in names.items() if pair.rank != rank},
        "alpha_pattern": {name: pair.alpha for name, pair in names.items() if pair.alpha != alpha},
        "target_modules": sorted(names),
    }


def _diffusers_key(part: str, path: str) -> str:
    if part.startswith("te"):
        path = f"text_model.{path.removeprefix('text_model.')}"
    return _PREFIX_OF_PART[part] + path


def _saved(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


@dataclass(frozen=True)
class SavedLora:
    """A LoRA in Kohya's format, by name in the file."""

    path: Path
    modules: Mapping[str, SavedModule]

    @property
    def sizes(self) -> dict[str, Size]:
        """Rank and alpha by name in the file, as `adapter.add_lora` takes them."""
        return {name: module.size for name, module in self.modules.items()}

    def load_into(self, pairs: list[LoraPair]) -> int:
        """Give the pairs the saved weights; returns how many got some, the others stay untrained.

        Where alpha differs, `up` is scaled so that the effect stays. ConfigError when the file has modules that are
        not among the pairs (they would be lost), or another rank or shape.
        """
        ours = {pair.file_name: pair for pair in pairs}
        lost = [name for name in self.modules if name not in ours]
        if lost:
            raise ConfigError(
                f"The LoRA {self.path} does not fit what is trained here: {_some(lost)} would be lost. "
                "Train the same parts and modules, or start from another file."
            )
        for name, module in self.modules.items():
            self._check(name, module, ours[name])
            with torch.no_grad():
                ours[name].down.copy_(module.down)
                ours[name].up.copy_(module.up.float() * _rescaling(module.size, ours[name]))
        return len(self.modules)

    def _check(self, name: str, module: SavedModule, pair: LoraPair) -> None:
        if module.size.rank != pair.rank:
            raise ConfigError(
                f"The LoRA {self.path} has rank {module.size.rank} in {name}, this run {pair.rank}. "
                "Set dim_from_weights = true, or network_dim to the file's rank."
            )
        if (module.down.shape, module.up.shape) != (pair.down.shape, pair.up.shape):
            raise ConfigError(f"The LoRA {self.path} does not fit the base model: {name} has another shape.")


def _rescaling(saved: Size, pair: LoraPair) -> float:
    return (saved.alpha / saved.rank) / (pair.alpha / pair.rank)


def read_kohya(path: Path) -> SavedLora:
    """Read a LoRA in Kohya's format; ConfigError when it is missing, damaged, in another format or incomplete."""
    try:
        file = read_lora_file(path)
    except OSError as error:
        raise ConfigError(f"The LoRA {path} cannot be read: {error.strerror}.") from error
    except HeaderError as error:
        raise ConfigError(f"'network_weights': {error}") from error
    foreign = file.strangers + [name for name, module in file.modules.items() if not _is_kohyas(module)]
    if foreign or not file.modules:
        examples = _some(foreign) if foreign else "nothing"
        raise ConfigError(f"The LoRA {path} is not in Kohya's format: it holds {examples}.")
    half = [name for name, module in file.modules.items() if module.down is None or module.up is None]
    if half:
        raise ConfigError(f"The LoRA {path} is incomplete: lora_down or lora_up of {_some(half)} is missing.")
    with safe_open(path, framework="pt") as tensors:
        return SavedLora(path, {name: _saved_module(module, tensors) for name, module in file.modules.items()})


def _is_kohyas(module: FileModule) -> bool:
    return bool(module.part) and "." not in module.name and module.spelling in ("", KOHYA)


def _saved_module(module: FileModule, tensors: Any) -> SavedModule:
    down = tensors.get_tensor(f"{module.name}.lora_down.weight")
    up = tensors.get_tensor(f"{module.name}.lora_up.weight")
    # a file without alpha means a scale of 1
    return SavedModule(down, up, Size(module.rank, float(module.rank) if module.alpha is None else module.alpha))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_IN_A_SENTENCE])
    more = len(names) - _NAMES_IN_A_SENTENCE
    return f"{shown} and {more} more" if more > 0 else shown


def write_lora(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> WrittenFile:
    """Write the file atomically, with the hashes by which other programs recognise it and check that it is whole."""
    # both sshs_ hashes are defined on the file with only its ss_ metadata
    training_facts = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    hashed = save(tensors, training_facts)
    weights = model_hash(hashed)
    hashes = {"sshs_model_hash": weights, "sshs_legacy_hash": legacy_hash(hashed)}
    if "modelspec.sai_model_spec" in metadata:
        hashes["modelspec.hash_sha256"] = f"0x{weights}"
    content = save(tensors, {**metadata, **hashes})
    write_file(path, content)
    return WrittenFile(path, len(content), hashlib.sha256(content).hexdigest())


def model_hash(content: bytes) -> str:
    """SHA-256 of what follows the header: the weights alone, whatever the metadata says."""
    header_bytes = int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()


def legacy_hash(content: bytes) -> str:
    """The older mark: first 8 hex digits of the SHA-256 of 64 KiB that start at 1 MiB."""
    return hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
