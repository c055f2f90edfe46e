from __future__ import annotations

from django.apps import AppConfig


class LoraPilotConfig(AppConfig):
    name = "lorapilot"

    def ready(self) -> None:
        """Connect what records sign-ins, and the system checks."""
        from lorapilot import accounts, checks  # noqa: F401
