"""Forms of the account page."""

from __future__ import annotations

from django import forms
from django.conf import settings

from lorapilot.models import SecretName, TokenScope
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
