"""With REDIS_URL: the channel layer as the settings make it, on a real Redis."""

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from tests.serving.conftest import ROOT

URL = "redis://127.0.0.1:6379/15"
PROGRAM = """
import asyncio, django
django.setup()
from channels.layers import get_channel_layer

async def main():
    layer = get_channel_layer()
    channel = await layer.new_channel()
    await layer.group_add("run.1", channel)
    waiting = asyncio.ensure_future(layer.receive(channel))
    await asyncio.sleep(6)  # longer than the layer's own wait of 5 seconds
    await layer.group_send("run.1", {"type": "news"})
    print(await asyncio.wait_for(waiting, 5))

asyncio.run(main())
"""


@pytest.fixture
def redis_url():
    try:
        socket.create_connection(("127.0.0.1", 6379), timeout=1).close()
    except OSError:
        reason = "No Redis at 127.0.0.1:6379."
        if os.environ.get("LORAPILOT_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return URL


@pytest.mark.redis
async def test_socket_that_hears_nothing_for_a_while_still_hears_the_next_message(redis_url):
    environment = os.environ | {"REDIS_URL": redis_url, "DJANGO_SETTINGS_MODULE": "lorapilot.settings"}
    argv = [sys.executable, "-c", PROGRAM]
    done = await asyncio.to_thread(
        subprocess.run, argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "{'type': 'news'}\n"), done.stderr
