"""What the tests of the server serve: real Django for files and uploads, and websockets that talk a lot."""

import asyncio
import hashlib
import os
import sys
import time
from pathlib import Path

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import JsonResponse
from django.urls import path

from lorapilot.downloads import send_file

django.setup()
settings.ROOT_URLCONF = __name__
settings.MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.middleware.common.CommonMiddleware",
]


def download(request):
    return send_file(request, Path(os.environ["SERVED_FILE"]), content_type="application/octet-stream")


def upload(request):
    """What arrived: form files by name, or the raw body."""
    files = {name: _digest(file.chunks()) for name, file in request.FILES.items()}
    return JsonResponse({"files": files} if files else {"body": _digest([request.body])})


def _digest(chunks):
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def stuck(request):
    time.sleep(float(request.GET["seconds"]))
    return JsonResponse({"done": True})


async def slow(request):
    await asyncio.sleep(float(request.GET["seconds"]))
    return JsonResponse({"done": True})


urlpatterns = [path("file", download), path("upload", upload), path("slow", slow), path("stuck", stuck)]
http = get_asgi_application()


async def application(scope, receive, send):
    if scope["type"] == "websocket":
        await talk(scope, receive, send)
    else:
        await http(scope, receive, send)


async def talk(scope, receive, send):
    """/flood: 64 KiB messages for ever. /long: one of 300 KiB. /quiet: says `hello`, and waits for the other side."""
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": "hello"})
    if scope["path"] == "/long":
        await send({"type": "websocket.send", "bytes": bytes(300 * 1024)})
    while scope["path"] == "/flood":
        await send({"type": "websocket.send", "bytes": bytes(64 * 1024)})
        sys.stderr.write("sent\n")
    while (await receive())["type"] != "websocket.disconnect":
        pass
