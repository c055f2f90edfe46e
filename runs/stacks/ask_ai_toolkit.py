"""Asks a running AI Toolkit to save and then to stop: `python -I ask_ai_toolkit.py DATABASE OPTIMIZER_FILE START_STEP`.

AI Toolkit looks into the job's database after each step. What is seen there, in this order, when it saves by request:
`save_now` goes back to 0, it looks whether to stop, `info` becomes "Saving model", the weights and then the optimizer's
file are written, it looks whether to stop, `info` becomes "Training" again. So a stop that is asked for while it saves
ends it right after that, and one that comes before ends it unsaved. Standard library only; imports nothing of ours. It
stays until it is killed or has nothing to wait for: whoever started it goes on when it ends.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

LOOP = ("Training", "Saving model", "Generating images")  # what `info` says from the first step on
ENDED = ("stopped", "completed", "error", "queued")
POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 60.0  # between its last word in the database and its end


class Job(NamedTuple):
    status: str
    info: str
    step: int  # completed
    save_now: int


def look(database: str) -> Job:
    with closing(_open(database)) as connection:
        row = connection.execute("SELECT status, info, step, save_now FROM Job").fetchone()
    status, info, step, save_now = row or ("", "", 0, 0)
    return Job(status or "", info or "", int(step or 0), int(save_now or 0))


def ask(database: str, column: str) -> None:
    with closing(_open(database)) as connection:
        connection.execute(f"UPDATE Job SET {column} = 1")  # noqa: S608 one of two names below


def _open(database: str) -> sqlite3.Connection:
    if not Path(database).is_file():
        raise SystemExit(1)
    return sqlite3.connect(database, timeout=30, isolation_level=None)


def changed_at(file: str) -> int:
    try:
        return Path(file).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_the_save(database: str, optimizer: str) -> None:
    """Until the save that was asked for is being written, or has been, or the training has come to its end."""
    before, taken_at = changed_at(optimizer), None
    while (job := look(database)).status not in ENDED:
        if job.save_now == 0:
            taken_at = job.step if taken_at is None else taken_at
            is_written = job.info == "Training" and changed_at(optimizer) != before
            if job.info == "Saving model" or is_written or job.step > taken_at:
                return
        time.sleep(POLL_SECONDS)


def main(database: str, optimizer: str, start_step: str) -> None:
    job = look(database)
    if job.info.startswith(LOOP) and job.step > int(start_step):
        ask(database, "save_now")
        wait_for_the_save(database, optimizer)
    ask(database, "stop")
    while look(database).status not in ENDED:
        time.sleep(POLL_SECONDS)
    time.sleep(LAST_WORDS_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:4])
