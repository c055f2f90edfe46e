"""lorapilot/downloads.py: what a browser, a download manager and nginx get."""

import asyncio
import os

import pytest
from django.http import Http404
from django.test import AsyncRequestFactory, RequestFactory

from lorapilot.downloads import CHUNK_BYTES, send_file

# Closing a response closes the connections of other tests, which asks the database.
pytestmark = pytest.mark.django_db

CONTENT = bytes(range(256)) * 4
BINARY = "application/octet-stream"


@pytest.fixture
def file(workspace):
    path = workspace / "my lora.safetensors"
    path.write_bytes(CONTENT)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def get(file, method="get", **headers):
    request = getattr(RequestFactory(headers=headers), method)("/")
    return send_file(request, file, content_type=BINARY)


def body(response):
    content = b"".join(response.streaming_content) if response.streaming else response.content
    response.close()
    return content


def test_file_is_sent_whole_with_what_a_browser_needs(file):
    response = get(file)
    assert (response.status_code, body(response)) == (200, CONTENT)
    size, nanoseconds = len(CONTENT), file.stat().st_mtime_ns
    assert dict(response.headers) == {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": 'attachment; filename="my lora.safetensors"',
        "Content-Length": "1024",
        "Content-Type": BINARY,
        "ETag": f'"{size:x}-{nanoseconds:x}"',
        "Last-Modified": "Tue, 14 Nov 2023 22:13:20 GMT",
    }


def test_file_name_of_any_script_arrives(file):
    response = send_file(RequestFactory().get("/"), file, filename="Mañana.png", content_type="image/png")
    assert response["Content-Disposition"] == "attachment; filename*=utf-8''Ma%C3%B1ana.png"
    response.close()


def test_picture_is_shown_in_the_page(file):
    response = send_file(RequestFactory().get("/"), file, content_type="image/png", as_attachment=False)
    assert response["Content-Disposition"] == 'inline; filename="my lora.safetensors"'
    response.close()


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("0-0", 0, 0),
        ("0-1023", 0, 1023),
        ("1000-", 1000, 1023),
        ("-24", 1000, 1023),
        ("-9999", 0, 1023),
        ("5-9999", 5, 1023),
    ],
)
def test_range_is_sent_alone(file, asked, first, last):
    response = get(file, range=f"bytes={asked}")
    assert (response.status_code, body(response)) == (206, CONTENT[first : last + 1])
    assert response["Content-Range"] == f"bytes {first}-{last}/1024"
    assert response["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["1024-", "9999-10000", "-0"])
def test_range_outside_the_file_is_refused(file, asked):
    response = get(file, range=f"bytes={asked}")
    assert (response.status_code, response["Content-Range"]) == (416, "bytes */1024")


@pytest.mark.parametrize("asked", ["bytes=-", "bytes=9-5", "bytes=0-1,5-6", "lines=1-2", "bytes=x-"])
def test_range_that_we_do_not_serve_gets_the_whole_file(file, asked):
    response = get(file, range=asked)
    assert (response.status_code, body(response)) == (200, CONTENT)


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_if_range_goes_on_with_the_same_file(file, header):
    known = get(file, "head")[header]
    response = get(file, range="bytes=1020-", if_range=known)
    assert (response.status_code, body(response)) == (206, CONTENT[1020:])


def test_if_range_starts_over_with_a_changed_file(file):
    response = get(file, range="bytes=1020-", if_range='"another"')
    assert (response.status_code, body(response)) == (200, CONTENT)


@pytest.mark.parametrize(("condition", "header"), [("if_none_match", "ETag"), ("if_modified_since", "Last-Modified")])
def test_file_that_the_browser_has_is_not_sent_again(file, condition, header):
    response = get(file, **{condition: get(file, "head")[header]})
    assert (response.status_code, response.content) == (304, b"")
    assert response["Cache-Control"] == "private, no-cache"


def test_head_tells_size_and_nothing_else(file):
    response = get(file, "head", range="bytes=0-1")
    assert (response.status_code, response["Content-Length"], response.content) == (200, "1024", b"")


def test_empty_file_is_sent(workspace):
    (workspace / "empty").touch()
    response = get(workspace / "empty")
    assert (response.status_code, response["Content-Length"], body(response)) == (200, "0", b"")
    assert get(workspace / "empty", range="bytes=0-").status_code == 416


@pytest.mark.parametrize("missing", ["nothing", "folder", "my lora.safetensors/x"])
def test_missing_file_is_not_found(file, workspace, missing):
    (workspace / "folder").mkdir()
    with pytest.raises(Http404):
        get(workspace / missing)


async def test_event_loop_gets_the_file_in_chunks(workspace):
    path = workspace / "large"
    path.write_bytes(bytes(CHUNK_BYTES + 1))
    response = send_file(AsyncRequestFactory().get("/"), path, content_type=BINARY)
    assert [len(chunk) async for chunk in response.streaming_content] == [CHUNK_BYTES, 1]
    await asyncio.to_thread(response.close)


def test_response_that_is_not_read_leaves_no_file_open(file):
    response = get(file)
    response.close()
    assert response._resource_closers == []
    unread = [entry for entry in os.scandir("/proc/self/fd") if os.path.realpath(entry.path) == str(file)]
    assert unread == []


def test_behind_nginx_nginx_sends_the_file(file, settings):
    settings.X_ACCEL_PREFIX = "/files/"
    response = get(file, range="bytes=0-1")
    assert (response.status_code, response.content) == (200, b"")
    assert response["X-Accel-Redirect"] == "/files/my%20lora.safetensors"
    assert response["Content-Type"] == BINARY
