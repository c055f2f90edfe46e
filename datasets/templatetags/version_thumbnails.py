"""The thumbnail of a picture that a version lists, where the dataset still has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import template
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from datasets.models import Dataset

register = template.Library()


@register.simple_tag
def version_thumbnail(dataset: Dataset, shown: Mapping[str, int], listed: Mapping[str, Any]) -> SafeString:
    """Media is reached through the dataset only, so a picture that left it is a blank square."""
    picture = shown.get(listed["sha256"])
    if picture is None:
        return format_html('<span class="{}" aria-hidden="true"></span>', "diff-blank")
    address = reverse("datasets:thumbnail", args=[dataset.pk, picture])
    return format_html('<img src="{}?v={}" alt="" loading="lazy">', address, listed["sha256"][:12])
