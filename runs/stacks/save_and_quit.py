"""Asks Diffusion Pipe to save its state and end: `python -I save_and_quit.py OUTPUT_FOLDER LOG OFFSET`.

It looks for a file save_quit in the folder of its run after each step. Before the first step of this attempt, which
prints to LOG from OFFSET on, there is nothing to save: then this program ends at once, and signals follow. Otherwise it
waits: whoever started it ends it when the trainer is gone, or when the time is over. Standard library only.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

STEP = re.compile(rb"\bsteps: \d+ loss:")


def ask(output: Path, log: Path, offset: int) -> bool:
    """False when nothing has been trained yet."""
    with log.open("rb") as file:
        file.seek(offset)
        if not STEP.search(file.read()):
            return False
    newest = max((folder for folder in output.iterdir() if folder.is_dir()), default=None)
    if newest is None:
        return False
    (newest / "save_quit").touch()
    return True


if __name__ == "__main__":
    if ask(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])):
        signal.pause()
