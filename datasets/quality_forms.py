"""Forms of the pages of quality and edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from django import forms

from datasets.edits import ROTATIONS, Box
from lora_trainer.buckets import BucketRules, rules_in_proportion
from lorapilot.errors import UserError

USUAL_RESOLUTION = 1024
ON_OFF = [("on", "Yes"), ("off", "No")]


class BucketForm(forms.Form):
    """Resolution and bucket settings, as the built-in trainer and Kohya take them. What is left empty is what the run
    form gives for the resolution."""

    resolution = forms.IntegerField(required=False, min_value=64, max_value=4096, label="Resolution")
    buckets = forms.ChoiceField(required=False, choices=ON_OFF, label="Aspect buckets")
    upscale = forms.ChoiceField(required=False, choices=ON_OFF, label="Enlarge small pictures")
    minimum = forms.IntegerField(required=False, min_value=8, max_value=8192, label="Shortest side of a bucket")
    maximum = forms.IntegerField(required=False, min_value=8, max_value=8192, label="Longest side of a bucket")
    step = forms.IntegerField(required=False, min_value=8, max_value=512, label="Step between buckets")

    def clean_resolution(self) -> int:
        resolution = self.cleaned_data["resolution"] or USUAL_RESOLUTION
        if resolution % 8:
            raise forms.ValidationError("Use a multiple of 8.")
        return int(resolution)

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        if not self.errors:
            self._check(self.rules())
        return given

    def _check(self, rules: BucketRules) -> None:
        """As the trainer does before it starts."""
        if rules.step % 8:
            self.add_error("step", "Use a multiple of 8.")
        if rules.enabled and rules.minimum % rules.step:
            self.add_error("minimum", f"Use a multiple of the step, {rules.step}.")
        if rules.enabled and not rules.minimum <= rules.resolution[0] <= rules.maximum:
            self.add_error("resolution", f"It must lie between the sides {rules.minimum} and {rules.maximum}.")

    def rules(self) -> BucketRules:
        """Of a form that is valid."""
        given = self.cleaned_data
        usual = rules_in_proportion(given["resolution"], enabled=given.get("buckets") != "off")
        own = {name: given[name] for name in ("minimum", "maximum", "step") if given.get(name)}
        return replace(usual, no_upscale=given.get("upscale") == "off", **own)


def rules_of(query: Mapping[str, Any]) -> BucketRules:
    """The bucket settings in an address. Raises UserError that names the one that cannot be."""
    form = BucketForm(query)
    if form.is_valid():
        return form.rules()
    name, errors = next(iter(form.errors.items()))
    raise UserError(f"{name}: {' '.join(map(str, errors))}", field=name)


def query_of(rules: BucketRules) -> dict[str, str]:
    """What `rules_of` takes, without what is usual."""
    resolution = rules.resolution[0]
    usual = rules_in_proportion(resolution)
    own = {name: getattr(rules, name) for name in ("minimum", "maximum", "step")}
    values = {name: str(value) for name, value in own.items() if value != getattr(usual, name)}
    if resolution != USUAL_RESOLUTION:
        values["resolution"] = str(resolution)
    if not rules.enabled:
        values["buckets"] = "off"
    if rules.no_upscale:
        values["upscale"] = "off"
    return values


class EditForm(forms.Form):
    """How a picture is turned and cropped; without sides it is whole."""

    rotation = forms.TypedChoiceField(choices=[(one, f"{one}°") for one in ROTATIONS], coerce=int)
    left = forms.IntegerField(required=False, min_value=0, label="Left")
    top = forms.IntegerField(required=False, min_value=0, label="Top")
    width = forms.IntegerField(required=False, min_value=1, label="Width")
    height = forms.IntegerField(required=False, min_value=1, label="Height")

    def crop(self) -> Box | None:
        given = self.cleaned_data
        if not given["width"] and not given["height"]:
            return None
        return given["left"] or 0, given["top"] or 0, given["width"] or 0, given["height"] or 0


class KeepForm(forms.Form):
    pictures = forms.TypedMultipleChoiceField(coerce=int)
    keep = forms.IntegerField()
    caption_of = forms.IntegerField()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.data.getlist("pictures") if hasattr(self.data, "getlist") else []
        choices = [(one, one) for one in given if one.isdecimal()]
        self.fields["pictures"].choices = choices  # type: ignore[attr-defined]  # checked by the service
