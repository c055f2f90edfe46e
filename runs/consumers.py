"""The run's websocket, `/ws/runs/<id>/?offset=<bytes>`: log, status and metrics, live.

Server → client: text frames are JSON with `v` and `type` (hello, status, metrics, deleted); binary frames are 8 bytes
of offset and raw bytes of train.log. Nothing is lost or doubled: the client says from which offset, and each frame says
where it stands. Client → server: only `{"type": "ticket", "ticket": …}`, first, by clients without a session.
Close codes: 4401 not signed in, 4404 no such run (or a stranger's), 4012 the server restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from urllib.parse import parse_qs

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.http import Http404

from lorapilot.access import get_visible
from lorapilot.models import User
from lorapilot.services import redeem_ticket
from runs import logfile
from runs.follower import FRAME_BYTES, Follower, log_frame, to_json
from runs.models import Run
from runs.selectors import metric_points

NOT_SIGNED_IN, NOT_FOUND, COME_BACK = 4401, 4404, 4012
log = logging.getLogger(__name__)
TICKET_SECONDS = 10
TAIL_BYTES = 512 << 10
RECHECK_SECONDS = 30


class RunConsumer(AsyncWebsocketConsumer):
    """One viewer of one run."""

    work: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        await self.accept()
        user = self.scope.get("user")
        if user is not None and user.is_authenticated:
            self._show_to(user)
        else:
            self.work = asyncio.create_task(self._give_up_without_ticket())

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """The ticket of a client without a session; whatever else comes is passed over."""
        if getattr(self, "user", None) is not None or text_data is None or len(text_data) > 1000:
            return
        user = await database_sync_to_async(redeem_ticket)(_ticket(text_data))
        if user is None:
            await self.close(code=NOT_SIGNED_IN)
        elif getattr(self, "user", None) is None:
            self._show_to(user)

    async def disconnect(self, code: int) -> None:
        if self.work is not None:
            self.work.cancel()

    async def _give_up_without_ticket(self) -> None:
        await asyncio.sleep(TICKET_SECONDS)
        await self.close(code=NOT_SIGNED_IN)

    def _show_to(self, user: User) -> None:
        self.user = user
        if self.work is not None:
            self.work.cancel()
        self.work = asyncio.create_task(self._show())

    async def _show(self) -> None:
        try:
            await self._follow()
        except Exception:  # a database that is away, most likely: a silent socket would never be opened again
            log.exception("a socket ends; its client comes back")
            await self.close(code=COME_BACK)

    async def _follow(self) -> None:
        run = await self._find_run()
        if run is None:
            await self.close(code=NOT_FOUND)
            return
        waker = asyncio.Event()
        follower = Follower.follow(run, waker)
        try:
            await self._pump(run, follower, waker)
        finally:
            follower.leave(waker)

    async def _find_run(self) -> Run | None:
        try:
            found: Run = await database_sync_to_async(get_visible)(
                Run, self.user, pk=self.scope["url_route"]["kwargs"]["run_id"]
            )
        except Http404:
            return None
        return found

    async def _pump(self, run: Run, follower: Follower, waker: asyncio.Event) -> None:
        """Everything until now, then everything new. `send` waits while the client's buffer is full."""
        await follower.ready.wait()
        place = follower.points_end  # before the history is read: what comes twice, comes under the same step
        size = await asyncio.to_thread(logfile.size, run.log_path)
        offset = await asyncio.to_thread(self._first_offset, run, size)
        history = await database_sync_to_async(metric_points)(run)
        status = follower.status  # at most a second old, and read for everybody
        await self.send(text_data=to_json("hello", log_size=size, offset=offset))
        await self.send(text_data=status)
        await self.send(text_data=to_json("metrics", points=history))
        checked_at = time.monotonic()
        while True:
            waker.clear()
            offset = await self._send_log(run, follower, offset)
            if follower.status and follower.status != status:
                status = follower.status
                await self.send(text_data=status)
            points, place = follower.points_after(place)
            if points:
                await self.send(text_data=to_json("metrics", points=points))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_SECONDS):
                    await waker.wait()
            if time.monotonic() - checked_at > RECHECK_SECONDS:
                checked_at = time.monotonic()
                if await self._find_run() is None:  # no longer shared with this viewer, or deleted
                    await self.close(code=NOT_FOUND)
                    return

    async def _send_log(self, run: Run, follower: Follower, offset: int) -> int:
        """Send what the log has from `offset` on; returns the new offset."""
        while offset < follower.end:
            data = follower.frame_at(offset)
            if data is None:
                data = await asyncio.to_thread(logfile.read_at, run.log_path, offset, FRAME_BYTES)
            if not data:
                break
            await self.send(bytes_data=log_frame(offset, data))
            offset += len(data)
        return offset

    def _first_offset(self, run: Run, size: int) -> int:
        """The client's, kept within the log; without one the start of a line near the end."""
        asked = parse_qs(self.scope.get("query_string", b"").decode("latin-1")).get("offset", [""])[0]
        if asked.isdecimal() and len(asked) < 20:
            return min(int(asked), size)
        return logfile.tail_offset(run.log_path, TAIL_BYTES)


def _ticket(text: str) -> str:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    is_ticket = isinstance(message, dict) and message.get("type") == "ticket"
    return str(message.get("ticket", "")) if is_ticket else ""
