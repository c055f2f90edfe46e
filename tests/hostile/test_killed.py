"""kill -9 in the middle: of a server that takes an upload, and of a worker that imports. Both go on, and nothing is
lost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
import time
import zipfile

import pytest
import requests
from PIL import Image

from tests.serving.conftest import wait_until

MIB = 1024**2
COUNT = 24
WORK = "import sys; from lorapilot import jobs; jobs.run_job(sys.argv[1])"
# A job whose worker is silent is handed out again; the clock is turned instead of waited for.
AGAIN = """
from datetime import timedelta
from django.utils import timezone
from lorapilot import jobs
from lorapilot.models import Job
Job.objects.filter(status="running").update(heartbeat_at=timezone.now() - timedelta(minutes=1))
assert jobs.restart_silent_jobs() == 1
jobs.run_job(str(Job.objects.get().pk))
"""
FACTS = """
import hashlib, json, sys
from datasets.models import Dataset, Upload
from datasets.services import picture_path
upload = Upload.objects.select_related("job", "dataset").get(pk=sys.argv[1])
rows = upload.dataset.pictures.order_by("original_name")
whole = [hashlib.sha256(picture_path(row.sha256, row.extension).read_bytes()).hexdigest() == row.sha256 for row in rows]
print(json.dumps([upload.offset, upload.job and upload.job.status, upload.job and upload.job.result,
    [[row.original_name, row.sha256, row.caption] for row in rows], all(whole)]))
"""


@pytest.fixture(scope="module")
def pictures():
    """{name: bytes}: noise, which takes a while to check, and captions."""
    found = {}
    for number in range(COUNT):
        file = io.BytesIO()
        Image.effect_noise((700, 700), 10 + number).convert("RGB").save(file, "PNG", compress_level=1)
        found[f"{number:02d}.png"] = file.getvalue()
        found[f"{number:02d}.txt"] = f"picture {number}".encode()
    return found


@pytest.fixture(scope="module")
def archive(pictures):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, content in pictures.items():
            target.writestr(name, content)
    return file.getvalue()


class Uploading:
    """A client of a server that may be gone."""

    def __init__(self, installation, started, tmp_path):
        self.installation, self.started, self.tmp_path = installation, started, tmp_path
        self.port = 0
        self.headers = {"Authorization": f"Token {installation.token}"}

    def start(self):
        argv = ["-m", "lorapilot.server", "--port", str(self.port)]
        self.server = self.started(
            argv, self.tmp_path / f"server{time.monotonic()}.txt", **self.installation.environment
        )
        self.port = int(self.server.wait_for(r"Listening on http://127\.0\.0\.1:(\d+)")[1])

    def ask(self, method, path, **more):
        more["headers"] = self.headers | more.pop("headers", {})
        return requests.request(method, f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=30, **more)

    def send(self, upload, offset, piece):
        headers = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": str(offset)}
        return self.ask("PATCH", f"uploads/{upload}/", data=piece, headers=headers)

    def send_half(self, upload, offset, piece):
        """Announce a piece, send half of it, and leave the connection open."""
        head = f"PATCH /api/v1/uploads/{upload}/ HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        head += f"Content-Length: {len(piece)}\r\n"
        head += f"Authorization: {self.headers['Authorization']}\r\nUpload-Offset: {offset}\r\n"
        head += "Content-Type: application/offset+octet-stream\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(head.encode() + piece[: len(piece) // 2])
        return connection


def test_killed_upload_and_killed_import_go_on(installation, started, tmp_path, pictures, archive):
    client = Uploading(installation, started, tmp_path)
    client.start()
    dataset = installation.datasets[1]
    size = 4 * MIB
    asked = {
        "dataset": dataset,
        "filename": "x.zip",
        "size": len(archive),
        "sha256": hashlib.sha256(archive).hexdigest(),
    }
    upload = client.ask("POST", "uploads/", json=asked).json()["id"]
    assert client.send(upload, 0, archive[:size]).status_code == 204

    # The server dies while a piece is on its way: what had arrived whole is there, and no more.
    with contextlib.closing(client.send_half(upload, size, archive[size : 2 * size])):
        client.server.stop(9)
    client.start()
    assert client.ask("GET", f"uploads/{upload}/").json()["offset"] == size
    offset = size
    while offset < len(archive):
        answer = client.send(upload, offset, archive[offset : offset + size])
        assert answer.status_code in (200, 204)
        offset = int(answer.headers["Upload-Offset"])
    job = answer.json()["job"]["id"]
    assert client.server.stop() == 0

    # The worker dies while it checks the pictures: the dataset is as it was.
    staging = installation.workspace / "datasets" / "incoming" / upload
    worker = started(
        ["-c", f"import django; django.setup(); {WORK}", job], tmp_path / "w.txt", **installation.environment
    )
    wait_until(lambda: len(list(staging.glob("*.webp"))) >= 3)
    worker.stop(9)
    assert installation.facts(FACTS, upload) == [len(archive), "running", {}, [], True]
    assert staging.exists()

    # Another worker starts over, and finds everything.
    expected = [
        [name, hashlib.sha256(content).hexdigest(), f"picture {int(name[:2])}"]
        for name, content in pictures.items()
        if name.endswith(".png")
    ]
    result = {"added": COUNT, "captioned": 0, "duplicates": 0, "refused": [], "notes": []}
    assert installation.facts(AGAIN + FACTS, upload) == [len(archive), "succeeded", result, expected, True]
    assert list(staging.parent.iterdir()) == []
    assert list((installation.workspace / "cache" / "uploads").iterdir()) == []
