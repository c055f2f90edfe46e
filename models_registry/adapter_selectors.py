"""Reads of LoRAs: what a user may see of the library, and what a file says of itself now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import Q, QuerySet
from django.shortcuts import get_object_or_404

from lorapilot import workspace
from lorapilot.access import Viewer
from lorapilot.models import User
from models_registry.lora_recognition import LoraContents, Unrecognised, recognise_lora
from models_registry.models import Adapter, AdapterTag, AdapterUpload


@dataclass(frozen=True)
class Look:
    """What the file holds now, or why it cannot be read."""

    contents: LoraContents | None
    problem: str = ""


def list_adapters(user: Viewer) -> QuerySet[Adapter]:
    """The LoRAs that `user` may see, the newest first, with all that a list shows."""
    found: QuerySet[Adapter] = Adapter.objects.visible_to(user)
    return found.select_related("owner", "base_model").prefetch_related("tags", "groups", "editor_groups")


def search_adapters(
    user: Viewer, *, text: str = "", architecture: str = "", tag: str = "", owner: str = ""
) -> QuerySet[Adapter]:
    """Those whose name, trigger word, base model, tag or owner contains `text`; the others match as a whole."""
    found = list_adapters(user)
    if text:
        anywhere = ("name", "trigger_word", "base_model_name", "base_model__name", "tags__word", "owner__username")
        matching = Q()
        for column in anywhere:
            matching |= Q(**{f"{column}__icontains": text})
        found = found.filter(pk__in=Adapter.objects.filter(matching).values("pk"))
    if architecture:
        found = found.filter(architecture=architecture)
    if tag:
        found = found.filter(pk__in=AdapterTag.objects.filter(word=tag.lower()).values("adapter"))
    if owner:
        found = found.filter(owner__username=owner)
    return found


def tags_in_use(user: Viewer) -> list[str]:
    """The tags on LoRAs that `user` may see."""
    tags = AdapterTag.objects.filter(adapter__in=Adapter.objects.visible_to(user).values("pk"))
    return list(tags.order_by("word").values_list("word", flat=True).distinct())


def owners_of(user: Viewer) -> list[str]:
    """Whose LoRAs `user` may see."""
    seen = Adapter.objects.visible_to(user).values("owner")
    return list(User.objects.filter(pk__in=seen).order_by("username").values_list("username", flat=True))


def file_of(adapter: Adapter) -> Path:
    """Where the file lies. Raises ValueError when a link there has come to lead out of the workspace."""
    return workspace.inside(settings.WORKSPACE, adapter.path)


def look_into(adapter: Adapter) -> Look:
    """Read the file's header again (milliseconds)."""
    try:
        return Look(recognise_lora(file_of(adapter), name=f"{adapter.name}.safetensors"))
    except Unrecognised as error:
        return Look(None, str(error))
    except (OSError, ValueError):
        return Look(None, f"The file of {adapter.name} cannot be read.")


def open_upload(user: User, *, upload_id: Any) -> AdapterUpload:
    """Only who began an upload goes on with it."""
    return get_object_or_404(AdapterUpload.objects.select_related("job__owner"), owner=user, pk=upload_id)
