"""A polite stop: the first SIGINT or SIGTERM asks the loop to save and leave, the second ends the process at once."""

import os
import signal
from types import FrameType

from lora_trainer.errors import STOPPED, StopRequested


class StopSignal:
    """Remembers that somebody asked for a stop. Installed before PyTorch is imported, which alone takes seconds."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take over both signals for the rest of the process."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    def raise_if_requested(self) -> None:
        """Leave a stage before the first step, where there is nothing to save yet."""
        if self.requested:
            raise StopRequested

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(STOPPED)
        self.requested = True
        # os.write: print is not safe inside a handler that may have interrupted a print
        os.write(1, b"\nStopping after this step; once more stops at once without saving.\n")
