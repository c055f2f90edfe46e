"""Forms of the account page and of invitations, and the one that shares something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django import forms
from django.conf import settings
from django.contrib.auth.models import Group

from lorapilot.access import SharedToEdit
from lorapilot.invitations import DAYS, DAYS_AT_MOST
from lorapilot.models import SecretName, TokenScope, User
from lorapilot.selectors import shareable_groups
from lorapilot.services import SECRET_CHARACTERS_AT_MOST, TOKEN_DAYS_AT_MOST


class TokenForm(forms.Form):
    name = forms.CharField(max_length=100, help_text="For you: the computer or script that will use it.")
    scope = forms.ChoiceField(
        choices=[(TokenScope.READ, "Read only"), (TokenScope.WRITE, "Read and write")],
        initial=TokenScope.WRITE,
        help_text="Read: look and download. Write: everything that you may do yourself.",
    )
    days = forms.IntegerField(
        initial=settings.API_TOKEN_DAYS,
        label="Valid for (days)",
        widget=forms.NumberInput(attrs={"min": 1, "max": TOKEN_DAYS_AT_MOST}),
        help_text=f"1 to {TOKEN_DAYS_AT_MOST}.",
    )


class SecretForm(forms.Form):
    name = forms.ChoiceField(choices=SecretName.choices, label="Service")
    value = forms.CharField(
        max_length=SECRET_CHARACTERS_AT_MOST,
        label="Key",
        widget=forms.PasswordInput(attrs={"autocomplete": "off"}),
        help_text="Kept encrypted, and never shown again.",
    )


class InvitationForm(forms.Form):
    note = forms.CharField(max_length=100, required=False, label="For whom", help_text="Only staff read it.")
    days = forms.IntegerField(
        initial=DAYS,
        label="Valid for (days)",
        widget=forms.NumberInput(attrs={"min": 1, "max": DAYS_AT_MOST}),
        help_text=f"1 to {DAYS_AT_MOST}.",
    )
    groups = forms.ModelMultipleChoiceField(
        queryset=Group.objects.order_by("name"),
        required=False,
        widget=forms.CheckboxSelectMultiple,
        help_text="The new account is in these groups.",
    )


class ShareForm(forms.Form):
    """What the members of each group may do: one field for each that `user` may pick."""

    LOOK, EDIT = "view", "edit"
    CHOICES = (("", "No access"), (LOOK, "Can look"), (EDIT, "Can look and change"))

    def __init__(self, *args: Any, user: User, thing: SharedToEdit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = list(shareable_groups(user, thing=thing))
        looking, editing = set(thing.groups.all()), set(thing.editor_groups.all())
        for group in self.groups:
            now = self.EDIT if group in editing else self.LOOK if group in looking else ""
            field = forms.ChoiceField(label=group.name, choices=self.CHOICES, required=False, initial=now)
            self.fields[f"group_{group.pk}"] = field

    def chosen(self) -> dict[str, list[Group]]:
        """For `lorapilot.services.share`."""
        return {"groups": list(self._with(self.LOOK, self.EDIT)), "editor_groups": list(self._with(self.EDIT))}

    def _with(self, *access: str) -> Iterator[Group]:
        return (group for group in self.groups if self.cleaned_data[f"group_{group.pk}"] in access)
