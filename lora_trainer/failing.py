"""How a program of ours ends when it fails: the trainer and the captioner alike."""

import contextlib
import os
import sys
import traceback

from lora_trainer.console import Console
from lora_trainer.errors import LostProcessError, TrainerError, explain
from lora_trainer.events import EventLog


def fail(error: BaseException, events: EventLog | None, console: Console, internal: str) -> int:
    """Say in one sentence why the program ends, as its last line and as an event, and return the exit status.
    `internal` is what to say of our own faults, which alone have a traceback."""
    known = explain(error)
    if isinstance(known, LostProcessError) and events is not None and events.has_ended():
        return known.exit_status  # the other one has said why
    told = known or TrainerError(internal)
    # the disk may be what is full, also for stdout
    if events is not None:
        with contextlib.suppress(OSError):
            events.emit_error(told.code, str(told))
    try:
        if known is None:
            console.end_progress()
            traceback.print_exception(error, file=sys.stdout)
        console.line(f"Error: {told}")
    except OSError:
        _drop_unwritten()
    return told.exit_status


def _drop_unwritten() -> None:
    """What stdout still holds has no place to go. Python would try once more at its end, and exit with 120 for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
