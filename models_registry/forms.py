"""The forms that register a base model and attach files to one. What they mean is decided by the services alone."""

from __future__ import annotations

from typing import Any

from django import forms
from django.template.defaultfilters import filesizeformat

from models_registry.enums import ATTACHABLE, describe_role
from models_registry.selectors import PartCandidate


class RegisterForm(forms.Form):
    path = forms.CharField(
        max_length=500,
        label="Path",
        help_text="A diffusers folder or a .safetensors file, relative to the models folder.",
        widget=forms.TextInput(attrs={"placeholder": "sdxl/my-model.safetensors", "autocomplete": "off"}),
    )
    name = forms.CharField(
        max_length=100, required=False, label="Name", help_text="What people call it here. Empty: the file's name."
    )


class AttachForm(forms.Form):
    """One file by role: chosen among those that were found, or by its path, which wins."""

    role = forms.ChoiceField(label="What it is", choices=[(role, describe_role(role)) for role in ATTACHABLE])
    found = forms.ChoiceField(label="Found in the models folder", required=False)
    path = forms.CharField(
        max_length=500,
        required=False,
        label="Or its path",
        help_text="A .safetensors file, or a folder with config.json, relative to the models folder.",
        widget=forms.TextInput(attrs={"placeholder": "text_encoders/t5xxl.safetensors", "autocomplete": "off"}),
    )

    def __init__(self, *args: Any, candidates: list[PartCandidate], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        titles = [(one.path, f"{one.path} – {one.title}, {filesizeformat(one.bytes)}") for one in candidates]
        self.fields["found"].choices = [("", "Choose a file"), *titles]  # type: ignore[attr-defined]  # it has them

    def clean(self) -> dict[str, Any]:
        values = super().clean() or self.cleaned_data
        values["path"] = values.get("path") or values.pop("found", "")
        values.pop("found", None)
        return values

    def field_of(self, field: str) -> str | None:
        """Where an error of the service belongs: a path may have been chosen instead of typed."""
        return "found" if field == "path" and self.data.get("found") and not self.data.get("path") else field or None
