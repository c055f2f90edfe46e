from django.apps import AppConfig


class LoraPilotConfig(AppConfig):
    name = "lorapilot"
