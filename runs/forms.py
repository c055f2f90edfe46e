"""The run form: the essentials, a field for each setting of the RunSpec, made from its options, and lists of values for
many runs at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django import forms

from datasets.models import Dataset
from lorapilot.access import is_number
from lorapilot.models import User
from models_registry.models import BaseModel
from models_registry.selectors import list_base_models
from runs.enums import Priority, Profile
from runs.models import Run
from runs.spec import DEFAULTS, OPTIONS, TYPES, Option
from runs.stacks import STACKS
from runs.stacks.option_table import StackOption, editable

ESSENTIALS = ("dataset", "base_model", "output_name", "stack", "profile", "priority")
OWN = "option-"  # before the names of fields of a stack's own options
VARIED = ("profile", "rank", "learning_rate", "seed")  # what many runs at once may differ in
VARY = "vary_"  # before the names of their fields


class ListOf(forms.CharField):
    """Numbers between commas (or spaces), as a list without repetitions."""

    def __init__(self, kind: Callable[[str], Any], **kwargs: Any) -> None:
        super().__init__(required=False, max_length=1000, **kwargs)
        self.kind = kind
        self.widget.attrs |= {"autocomplete": "off"}

    def clean(self, value: Any) -> Any:
        parts = str(super().clean(value)).replace(",", " ").replace(";", " ").split()
        try:
            return list(dict.fromkeys(self.kind(part) for part in parts))
        except ValueError:
            kind = "whole numbers" if self.kind is int else "numbers"
            raise forms.ValidationError(f"Write {kind} with commas between them.") from None


class RunForm(forms.Form):
    """Settings left empty take the profile's value, or the default."""

    origin: Run | None = None  # the run that the new one begins as a copy of: see runs/cloning.py

    dataset = forms.ModelChoiceField(Dataset.objects.none(), empty_label="Choose a dataset")
    base_model = forms.ModelChoiceField(BaseModel.objects.none(), empty_label="Choose a base model")
    output_name = forms.CharField(
        max_length=100, help_text="Names the result's folder and file: letters, digits, '.', '_' and '-'."
    )
    stack = forms.ChoiceField(required=False, label="Trainer", initial="builtin")
    profile = forms.ChoiceField(
        required=False,
        choices=[("", "My own values"), *Profile.choices],
        initial=Profile.REGULAR,
        help_text="TrainPilot's guided settings. Values of your own below win over it.",
    )
    priority = forms.TypedChoiceField(
        required=False,
        coerce=int,
        initial=Priority.NORMAL,
        help_text="Higher starts first. Staff give high priority: it passes by the runs of others.",
    )
    vary_profile = forms.MultipleChoiceField(
        required=False, label="Profiles", choices=Profile.choices, widget=forms.CheckboxSelectMultiple
    )
    vary_rank = ListOf(int, label="Ranks", help_text="Such as 8, 16, 32. Alpha and convolution rank stay as they are.")
    vary_learning_rate = ListOf(float, label="Learning rates", help_text="Such as 1e-4, 5e-5.")
    vary_seed = ListOf(int, label="Seeds", help_text="Such as 1, 2, 3.")

    def __init__(self, user: User, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.user = user
        self.fields["dataset"].queryset = Dataset.objects.visible_to(user)  # type: ignore[attr-defined]  # a ModelChoiceField
        self.fields["base_model"].queryset = list_base_models(user)  # type: ignore[attr-defined]  # as above
        self.fields["priority"].choices = priority_choices(user)  # type: ignore[attr-defined]  # as above
        self.fields["stack"].choices = [(key, stack.name) for key, stack in STACKS.items()]  # type: ignore[attr-defined]  # as above
        for name, described in OPTIONS.items():
            self.fields[name] = _field(name, described)
        self.own = self._own_options(user)
        for option in self.own:
            self.fields[f"{OWN}{option.key}"] = _option_field(option)

    def _own_options(self, user: User) -> list[StackOption]:
        """The chosen trainer's own options, for the kind of the chosen base model."""
        trainer = STACKS.get(self["stack"].value() or "builtin")
        table = trainer.table() if trainer else None
        chosen = str(self["base_model"].value() or "")
        model = list_base_models(user).filter(pk=chosen).first() if is_number(chosen) else None
        return editable(table, model.architecture) if table and model else []

    def clean_stack(self) -> str:
        return self.cleaned_data["stack"] or "builtin"

    def clean_priority(self) -> int:
        return self.cleaned_data["priority"] or Priority.NORMAL

    def values(self) -> dict[str, Any]:
        """The settings that the user gave."""
        return {name: self.cleaned_data[name] for name in OPTIONS if self.cleaned_data.get(name) not in (None, "")}

    def options(self) -> dict[str, Any]:
        """The trainer's own options that the user gave, as they were typed: the option table converts them."""
        given = {option.key: self.cleaned_data.get(f"{OWN}{option.key}") for option in self.own}
        return {key: value for key, value in given.items() if value not in (None, "")}

    def varied(self) -> dict[str, list[Any]]:
        """Lists of values by setting, for one run of each combination; empty for a single run."""
        given = {name: self.cleaned_data.get(f"{VARY}{name}") for name in VARIED}
        return {name: values for name, values in given.items() if values}

    def field_of(self, setting: str) -> str | None:
        """The field that an error about `setting` belongs to; None: to the form."""
        if setting in VARIED and self.varied().get(setting):
            return f"{VARY}{setting}"
        if setting.startswith("options."):
            setting = f"{OWN}{setting.removeprefix('options.')}"
        return setting if setting in self.fields else None

    @property
    def asks_for_many(self) -> bool:
        """Whether anything was written into the lists, be it right or wrong."""
        return any(self[f"{VARY}{name}"].value() for name in VARIED)

    @property
    def groups(self) -> list[tuple[str, list[forms.BoundField]]]:
        """(heading, fields) of the user's own values, as the page shows them."""
        found: dict[str, list[forms.BoundField]] = {}
        for name, described in OPTIONS.items():
            found.setdefault(described.group, []).append(self[name])
        return list(found.items())

    @property
    def option_groups(self) -> list[tuple[str, list[tuple[forms.BoundField, StackOption]]]]:
        """(heading, fields) of the trainer's own options."""
        found: dict[str, list[tuple[forms.BoundField, StackOption]]] = {}
        for option in self.own:
            found.setdefault(option.group, []).append((self[f"{OWN}{option.key}"], option))
        return list(found.items())

    @property
    def kept(self) -> dict[str, str]:
        """Options that were typed for another trainer or base model, by field: they wait until it is chosen again."""
        unseen = [name for name in self.data if name.startswith(OWN) and name not in self.fields]
        return {name: self.data[name] for name in unseen if self.data[name]}

    @property
    def options_given(self) -> int:
        return sum(bool(self[f"{OWN}{option.key}"].value()) for option in self.own)


def priority_choices(user: User) -> list[tuple[int, str]]:
    """The priorities that `user` may give, lowest first."""
    return [(value, str(label)) for value, label in Priority.choices if user.is_staff or value <= Priority.NORMAL]


class PriorityForm(forms.Form):
    priority = forms.IntegerField()


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


def _option_field(option: StackOption) -> forms.Field:
    """One of a trainer's own options. It holds text: the option table itself checks it, so that form and API say the
    same."""
    common: dict[str, Any] = {"label": option.label, "help_text": option.help, "required": False}
    if option.type in ("bool", "choice"):
        answers = [("true", "Yes"), ("false", "No")] if option.type == "bool" else [(c, c) for c in option.choices]
        return forms.CharField(widget=forms.Select(choices=[("", "As the trainer does"), *answers]), **common)
    placeholder = {"placeholder": _shown(option.example if option.default is None else option.default)}
    if option.type in LISTS:
        return forms.CharField(widget=forms.Textarea(attrs={"rows": 2} | placeholder), **common)
    if option.type in ("int", "float"):
        kind = {"step": "any"} if option.type == "float" else {}
        return forms.CharField(widget=forms.NumberInput(attrs=placeholder | kind), **common)
    return forms.CharField(widget=forms.TextInput(attrs=placeholder), **common)


LISTS = {"names", "words"}


def _shown(value: Any) -> str:
    """A default or an example, as a person would type it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) if not any("=" in str(one) for one in value) else "\n".join(value)
    return "" if value is None else str(value)


class PublishForm(forms.Form):
    """What a LoRA is called where other programs find it; publishing.publish_checkpoint checks it."""

    name = forms.CharField(
        max_length=112,  # 100, and .safetensors
        help_text="The name of the file, without .safetensors. It is what you choose in ComfyUI and InvokeAI.",
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false"}),
    )
