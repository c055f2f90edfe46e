"""The run form: the essentials, and one field for each setting of the RunSpec, made from its options."""

from __future__ import annotations

from typing import Any

from django import forms

from datasets.models import Dataset
from lorapilot.models import User
from models_registry.models import BaseModel
from models_registry.selectors import list_base_models
from runs.enums import Profile
from runs.spec import DEFAULTS, OPTIONS, TYPES, Option

ESSENTIALS = ("dataset", "base_model", "output_name", "profile")


class RunForm(forms.Form):
    """Settings left empty take the profile's value, or the default."""

    dataset = forms.ModelChoiceField(Dataset.objects.none(), empty_label="Choose a dataset")
    base_model = forms.ModelChoiceField(BaseModel.objects.none(), empty_label="Choose a base model")
    output_name = forms.CharField(
        max_length=100, help_text="Names the result's folder and file: letters, digits, '.', '_' and '-'."
    )
    profile = forms.ChoiceField(
        required=False,
        choices=[("", "My own values"), *Profile.choices],
        initial=Profile.REGULAR,
        help_text="TrainPilot's guided settings. Values of your own below win over it.",
    )

    def __init__(self, user: User, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["dataset"].queryset = Dataset.objects.visible_to(user)  # type: ignore[attr-defined]  # a ModelChoiceField
        self.fields["base_model"].queryset = list_base_models(user)  # type: ignore[attr-defined]  # as above
        for name, described in OPTIONS.items():
            self.fields[name] = _field(name, described)

    def values(self) -> dict[str, Any]:
        """The settings that the user gave."""
        return {name: self.cleaned_data[name] for name in OPTIONS if self.cleaned_data.get(name) not in (None, "")}

    @property
    def groups(self) -> list[tuple[str, list[forms.BoundField]]]:
        """(heading, fields) of the user's own values, as the page shows them."""
        found: dict[str, list[forms.BoundField]] = {}
        for name, described in OPTIONS.items():
            found.setdefault(described.group, []).append(self[name])
        return list(found.items())


def _field(name: str, described: Option) -> forms.Field:
    """One optional field; the RunSpec itself checks the bounds, so that form and API say the same."""
    common: dict[str, Any] = {"label": described.label, "help_text": described.help, "required": False}
    kind = TYPES[name]
    if kind is bool:
        answers = [("", "As the profile, or default"), ("true", "Yes"), ("false", "No")]
        return forms.TypedChoiceField(
            choices=answers, coerce=lambda answer: answer == "true", empty_value=None, **common
        )
    if described.choices:
        return forms.ChoiceField(
            choices=[("", "As the profile, or default"), *((c, c) for c in described.choices)], **common
        )
    placeholder = {"placeholder": f"{DEFAULTS[name]}"} if kind in (int, float) else {}
    if kind is int:
        return forms.IntegerField(widget=forms.NumberInput(attrs=placeholder), **common)
    if kind is float:
        return forms.FloatField(widget=forms.NumberInput(attrs=placeholder | {"step": "any"}), **common)
    return forms.CharField(widget=forms.Textarea(attrs={"rows": 4}), **common)
