"""The ASGI application: HTTP by Django, websockets by runs/consumers.py."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorapilot.settings")
application = get_asgi_application()
