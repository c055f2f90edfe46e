"""What can go wrong, as one sentence for the user, a code for programs and an exit status for the shell.

Torch-free on purpose: PyTorch's own errors are recognised by name and text, so the dry run can use this too.
"""

import errno

FINISHED = 0
STOPPED = 130


class TrainerError(Exception):
    """The trainer says no. `str(error)` is one or two sentences: what happened and what to do about it."""

    code = "internal"
    exit_status = 1


class ConfigError(TrainerError):
    """The configuration file is wrong."""

    code = "config"
    exit_status = 2


class DatasetError(TrainerError):
    """The pictures or captions cannot be used."""

    code = "dataset"
    exit_status = 2


class ModelError(TrainerError):
    """The base model cannot be used."""

    code = "model"
    exit_status = 2


class OutOfMemoryError(TrainerError):
    """The device or the machine has too little memory."""

    code = "out_of_memory"
    exit_status = 3


class NonFiniteLossError(TrainerError):
    """The loss became NaN or infinite and stayed so."""

    code = "nan"
    exit_status = 4


class DiskFullError(TrainerError):
    """A file could not be written because the disk, or the quota, is full."""

    code = "disk_full"
    exit_status = 5


class StopRequested(Exception):
    """SIGINT or SIGTERM arrived before the first step, so there is nothing to save."""


ADVICE_ON_MEMORY = "Lower train_batch_size or resolution, or set gradient_checkpointing = true, and start again."


def explain(error: BaseException) -> TrainerError | None:
    """Return the TrainerError that a caught exception amounts to, or None when it is a fault of our own."""
    if isinstance(error, TrainerError):
        return error
    if _is_out_of_memory(error):
        where = "The GPU" if "cuda" in str(error).lower() else "This machine"
        return OutOfMemoryError(f"{where} ran out of memory. {ADVICE_ON_MEMORY}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return DiskFullError(f"The disk is full{where}. Free some space, then resume from the last saved state.")
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # torch.OutOfMemoryError on CUDA; the CPU allocator raises a bare RuntimeError
    return type(error).__name__ == "OutOfMemoryError" or any(
        phrase in str(error) for phrase in ("can't allocate memory", "not enough memory", "CUDA out of memory")
    )
