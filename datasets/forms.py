"""Forms of the dataset pages. Services decide what is valid; a form shows what they say at its field."""

from __future__ import annotations

from typing import Any

from django import forms

from datasets import caption_tables, captions
from datasets.batches import ImportChoices, checked_choices
from datasets.captions import MAX_CHARACTERS
from datasets.pictures import NAME_ENDINGS


class DatasetForm(forms.Form):
    name = forms.CharField(max_length=100, widget=forms.TextInput(attrs={"autocomplete": "off"}))
    trigger_word = forms.CharField(
        max_length=100,
        required=False,
        help_text="The word that calls the concept in a prompt, for example “ohwx”. You can set it later.",
        widget=forms.TextInput(attrs={"autocomplete": "off", "autocapitalize": "none", "spellcheck": "false"}),
    )


class CaptionForm(forms.Form):
    # Line breaks count as two characters here, and the service folds them: it has the last word on the length.
    caption = forms.CharField(required=False, max_length=2 * MAX_CHARACTERS)
    revision = forms.IntegerField(required=False, min_value=1)

    def sentence(self) -> str:
        """What is wrong."""
        if "caption" in self.errors:
            return "The caption is too long. Shorten it."
        return "The page is out of date. Reload it."


class SeveralFilesInput(forms.ClearableFileInput):
    allow_multiple_selected = True


class SeveralFilesField(forms.FileField):
    """A list of files; FileField itself takes one."""

    widget = SeveralFilesInput

    def clean(self, data: Any, initial: Any = None) -> list[Any]:
        given = data if isinstance(data, list | tuple) else [data]
        return [super(SeveralFilesField, self).clean(one, initial) for one in given or [None]]


ACCEPTED = ",".join((*NAME_ENDINGS, *captions.ENDINGS, *caption_tables.ENDINGS, ".zip"))


class ChoicesForm(forms.Form):
    fills = forms.BooleanField(required=False, label="Fill transparent parts", help_text="Otherwise they stay so.")
    colour = forms.CharField(required=False, initial="#ffffff", widget=forms.TextInput(attrs={"type": "color"}))
    replace_captions = forms.BooleanField(
        required=False,
        label="Replace captions",
        help_text="When a picture is here already and comes with another caption. Otherwise it keeps its own.",
    )

    def choices(self) -> ImportChoices:
        """What a valid form chose. Raises UserError."""
        given = self.cleaned_data
        flatten = given["colour"] if given["fills"] else ""
        return checked_choices(flatten=flatten, replaces_captions=given["replace_captions"])


class UploadForm(ChoicesForm):
    files = SeveralFilesField(  # type: ignore[assignment]  # form["files"]; form.files is Django's own
        label="Pictures, captions or ZIP archives",
        allow_empty_file=True,  # an empty caption file is a caption; an empty picture is refused by name
        widget=SeveralFilesInput(attrs={"accept": ACCEPTED}),
        error_messages={"required": "Choose at least one file."},
    )
