from __future__ import annotations

from django.apps import AppConfig


class LoraPilotConfig(AppConfig):
    name = "lorapilot"

    def ready(self) -> None:
        """Connect what records sign-ins."""
        from lorapilot import accounts  # noqa: F401
