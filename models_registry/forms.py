"""The form that registers a base model. What it means is decided by the service alone."""

from __future__ import annotations

from django import forms


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
