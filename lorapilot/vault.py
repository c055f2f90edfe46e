"""Encrypts people's keys of other services, so that a copy of the database alone opens nothing there.

The key is derived from SECRET_KEY: who changes that has to enter the keys of other services again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from cryptography.fernet import Fernet, InvalidToken
from django.conf import settings

PURPOSE = b"lorapilot.Secret"


def encrypt(value: str) -> str:
    return _fernet().encrypt(value.encode()).decode()


def decrypt(value: str) -> str | None:
    """The secret; None when it was encrypted under another SECRET_KEY, or was tampered with."""
    try:
        return _fernet().decrypt(value.encode()).decode()
    except InvalidToken:
        return None


def _fernet() -> Fernet:
    derived = hmac.digest(settings.SECRET_KEY.encode(), PURPOSE, hashlib.sha256)
    return Fernet(base64.urlsafe_b64encode(derived))
