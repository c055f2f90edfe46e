"""Keys of other services that a trainer needs: from its owner's account into its environment, never into a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapilot.errors import UserError
from lorapilot.models import SecretName, User
from lorapilot.selectors import reveal_secret
from runs.stacks.base import Stack

VARIABLES = {SecretName.WANDB: "WANDB_API_KEY"}


def secret_environment(owner: User, stack: Stack, options: Mapping[str, Any]) -> dict[str, str]:
    """The variables that these options ask for. Raises UserError for a key that the owner has not set."""
    table = stack.table()
    asking = [table.options[key] for key, value in options.items() if value] if table else []
    found: dict[str, str] = {}
    for option in asking:
        if not option.secret:
            continue
        service = SecretName(option.secret)
        value = reveal_secret(owner, service)
        if not value:
            sentence = f"{option.key} needs your key of {service.label}: set it on your account page, or leave it off."
            raise UserError(sentence, field=option.field_name)
        found[VARIABLES[service]] = value
    return found
