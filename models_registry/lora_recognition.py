"""What a LoRA file is: for which base model, which parts, which ranks and alphas, and what its metadata says.

Plain Python, no Django and no torch. The header is all that is read, and the alphas, single numbers each: a file of any
size takes milliseconds. Files come from strangers: the header's size and what is kept of it are bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lora_trainer.safetensors_header import Header, HeaderError, Tensor, read_header, read_scalars
from models_registry.lora_layouts import (
    ALPHA,
    BASE_VERSIONS,
    DENOISER,
    ENDINGS,
    LOKR,
    LORA,
    MARKS,
    PREFIXES,
    SAME_MODULES,
    STYLES,
    TEXT,
    WRAPPER,
    Ending,
)
from models_registry.recognition import Unrecognised, is_pickle, pickle_sentence

MOST_HEADER_BYTES = 16 << 20  # one with 20,000 tensors and large tables of tags has a quarter of it
MOST_TENSORS = 100_000
MOST_ALPHAS = 20_000
MOST_RANK = 1_000_000  # a tensor without numbers may claim any
MOST_ROWS, MOST_VALUE_CHARACTERS = 300, 2000  # of the metadata that is shown
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers keeps alphas, as JSON: its keys have no room for them
_BY_TEXT = sorted(ENDINGS, key=lambda ending: -len(ending.text))


@dataclass
class _Module:
    """One module of the file, as its tensors tell it."""

    part: str
    path: str  # with `_` for `.`
    algorithm: str = ""
    style: str = ""
    rank: int = 0
    inside: int = 0
    alpha: float | None = None
    halves: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class LoraPart:
    """The modules of one part of the base model. Ranks and alphas: value → how many modules have it."""

    title: str
    modules: int
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]


@dataclass(frozen=True)
class LoraContents:
    """What a LoRA file holds. `rank` and `alpha` are those of most modules: 0 and None when the file has none."""

    architecture: str  # a key of TITLES; "unknown" when neither modules nor metadata tell it
    style: str  # a key of STYLES, or "mixed"
    algorithm: str
    rank: int
    alpha: float | None
    parts: tuple[LoraPart, ...]
    dtype: str
    parameters: int
    bytes: int
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def said(self, *keys: str) -> str:
        """The first of these keys that the metadata has a value for, as one line; empty when none."""
        found = (self.metadata.get(key, "") for key in keys)
        return next((" ".join(value.split()) for value in found if value not in ("", "None")), "")


def recognise_lora(path: Path, *, name: str = "") -> LoraContents:
    """What the file holds; `name` is what a person calls it. Raises Unrecognised (a sentence): no LoRA, or damaged."""
    name = name or path.name
    header = _header_of(path, name)
    modules, strangers = _modules_of(header)
    if not modules:
        raise Unrecognised(f"{name} is no LoRA: none of its {len(header.tensors):,} tensors is one of a LoRA's.")
    if strangers > len(header.tensors) // 2:
        raise Unrecognised(
            f"{name} is no LoRA: {strangers:,} of its {len(header.tensors):,} tensors belong to none. "
            "Is it a base model?"
        )
    _read_alphas(path, header, modules)
    architecture = architecture_of(modules.values(), header.metadata)
    ranks = Counter(module.rank for module in modules.values() if module.rank)
    alphas = Counter(module.alpha for module in modules.values() if module.alpha is not None)
    return LoraContents(
        architecture=architecture,
        style=_one_or_mixed(module.style for module in modules.values() if module.style),
        algorithm=_one_or_mixed(module.algorithm for module in modules.values() if module.algorithm),
        rank=_most_common(ranks, 0),
        alpha=_most_common(alphas, None),
        parts=tuple(_parts(modules, architecture)),
        dtype=header.dtype,
        parameters=header.parameters,
        bytes=header.file_bytes,
        metadata=header.metadata,
        notes=tuple(_notes(modules, strangers)),
    )


def refuse_pickle(name: str) -> None:
    """Raises Unrecognised for a file that is called like one."""
    if is_pickle(name):
        raise Unrecognised(f"{pickle_sentence(name)} Get the .safetensors version of this LoRA, or convert it.")


def _header_of(path: Path, name: str) -> Header:
    refuse_pickle(name)
    try:
        header = read_header(path, most_bytes=MOST_HEADER_BYTES)
    except HeaderError as error:
        raise Unrecognised(str(error).replace(path.name, name, 1)) from None
    except OSError as error:
        raise Unrecognised(f"{name} cannot be read: {error.strerror}.") from None
    if len(header.tensors) > MOST_TENSORS:
        raise Unrecognised(f"{name} has {len(header.tensors):,} tensors, which no LoRA has.")
    return header


def _modules_of(header: Header) -> tuple[dict[str, _Module], int]:
    """Modules by their name in the file, and how many tensors belong to none."""
    modules: dict[str, _Module] = {}
    strangers = 0
    for key, tensor in header.tensors.items():
        ending = next((ending for ending in _BY_TEXT if key.endswith(ending.text)), None)
        if ending is None:
            strangers += 1
            continue
        name = key.removesuffix(ending.text)
        module = modules.get(name)
        if module is None:
            modules[name] = module = _Module(*_place_of(name))
        _add(module, ending, tensor)
    whole = {name: module for name, module in modules.items() if module.algorithm}
    return whole, strangers + len(modules) - len(whole)


def _place_of(name: str) -> tuple[str, str]:
    """The part that a module belongs to, and its path there."""
    inner = name.removeprefix(WRAPPER)
    for prefix, part in PREFIXES:
        if inner.startswith(prefix):
            return part, inner.removeprefix(prefix).replace(".", "_")
    return DENOISER, inner.replace(".", "_")


def _add(module: _Module, ending: Ending, tensor: Tensor) -> None:
    shape = tensor.shape
    module.algorithm = module.algorithm or ending.algorithm
    module.style = module.style or ending.style
    if 0 <= ending.rank_at < len(shape) and shape[ending.rank_at] <= MOST_RANK:
        module.rank = module.rank or shape[ending.rank_at]
    if 0 <= ending.inside_at < len(shape):
        module.inside = shape[ending.inside_at]
    if ending.algorithm == LORA:
        module.halves.add("down" if ending.inside_at >= 0 else "up")
    if ending.algorithm == LOKR and len(shape) > 1 and ending.text.endswith(("w1", "w2", "w1_b", "w2_b")):
        module.inside = (module.inside or 1) * shape[1]  # of a Kronecker product the sides multiply


def architecture_of(modules: Iterator[_Module] | Any, metadata: Mapping[str, str]) -> str:
    """From the denoiser's modules where they tell it, else from the text encoders', else from the metadata."""
    modules = list(modules)
    said = _by_metadata(metadata)
    denoiser = [module for module in modules if module.part == DENOISER]
    for mark in MARKS:
        if any(
            mark.path.search(module.path) and (not mark.widths or module.inside in mark.widths) for module in denoiser
        ):
            return said if said in SAME_MODULES.get(mark.architecture, ()) else mark.architecture
    return said or _by_text_encoders(modules) or "unknown"


def _by_metadata(metadata: Mapping[str, str]) -> str:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        plain = re.sub(r"[^a-z0-9]", "", metadata.get(key, "")[:100].lower())
        if found := next((architecture for start, architecture in BASE_VERSIONS if plain.startswith(start)), ""):
            return found
    return ""


def _by_text_encoders(modules: list[_Module]) -> str:
    if any(module.part == f"{TEXT} 2" and module.inside == 1280 for module in modules):
        return "sdxl"
    widths = {module.inside for module in modules if module.part == TEXT and module.path.endswith("fc1")}
    return {768: "sd15", 1024: "sd2"}.get(next(iter(widths), 0), "")


def _parts(modules: Mapping[str, _Module], architecture: str) -> Iterator[LoraPart]:
    denoiser = "UNet" if architecture in ("sd15", "sd2", "sdxl") else "Transformer"
    for part in sorted({module.part for module in modules.values()}):
        own = [module for module in modules.values() if module.part == part]
        ranks = Counter(str(module.rank) for module in own if module.rank)
        alphas = Counter(f"{module.alpha:g}" for module in own if module.alpha is not None)
        title = denoiser if part == DENOISER else part
        yield LoraPart(title, len(own), dict(ranks.most_common(20)), dict(alphas.most_common(20)))


def _notes(modules: Mapping[str, _Module], strangers: int) -> Iterator[str]:
    halves = sum(1 for module in modules.values() if module.algorithm == LORA and len(module.halves) == 1)
    if halves:
        yield f"{halves:,} modules have only one of their two matrices: the file is damaged, or was edited."
    if strangers:
        yield f"{strangers:,} further tensors belong to no LoRA."


def _one_or_mixed(values: Iterator[str]) -> str:
    found = set(values)
    return next(iter(found)) if len(found) == 1 else "mixed" if found else ""


def _most_common(values: Counter[Any], otherwise: Any) -> Any:
    return values.most_common(1)[0][0] if values else otherwise


# --- Alphas -----------------------------------------------------------------------------------------------------------
def _read_alphas(path: Path, header: Header, modules: Mapping[str, _Module]) -> None:
    """Alphas are single numbers among the tensors, or stand in the metadata."""
    alphas = (key for key in header.tensors if key.endswith(ALPHA) and key.removesuffix(ALPHA) in modules)
    for key, alpha in read_scalars(path, header, set(islice(alphas, MOST_ALPHAS))).items():
        modules[key.removesuffix(ALPHA)].alpha = _finite(alpha)
    said = _alpha_in_metadata(header.metadata)
    for module in modules.values():
        if module.alpha is None and module.part == DENOISER:
            module.alpha = said


def _alpha_in_metadata(metadata: Mapping[str, str]) -> float | None:
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except (ValueError, RecursionError):
        settings = {}
    values = settings if isinstance(settings, dict) else {}
    stated = [values.get(f"{prefix}lora_alpha") for prefix in ("unet.", "transformer.", "")]
    for value in (*stated, metadata.get("ss_network_alpha")):
        try:
            return _finite(float(value))  # type: ignore[arg-type]  # None raises TypeError, as the JSON's lists do
        except (TypeError, ValueError, OverflowError):
            continue
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- Metadata, to be shown --------------------------------------------------------------------------------------------
GROUPS = (("lorapilot_", "LoRA Pilot"), ("modelspec.", "ModelSpec"), ("ss_", "Training (sd-scripts)"))


@dataclass(frozen=True)
class MetadataRow:
    group: str
    key: str
    value: str
    is_cut: bool = False


def metadata_rows(metadata: Mapping[str, str]) -> list[MetadataRow]:
    """Key and value, ours first, at most 300 of them and 2,000 characters of each value. Pictures are left out."""
    titles = [title for _, title in GROUPS]
    rows = [_row(key, metadata[key]) for key in metadata]
    order = {title: place for place, title in enumerate([*titles, "Other"])}
    return sorted(rows, key=lambda row: (order[row.group], row.key))[:MOST_ROWS]


def _row(key: str, value: str) -> MetadataRow:
    group = next((title for start, title in GROUPS if key.startswith(start)), "Other")
    if value.startswith("data:image/"):
        value = f"(a picture of {len(value):,} characters)"
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in value[:MOST_VALUE_CHARACTERS])
    return MetadataRow(group, key[:200], shown, is_cut=len(value) > MOST_VALUE_CHARACTERS)


__all__ = [
    "STYLES",
    "LoraContents",
    "LoraPart",
    "MetadataRow",
    "Unrecognised",
    "metadata_rows",
    "recognise_lora",
    "refuse_pickle",
]
