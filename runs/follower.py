"""One reader per run per web process: it looks at the log and the run's row, and wakes the sockets that show them.

Every socket keeps its own place, so a slow one delays nobody. The last RING_BYTES of the log are read once and shared;
a socket that is further behind reads the file itself. Cost of an idle run with viewers: a stat() each 100 ms and a
query each second.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.conf import settings
from django.db import connection
from django.db.models import Max, Q

from runs import logfile
from runs.models import MetricPoint, Run
from runs.selectors import status_of
from runs.wakeup import group_name

log = logging.getLogger(__name__)

LOG_SECONDS = 0.1
ROW_SECONDS = 1.0
RING_BYTES = 1 << 20
FRAME_BYTES = 64 << 10
KEPT_POINTS = 10_000


class Follower:
    """Follows one run while somebody watches. Get it by `follow`, and `leave` it."""

    _followers: dict[int, Follower] = {}  # noqa: RUF012 the registry of this process

    def __init__(self, run_id: int, path: Path) -> None:
        self.run_id = run_id
        self.path = path
        self.wakers: set[asyncio.Event] = set()
        self.end = logfile.size(path)
        self.ring = b""
        self.status = ""  # the newest status message, as JSON
        self.points: list[tuple[int, float | None, float | None]] = []
        self.ready = asyncio.Event()  # set once the row was read: what is measured from then on is in `points`
        self.dropped_points = 0  # so that places in `points` stay valid when old ones are dropped
        self._revision = -1
        self._newest_point = (0, 0)  # attempt, step
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def follow(cls, run: Run, waker: asyncio.Event) -> Follower:
        follower = cls._followers.get(run.pk)
        if follower is None:
            follower = cls._followers[run.pk] = cls(run.pk, run.log_path)
            follower._task = asyncio.create_task(follower._watch())
        follower.wakers.add(waker)
        return follower

    def leave(self, waker: asyncio.Event) -> None:
        """The last one out ends the follower."""
        self.wakers.discard(waker)
        if not self.wakers and self._followers.get(self.run_id) is self:
            del self._followers[self.run_id]
            if self._task is not None:
                self._task.cancel()

    def frame_at(self, offset: int) -> bytes | None:
        """Up to FRAME_BYTES of the log from `offset`, when they are in memory; None: read the file."""
        start = self.end - len(self.ring)
        if start <= offset < self.end:
            return self.ring[offset - start : offset - start + FRAME_BYTES]
        return None

    def points_after(self, place: int) -> tuple[list[tuple[int, float | None, float | None]], int]:
        """The points after a place, and the new place. Start with the place `points_end`."""
        return self.points[max(0, place - self.dropped_points) :], self.points_end

    @property
    def points_end(self) -> int:
        return self.dropped_points + len(self.points)

    async def _watch(self) -> None:
        row_due = asyncio.Event()
        listener = asyncio.create_task(self._listen(row_due)) if settings.REDIS_URL else None
        loop = asyncio.get_running_loop()
        looked_at = 0.0
        try:
            while True:
                has_news = self._read_log()
                if row_due.is_set() or loop.time() - looked_at >= ROW_SECONDS:
                    row_due.clear()
                    looked_at = loop.time()
                    has_news |= await self._read_row()
                    if self._revision >= 0:
                        self.ready.set()
                if has_news:
                    for waker in self.wakers:
                        waker.set()
                await asyncio.sleep(LOG_SECONDS)
        finally:
            if listener is not None:
                listener.cancel()

    async def _listen(self, row_due: asyncio.Event) -> None:
        """Wake-ups by the channel layer: only hints, so an error here costs at most a second."""
        layer = get_channel_layer()
        while True:
            try:
                channel = await layer.new_channel()
                await layer.group_add(group_name(self.run_id), channel)
                while True:
                    await layer.receive(channel)
                    row_due.set()
            except Exception:  # noqa: BLE001 whatever the broker raises
                log.warning("no wake-ups for run %s: the broker does not answer", self.run_id)
                await asyncio.sleep(5)

    def _read_log(self) -> bool:
        """Bring the ring up to the end of the file."""
        size = logfile.size(self.path)
        if size <= self.end:
            return False
        start = max(self.end, size - RING_BYTES)
        new = logfile.read_at(self.path, start, size - start)
        known = self.ring if start == self.end else b""
        self.ring = (known + new)[-RING_BYTES:]
        self.end = start + len(new)
        return bool(new)

    async def _read_row(self) -> bool:
        try:
            status, revision, points, newest = await sync_to_async(self._query)()
        except Exception:  # noqa: BLE001 a database that is away for a while ends no socket
            log.warning("the row of run %s could not be read", self.run_id)
            return False
        if revision == self._revision:
            return False
        self._revision, self._newest_point = revision, newest
        self.status = status
        self.points += points
        if (surplus := len(self.points) - KEPT_POINTS) > 0:
            del self.points[:surplus]
            self.dropped_points += surplus
        return True

    def _query(self) -> tuple[str, int, list[tuple[int, float | None, float | None]], tuple[int, int]]:
        """The status message, its revision, and what was measured since the last look. In a thread.

        Its connection stays open from look to look: to open one costs ten times what the look does.
        """
        try:
            revision = Run.objects.filter(pk=self.run_id).values_list("revision", flat=True).first()
            if revision == self._revision:
                return self.status, self._revision, [], self._newest_point
            run = Run.objects.filter(pk=self.run_id).first()
            if run is None:
                return deleted_message(), self._revision + 1, [], self._newest_point
            if self._revision < 0:  # what was measured before is each viewer's history
                seen = MetricPoint.objects.filter(run=run, attempt=run.attempt).aggregate(step=Max("step"))
                return status_message(run), run.revision, [], (run.attempt, seen["step"] or 0)
            attempt, step = self._newest_point
            rows = MetricPoint.objects.filter(run_id=self.run_id)
            unseen = Q(attempt=attempt, step__gt=step) | Q(attempt__gt=attempt)
            points = list(rows.filter(unseen).order_by("step").values_list("step", "loss", "learning_rate", "attempt"))
            newest = max(((point[3], point[0]) for point in points), default=(attempt, step))
            return status_message(run), run.revision, [point[:3] for point in points], newest
        except Exception:
            connection.close()  # it may be the trouble
            raise


def to_json(type_: str, **content: Any) -> str:
    """A text frame of protocol version 1."""
    return json.dumps({"v": 1, "type": type_, **content}, allow_nan=False)


def status_message(run: Run) -> str:
    return to_json("status", run=status_of(run))


def deleted_message() -> str:
    return to_json("deleted")


def log_frame(offset: int, data: bytes) -> bytes:
    """A binary frame: where the bytes stand in the log (8 bytes, big-endian), then the bytes."""
    return offset.to_bytes(8, "big") + data
