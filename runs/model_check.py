"""Which model files a configuration names, whether they are here, and what would bring the missing ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorapilot import workspace
from lorapilot.models import User
from models_registry import manifest
from models_registry.manifest import Entry
from models_registry.manifest_selectors import manifest_rows
from models_registry.models import BaseModel
from runs.planning import model_facts
from runs.stacks.base import ModelFacts, Stack
from runs.stacks.importing import read_toml, without_sections

KINDS = {"pretrained_model_name_or_path": "checkpoint", "vae": "vae"}
# A repository on the Hugging Face hub, which the trainer would get itself: `owner/name`.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")


@dataclass(frozen=True, slots=True)
class Item:
    """One file that a configuration names. `exists` is None for an id on the hub: nobody looked there."""

    kind: str
    key: str
    value: str
    is_local_path: bool
    exists: bool | None
    model_name: str  # of the manifest's entry that would bring it
    reason: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Remedy:
    """An entry of the manifest that would bring what a trainer lacks for a model, and whether it is here already."""

    name: str
    title: str
    is_here: bool


def remedies(stack: Stack, base_model: BaseModel, user: User) -> list[Remedy]:
    """What could be pulled, or attached, so that `stack` can train `base_model`; empty when it lacks nothing."""
    facts = model_facts(base_model)
    refusal = stack.refusal(facts) if facts.architecture in stack.architectures else ""
    if not refusal:
        return []
    entries = [entry for entry in manifest.load().entries if _would_help(entry, stack, facts, refusal)]
    return [Remedy(row.name, row.entry.role_title, row.installed) for row in manifest_rows(user, entries)]


def _would_help(entry: Entry, stack: Stack, facts: ModelFacts, refusal: str) -> bool:
    if stack.key not in entry.stacks or entry.architecture not in ("", facts.architecture):
        return False
    if entry.role == "tokenizer":
        return entry.name in refusal
    return not entry.is_registrable and entry.role not in facts.parts


def check_configuration(text: str) -> list[Item]:
    """The model files of a configuration in sd-scripts' keys. Raises UserError for one that cannot be read."""
    return check_keys(without_sections(read_toml(text)))


def check_keys(keys: Mapping[str, Any]) -> list[Item]:
    return [_item(kind, key, str(keys[key])) for key, kind in KINDS.items() if keys.get(key)]


def _item(kind: str, key: str, value: str) -> Item:
    if _exists(value):
        return Item(kind, key, value, True, True, "", "")
    if HUB_ID.fullmatch(value) and not value.lower().endswith(FILE_ENDINGS):
        reason = f"{value} is a Hugging Face id. Runs stay off the network: name a model of the models folder instead."
        return Item(kind, key, value, False, None, "", reason)
    entry = manifest.entry_for_file(value)
    remedy = f"Pull {entry.name} on the Models page: it brings {Path(value).name}." if entry else "Put the file there."
    return Item(
        kind,
        key,
        value,
        True,
        False,
        entry.name if entry else "",
        f"There is no {value} in the models folder. {remedy}",
    )


def _exists(value: str) -> bool:
    """Inside the models folder; what lies elsewhere cannot be trained on."""
    try:
        return workspace.inside(workspace.models(), value).exists()
    except ValueError:
        return False
