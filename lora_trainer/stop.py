"""A polite stop: the first SIGINT or SIGTERM asks the loop to save and leave, a later one ends the process at once."""

import contextlib
import os
import signal
import time
from types import FrameType

from lora_trainer.errors import STOPPED, StopRequested

ECHO_SECONDS = 2.0
"""Signals that follow the first one this closely are the same request. Under `accelerate launch` every process gets one
as a member of its group, and one more from the launcher, which was signalled, too; both within some milliseconds."""


class StopSignal:
    """Remembers that somebody asked for a stop. Installed before PyTorch is imported, which alone takes seconds."""

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0

    def install(self) -> None:
        """Take over both signals for the rest of the process."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    def raise_if_requested(self) -> None:
        """Leave a stage before the first step, where there is nothing to save yet."""
        if self.requested:
            raise StopRequested

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
            # os.write: print is not safe inside a handler that may have interrupted a print. A full disk must not end
            # what is about to be saved.
            with contextlib.suppress(OSError):
                os.write(1, b"\nStopping after this step; once more stops at once without saving.\n")
        elif time.monotonic() - self._requested_at >= ECHO_SECONDS:
            os._exit(STOPPED)
