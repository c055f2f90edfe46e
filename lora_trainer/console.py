"""What a person reads on stdout: plain lines, and one progress line that a carriage return rewrites in place."""

import sys
import time
from typing import TextIO

BAR_WIDTH = 10


class Console:
    """Prints lines above a progress line. Updates at most 4 times a second, or 2 when stdout is a file or a pipe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._interval_seconds = 0.25 if self._stream.isatty() else 0.5
        self._drawn_at = float("-inf")
        self._width = 0

    def line(self, text: str) -> None:
        """Print a whole line."""
        self.end_progress()
        print(text, file=self._stream, flush=True)

    def progress(self, text: str, *, force: bool = False) -> None:
        """Rewrite the progress line, unless that was done a moment ago."""
        now = time.monotonic()
        if not force and now - self._drawn_at < self._interval_seconds:
            return
        self._drawn_at = now
        # spaces cover what a longer line before left standing
        print(f"\r{text}{' ' * (self._width - len(text))}", end="", file=self._stream, flush=True)
        self._width = len(text)

    def end_progress(self) -> None:
        """Finish the progress line, so that what follows starts on a fresh one."""
        if self._width:
            print(file=self._stream, flush=True)
        self._width = 0


def steps_line(*, step: int, total: int, elapsed: float, eta: float | None, rate: float, loss: float, lr: float) -> str:
    """`steps:  42%|████      | 134/320 [00:27<00:38, 4.9 it/s, loss=0.0213, lr=3.1e-03]`; times in seconds."""
    filled = BAR_WIDTH * step // total
    bar = "█" * filled + " " * (BAR_WIDTH - filled)
    speed = f"{rate:.1f} it/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s/it"
    times = f"{clock(elapsed)}<{clock(eta)}"
    return f"steps: {100 * step // total:3d}%|{bar}| {step}/{total} [{times}, {speed}, loss={loss:.4f}, lr={lr:.1e}]"


def clock(seconds: float | None) -> str:
    """`00:27`, or `1:02:03` from an hour on; `?` when unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
