"""The form of bulk edits. Services decide what is valid."""

from __future__ import annotations

from django import forms

from datasets.caption_operations import LONGEST_TEXT, Kind, Operation

QUIET = {"autocomplete": "off", "autocapitalize": "none", "spellcheck": "false"}


class OperationForm(forms.Form):
    kind = forms.ChoiceField(choices=Kind.choices, label="What to do")
    text = forms.CharField(
        required=False, strip=False, max_length=LONGEST_TEXT, label="Text or tags", widget=forms.TextInput(attrs=QUIET)
    )
    replacement = forms.CharField(
        required=False, strip=False, max_length=LONGEST_TEXT, label="Replace by", widget=forms.TextInput(attrs=QUIET)
    )
    at_start = forms.BooleanField(required=False, label="Add at the start")

    def operation(self) -> Operation:
        return Operation(**self.cleaned_data)


class TagListForm(forms.Form):
    file = forms.FileField(
        allow_empty_file=True,
        label="Tag list",
        help_text="A text file with a tag, or <code>tag,count</code>, in each line. It replaces the one before.",
        widget=forms.ClearableFileInput(attrs={"accept": ".txt,.csv"}),
    )
