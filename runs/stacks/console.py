"""What the external trainers print, read piece by piece; and how an attempt of theirs ended, proved from its log.

A piece ends at `\\r` or `\\n`: progress bars overwrite themselves, and streams are mixed. Terminal codes are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runs import logfile
from runs.enums import Status
from runs.stacks.base import FORCED, WITHOUT_A_WORD, Cause, Exit, Outcome, Reading, cause_of_death, unheard

TERMINAL_CODE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
END_OF_PIECE = re.compile(rb"[\r\n]")
READ_BYTES = 1 << 20
LAST_BYTES = 64 << 10
LAST_LINES = 30
NO_LOSS = (
    "The loss was no number (NaN) from step {step:,} on: what came after it is worthless. "
    "Use a lower learning rate, or bf16 instead of fp16, in a new run."
)
LONGEST_PIECE = 64 << 10  # one without an end is read as far as this
# What a starter says of the program that it started.
DIED_BY_SIGKILL = re.compile(rb"died with <Signals\.SIGKILL|exits with return code = -9\b")


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    end: int  # bytes of the chunk up to here


def pieces(chunk: bytes, *, is_over: bool) -> Iterator[Piece]:
    """The complete pieces of `chunk`; when nothing follows, also what is left."""
    start = 0
    for found in END_OF_PIECE.finditer(chunk):
        yield Piece(plain(chunk[start : found.end()]), found.end())
        start = found.end()
    if start < len(chunk) and (is_over or len(chunk) - start > LONGEST_PIECE):
        yield Piece(plain(chunk[start:]), len(chunk))


def plain(data: bytes) -> str:
    """Without terminal codes and the end of the line."""
    return TERMINAL_CODE.sub("", data.decode(errors="replace")).strip("\r\n")


def log_pieces(log: Path, offset: int) -> Iterator[str]:
    """All pieces of a log from `offset` to its end."""
    while chunk := logfile.read_at(log, offset, READ_BYTES):
        is_last = len(chunk) < READ_BYTES
        end = 0
        for piece in pieces(chunk, is_over=is_last):
            yield piece.text
            end = piece.end
        offset += end or len(chunk)


def progress_bar(description: str, postfix: str) -> re.Pattern[str]:
    """A bar of tqdm's. Its groups: `steps`, `rate` and `unit`, and those of `postfix`, which stands in its brackets."""
    return re.compile(
        re.escape(description)
        + r":\s+\d+%\|[^|]*\|\s*(?P<steps>\d+)/\d+ "
        + r"\[[\d:]+<[\d:?]+,\s*(?P<rate>[\d.?]+)(?P<unit>s/it|it/s)"
        + rf"(?:, {postfix})?\]"
    )


def steps_per_second(bar: re.Match[str]) -> float | None:
    """None before the first step."""
    rate = None if bar["rate"] == "?" else float(bar["rate"])
    return (1 / rate if bar["unit"] == "s/it" else rate) if rate else None


@dataclass(frozen=True, slots=True)
class Failure:
    """What a trainer prints when it fails, and what that means for the user. `{0}`, `{1}` are the pattern's groups."""

    pattern: re.Pattern[str]
    reason: str
    cause: Cause = Cause.OWN
    status: Status = Status.FAILED


def failure(pattern: str, reason: str, cause: Cause = Cause.OWN) -> Failure:
    return Failure(re.compile(pattern, re.MULTILINE), reason, cause)


COMMON_FAILURES = (
    failure(
        r"(?:torch\.)?(?:cuda\.)?OutOfMemoryError|CUDA out of memory",
        "The GPU ran out of memory. Turn gradient checkpointing on, or use a smaller batch or resolution, then resume.",
        Cause.OUT_OF_MEMORY,
    ),
    failure(
        r"No space left on device|Disk quota exceeded", "The disk is full: free some space, then resume.",
        Cause.DISK_FULL,
    ),
    failure(
        r"ModuleNotFoundError: No module named '([^']+)'",
        "The trainer's Python has no package {0}: install the trainer's requirements again. `manage.py doctor` checks.",
    ),
    failure(
        r"(?:LocalEntryNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled|couldn't connect to "
        r"'https://huggingface\.co')",
        "The trainer wanted a file from Hugging Face, which runs do without. "
        "Get the model's tokenizers and text encoders on the Models page first.",
    ),
    failure(
        r"SafetensorError|Error while deserializing header|MetadataIncompleteBuffer",
        "A model file is damaged or incomplete. Check it on the Models page, and download it again.",
    ),
    failure(
        r"no kernel image is available for execution|CUDA error: invalid device function",
        "The trainer's PyTorch does not support this GPU: install a build for its CUDA version.",
    ),
    failure(
        r"CUDA driver version is insufficient|NVIDIA driver on your system is too old",
        "The GPU's driver is too old for the trainer's PyTorch: update the driver, or install an older PyTorch.",
    ),
    failure(
        r"CUDA error: an illegal memory access|CUDNN_STATUS_EXECUTION_FAILED|uncorrectable ECC error",
        "The GPU failed while it calculated. Resume; if it happens again, restart the machine.",
    ),
)  # fmt: skip


def judge(
    reading: Reading, exit_: Exit, *, failures: Sequence[Failure], unfinished: str, nan_step: int | None = None
) -> Outcome:
    """How an attempt ended. `unfinished`: why its result does not count as finished; empty when it is proved to be.
    `nan_step`: the first one without a loss.

    Nothing but that proof is success: every trainer here can exit with 0 after training nothing.
    """
    if nan_step is not None:
        return Outcome(Status.FAILED, NO_LOSS.format(step=nan_step))
    if not unfinished and exit_.code == 0:
        return Outcome(Status.SUCCEEDED)
    said = logfile.last_words(reading.log, exit_.log_offset, LAST_BYTES)
    cause = _cause(exit_, said)
    if exit_.stop_requested and cause in (Cause.OWN, Cause.KILLED):
        return Outcome(Status.STOPPED, _stopped(exit_))
    text = plain_lines(said)
    for known in (*failures, *COMMON_FAILURES):
        if found := known.pattern.search(text):
            return Outcome(known.status, known.reason.format(*found.groups()), known.cause)
    if cause in WITHOUT_A_WORD:
        return Outcome(**WITHOUT_A_WORD[cause], cause=cause)
    how = unfinished if exit_.code == 0 else f"The trainer ended with exit code {exit_.code}."
    return Outcome(Status.FAILED, f"{how} These are its last lines:\n{last_lines(text)}")


def _cause(exit_: Exit, said: bytes) -> Cause:
    """As `cause_of_death`, where a starter stands between the runner and the trainer."""
    if exit_.code not in FORCED and DIED_BY_SIGKILL.search(said):
        exit_ = replace(exit_, code=next(iter(FORCED)))
    return cause_of_death(exit_, said)


def _stopped(exit_: Exit) -> str:
    return f"Stopped.{unheard(exit_)} Resume goes on from the last saved state, if there is one."


def plain_lines(data: bytes) -> str:
    """As a terminal leaves it: of a line that overwrote itself, the last text."""
    lines = []
    for line in data.split(b"\n"):
        parts = [part for part in line.split(b"\r") if part.strip()]
        lines.append(plain(parts[-1]) if parts else "")
    return "\n".join(lines)


def last_lines(text: str) -> str:
    """For the reason of an end that nothing else explains."""
    lines = [line.rstrip()[:300] for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:]) or "(nothing)"
