"""A LoRA file taken apart into modules, from its header alone: which module, which rank, which alpha. Torch-free.

Two spellings are known. Kohya's: `lora_unet_<path with underscores>` with `.lora_down.weight`, `.lora_up.weight` and
`.alpha`. diffusers': `unet.<dotted path>` with `.lora_A.weight` and `.lora_B.weight`; alpha stands in the metadata.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_trainer.layouts import DIFFUSERS_PREFIXES, KOHYA_PREFIXES
from lora_trainer.safetensors_header import Header, read_header, read_scalars

KOHYA, DIFFUSERS = "kohya", "diffusers"
# ending of a key: (what it is, spelling); both have alpha
ENDINGS = {
    ".lora_down.weight": ("down", KOHYA),
    ".lora_up.weight": ("up", KOHYA),
    ".lora_A.weight": ("down", DIFFUSERS),
    ".lora_B.weight": ("up", DIFFUSERS),
    ".alpha": ("alpha", ""),
}
ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps ranks and alphas, as JSON, since its keys have no room for alpha."""
_HASH_BLOCK_BYTES = 1 << 20


@dataclass
class FileModule:
    """One module of the file. `down` and `up` are shapes; None when the file lacks the tensor."""

    name: str
    """As the file has it, without the ending."""
    spelling: str = ""
    down: tuple[int, ...] | None = None
    up: tuple[int, ...] | None = None
    alpha: float | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def part(self) -> str:
        """unet, te1, te2; empty for something else."""
        return part_of(self.name)

    @property
    def rank(self) -> int:
        """0 when there is no `down`."""
        return self.down[0] if self.down else 0

    @property
    def inside(self) -> int:
        """Features (of a convolution: channels) that go in; 0 when `down` is missing or no matrix."""
        return self.down[1] if self.down and len(self.down) > 1 else 0

    @property
    def is_convolution(self) -> bool:
        """Whether it has a kernel larger than one pixel."""
        return self.down is not None and max(self.down[2:], default=1) > 1


@dataclass(frozen=True)
class LoraFile:
    """`modules` by name; `strangers`: keys that belong to no LoRA."""

    path: Path
    header: Header
    modules: Mapping[str, FileModule]
    strangers: list[str]

    @property
    def spelling(self) -> str:
        """kohya, diffusers, "mixed", or empty when it holds no LoRA."""
        found = {module.spelling for module in self.modules.values()}
        return "mixed" if len(found) > 1 else next(iter(found), "")

    def weights_hash(self) -> str:
        """SHA-256 of all tensor content. Reads the whole file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


def part_of(name: str) -> str:
    """The part that a module of a LoRA file belongs to: unet, te1, te2; empty for something else."""
    prefixes = KOHYA_PREFIXES | DIFFUSERS_PREFIXES
    return next((part for prefix, part in prefixes.items() if name.startswith(prefix)), "")


def read_lora_file(path: Path) -> LoraFile:
    """Take the file apart. HeaderError (a sentence) when it is no whole .safetensors file, OSError when unreadable."""
    header = read_header(path)
    modules: dict[str, FileModule] = {}
    strangers: list[str] = []
    for key, tensor in header.tensors.items():
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if ending is None:
            strangers.append(key)
            continue
        what, spelling = ENDINGS[ending]
        name = key.removesuffix(ending)
        module = modules.setdefault(name, FileModule(name))
        module.keys.append(key)
        module.spelling = module.spelling or spelling
        if what != "alpha":
            setattr(module, what, tensor.shape)
    _read_alphas(path, header, modules)
    return LoraFile(path, header, modules, strangers)


def _read_alphas(path: Path, header: Header, modules: Mapping[str, FileModule]) -> None:
    """Alphas are single numbers among the tensors, or (diffusers) stand in the metadata."""
    alphas = {key for key in header.tensors if key.endswith(".alpha")}
    for key, alpha in read_scalars(path, header, alphas).items():
        modules[key.removesuffix(".alpha")].alpha = alpha
    settings = _adapter_settings(header.metadata)
    for module in modules.values():
        if module.alpha is None and module.spelling == DIFFUSERS:
            module.alpha = _alpha_in_settings(module, settings)


def _adapter_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alpha_in_settings(module: FileModule, settings: Mapping[str, Any]) -> float | None:
    prefix = next((prefix for prefix in DIFFUSERS_PREFIXES if module.name.startswith(prefix)), "")
    path = module.name.removeprefix(prefix).removeprefix("text_model.")
    own = settings.get(f"{prefix}alpha_pattern")
    alpha = own.get(path) if isinstance(own, dict) else None
    alpha = settings.get(f"{prefix}lora_alpha") if alpha is None else alpha
    return float(alpha) if isinstance(alpha, (int, float)) else None
