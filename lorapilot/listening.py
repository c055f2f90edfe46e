"""The listening socket, which `manage.py up` opens and hands down to the web server."""

from __future__ import annotations

import errno
import socket
import time


def listen(host: str, port: int, *, patience_seconds: float = 0.0) -> socket.socket:
    """A listening socket; port 0: any free port. An instance that is just going away gets `patience_seconds` to do so.

    Raises OSError when the address stays taken, or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=512)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def address_of(listening: socket.socket) -> str:
    """As a person types it into a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 compared, not listened on
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
