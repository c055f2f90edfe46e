"""Which model files a configuration names, whether they are here, and what would bring the missing ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorapilot import workspace
from lorapilot.models import User
from models_registry import manifest
from models_registry.manifest import Entry
from models_registry.manifest_selectors import installed_bytes, manifest_rows, target_of
from models_registry.models import BaseModel, Pull
from runs.planning import model_facts
from runs.stacks.base import ModelFacts, Stack
from runs.stacks.importing import read_toml, without_sections
from runs.stacks.kohya import PART_KEYS

# Each key of sd-scripts that names a model file, and what it is: the checkpoint, or a part by its role.
KINDS = {"pretrained_model_name_or_path": "checkpoint", **PART_KEYS}
# Parts that a kind of model shares with another one, whose entries of the manifest bring them.
SHARED = {"chroma": {"t5": "flux", "vae": "flux"}, "lumina2": {"vae": "flux"}, "z_image": {"vae": "flux"}}
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
    model_name: str  # of the manifest's entry that would bring it; empty when it is here, elsewhere
    reason: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Remedy:
    """An entry of the manifest that would bring what is missing, where it goes, and whether it is here already."""

    name: str
    role: str
    title: str  # of the role
    path: str  # in the models folder
    is_here: bool


def remedies(stack: Stack, base_model: BaseModel, user: User) -> list[Remedy]:
    """What could be pulled, or attached, so that `stack` can train `base_model`; empty when it lacks nothing."""
    facts = model_facts(base_model)
    refusal = stack.refusal(facts) if facts.architecture in stack.architectures else ""
    if not refusal:
        return []
    entries = [entry for entry in manifest.load().entries if _would_help(entry, stack, facts, refusal)]
    return _remedies(user, entries)


def pulls_for(items: Iterable[Item], user: User) -> list[Remedy]:
    """What could be pulled so that the files of a configuration are here."""
    names = {item.model_name for item in items}
    return _remedies(user, [entry for entry in manifest.load().entries if entry.name in names])


def _remedies(user: User, entries: Iterable[Entry]) -> list[Remedy]:
    rows = manifest_rows(user, entries)
    return [Remedy(row.name, row.role, row.entry.role_title, row.path, row.installed) for row in rows]


def _would_help(entry: Entry, stack: Stack, facts: ModelFacts, refusal: str) -> bool:
    shared = SHARED.get(facts.architecture, {}).get(entry.role, "")
    if stack.key not in entry.stacks or entry.architecture not in ("", facts.architecture, shared):
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
    model_name, remedy = _remedy_of(entry, value) if entry else ("", "Put the file there.")
    return Item(kind, key, value, True, False, model_name, f"There is no {value} in the models folder. {remedy}")


def _remedy_of(entry: Entry, value: str) -> tuple[str, str]:
    """The entry's name, when a pull would bring the file, and what to do. A pull puts it where the manifest says, or
    where the last pull did; a configuration that looks elsewhere has to be changed, too."""
    pull = Pull.objects.filter(name=entry.name).first()
    path = target_of(entry, pull)
    if installed_bytes(entry, pull) is not None:
        return "", f"That file is at {path}: write this path instead."
    remedy = f"Pull {entry.name} on the Models page: it brings {entry.file_name}"
    return entry.name, f"{remedy}." if _is_at(value, path) else f"{remedy} to {path}: write this path instead."


def _is_at(value: str, path: str) -> bool:
    root = workspace.models()
    try:
        return workspace.inside(root, value) == workspace.inside(root, path)
    except ValueError:
        return False


def _exists(value: str) -> bool:
    """Inside the models folder; what lies elsewhere cannot be trained on."""
    try:
        return workspace.inside(workspace.models(), value).exists()
    except ValueError:
        return False
