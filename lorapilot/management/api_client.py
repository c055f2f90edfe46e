"""A client of LoRA Pilot's API, as any script could be: HTTP with a token, live progress by websocket.

The demo trains through it; docs/api.md explains each call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import requests
from websockets.sync.client import connect
from websockets.typing import Origin

RECONNECTS = 20


class ApiError(Exception):
    """The platform refused a call: its `detail` sentence."""


class Client:
    """Use it as a context manager. `base_url` is e.g. http://127.0.0.1:7878."""

    def __init__(self, base_url: str, token: str) -> None:
        self.base_url = base_url.rstrip("/")
        self.http = requests.Session()
        self.http.headers["Authorization"] = f"Token {token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer. Raises ApiError for a refusal."""
        answer = self.ask(method, path, **options)
        return answer.json() if answer.content else None

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """An answer, whatever is in it. Raises ApiError for a refusal."""
        answer = self.http.request(method, f"{self.base_url}/api/v1{path}", timeout=60, **options)
        if not answer.ok:
            raise ApiError(_detail(answer))
        return answer

    def find(self, path: str, name: str) -> dict[str, Any] | None:
        """The first object of a list that has this name."""
        found = self.call("GET", path, params={"name": name, "page_size": 500})["results"]
        return next((item for item in found if item["name"] == name), None)

    def upload_pictures(self, dataset_id: int, files: list[Path]) -> dict[str, Any]:
        """Pictures and their .txt captions in one request (up to 32 MiB; larger ones go through /uploads/)."""
        parts = [("files", (file.name, file.read_bytes())) for file in files]
        report: dict[str, Any] = self.call("POST", f"/datasets/{dataset_id}/pictures/", files=parts)
        return report

    def follow(self, run_id: int) -> Iterator[dict[str, Any]]:
        """The websocket's text messages until the run has ended. A lost connection is opened again."""
        address = self.base_url.replace("http", "ws", 1)
        for _ in range(RECONNECTS):
            try:
                with connect(f"{address}/ws/runs/{run_id}/", origin=Origin(self.base_url)) as socket:
                    ticket = self.call("POST", "/tickets/")["ticket"]
                    socket.send(json.dumps({"type": "ticket", "ticket": ticket}))
                    for frame in socket:
                        if isinstance(frame, str):
                            message = json.loads(frame)
                            yield message
                            if message["type"] == "status" and message["run"]["is_terminal"]:
                                return
            except OSError:
                continue
        raise ApiError("The connection was lost too often. The run goes on; its page shows it.")


def _detail(answer: requests.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.request.method} {answer.request.url} answered {answer.status_code}."
