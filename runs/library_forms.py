"""Forms of the LoRA library. Services decide what is valid."""

from __future__ import annotations

from django import forms

TEXT = {"autocomplete": "off", "autocapitalize": "none", "spellcheck": "false"}


class AdapterForm(forms.Form):
    name = forms.CharField(max_length=100)
    trigger_word = forms.CharField(max_length=100, required=False, widget=forms.TextInput(attrs=TEXT))
    tags = forms.CharField(
        max_length=2000,
        required=False,
        help_text="Your own words, with commas between them, to find it by.",
        widget=forms.TextInput(attrs=TEXT | {"list": "tags-in-use"}),
    )

    def clean_tags(self) -> list[str]:
        given: str = self.cleaned_data["tags"]
        return given.split(",")


class LoraUploadForm(forms.Form):
    file = forms.FileField(
        label="A .safetensors file",
        widget=forms.ClearableFileInput(attrs={"accept": ".safetensors"}),
        error_messages={"required": "Choose a file."},
    )
