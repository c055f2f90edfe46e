"""Writing the LoRA as a safetensors file in Kohya's key format, which every common program reads.

A module gives three tensors: `lora_unet_<name>.lora_down.weight`, `.lora_up.weight` and `.alpha` (the real alpha, so
that alpha / rank is right elsewhere too). The name is the original SDXL one with underscores for dots.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lora_trainer.adapter import LoraPair
from lora_trainer.atomic import write_file
from lora_trainer.sgm_names import sgm_name

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WrittenFile:
    """A checkpoint on disk."""

    path: Path
    size_bytes: int
    sha256: str


def kohya_tensors(pairs: list[LoraPair], unet_config: Mapping[str, Any], precision: str) -> dict[str, Tensor]:
    """The LoRA under Kohya's keys, in the number format asked for."""
    dtype = DTYPES[precision]
    result: dict[str, Tensor] = {}
    for pair in pairs:
        key = "lora_unet_" + sgm_name(pair.name, unet_config).replace(".", "_")
        result[f"{key}.lora_down.weight"] = pair.down.detach().to("cpu", dtype).contiguous()
        result[f"{key}.lora_up.weight"] = pair.up.detach().to("cpu", dtype).contiguous()
        result[f"{key}.alpha"] = torch.tensor(pair.alpha, dtype=dtype)
    return result


def write_lora(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> WrittenFile:
    """Write the file atomically, with the two hashes by which other programs recognise it."""
    # both hashes are defined on the file with only its ss_ metadata
    training_facts = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    hashed = save(tensors, training_facts)
    content = save(
        tensors, {**metadata, "sshs_model_hash": model_hash(hashed), "sshs_legacy_hash": legacy_hash(hashed)}
    )
    write_file(path, content)
    return WrittenFile(path, len(content), hashlib.sha256(content).hexdigest())


def model_hash(content: bytes) -> str:
    """SHA-256 of what follows the header: the weights alone, whatever the metadata says."""
    header_bytes = int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()


def legacy_hash(content: bytes) -> str:
    """The older mark: first 8 hex digits of the SHA-256 of 64 KiB that start at 1 MiB."""
    return hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
