"""The form for automatic captions: one field for each option of the table; services decide what is valid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django import forms

from datasets.captioning.enums import Captioner, Which
from datasets.captioning.options import (
    DEFAULT_PROMPT,
    FLAGS,
    MOST_PROMPT_CHARACTERS,
    NUMBERS,
    PROMPT_WITH_TRIGGER,
    TEXTS,
)
from datasets.captioning.services import Order
from datasets.models import Dataset
from lorapilot.access import is_number

LABELS = {
    "begin_with_trigger": "Begin each caption with the trigger word",
    "underscores_to_spaces": "Spaces instead of underscores",
}


class CaptioningForm(forms.Form):
    captioner = forms.ChoiceField(choices=Captioner.choices, label="With")
    model = forms.CharField(
        max_length=200,
        help_text="Its name at the provider, or its folder below the models folder.",
        widget=forms.TextInput(attrs={"autocomplete": "off", "autocapitalize": "none", "list": "local-models"}),
    )
    which = forms.ChoiceField(choices=Which.choices, initial=Which.MISSING, label="Pictures")
    overwrite = forms.BooleanField(
        required=False,
        label="Also those that have a caption",
        help_text="Off: pictures with a caption are skipped. Nothing is changed before you have looked at it.",
    )
    prompt = forms.CharField(
        required=False,
        max_length=MOST_PROMPT_CHARACTERS,
        widget=forms.Textarea(attrs={"rows": 4}),
        help_text="For providers: what to ask; {trigger} stands for the trigger word. For a transformers model: how "
        "its sentences begin, if you want that.",
    )
    exclude = forms.CharField(
        required=False, label="Tags to leave out", help_text="For the tagger. With commas between them."
    )
    pictures = forms.CharField(required=False, widget=forms.HiddenInput)

    def __init__(self, data: Any = None, *, dataset: Dataset, chosen: Iterable[int] = ()) -> None:
        super().__init__(data)
        self.dataset = dataset
        ids = list(chosen)
        for name, number in NUMBERS.items():
            field = forms.IntegerField if number.is_whole else forms.FloatField
            self.fields[name] = field(label=number.label, required=False, initial=number.default, help_text=number.help)
        for name, label in LABELS.items():
            self.fields[name] = forms.BooleanField(label=label, required=False, initial=True)
        if ids:
            self.initial["which"], self.initial["pictures"] = Which.SELECTED, ",".join(map(str, ids))
        self.initial["prompt"] = PROMPT_WITH_TRIGGER if dataset.trigger_word else DEFAULT_PROMPT

    def clean_pictures(self) -> list[int]:
        parts = self.cleaned_data["pictures"].split(",")
        if not all(is_number(part) for part in parts if part):
            raise forms.ValidationError("Name pictures by their ids, with commas between them.")
        return [int(part) for part in parts if part]

    def order(self) -> Order:
        """What was filled in, without what is for other captioners."""
        values = self.cleaned_data
        captioner = Captioner(values["captioner"])
        groups = {name: number.captioners for name, number in NUMBERS.items()} | FLAGS | TEXTS
        prompt = "" if values["prompt"] == self.initial["prompt"] and captioner == Captioner.SENTENCES else None
        options = {name: values[name] for name, captioners in groups.items() if captioner in captioners}
        return Order(
            captioner=captioner,
            model=values["model"],
            which=values["which"],
            overwrite=values["overwrite"],
            pictures=values["pictures"],
            options=options | ({"prompt": prompt} if prompt is not None else {}),
        )

    @property
    def chosen_count(self) -> int:
        return len([part for part in str(self["pictures"].value() or "").split(",") if part])
