"""What can go wrong, as one sentence for the user, a code for programs and an exit status for the shell.

Torch-free on purpose: PyTorch's own errors are recognised by name and text, so the dry run can use this too.
"""

import errno
import re
from collections.abc import Iterator

FINISHED = 0
REFUSED = 2
STOPPED = 130


class TrainerError(Exception):
    """The trainer says no. `str(error)` is one or two sentences: what happened and what to do about it."""

    code = "internal"
    exit_status = 1


class ConfigError(TrainerError):
    """The configuration file is wrong."""

    code = "config"
    exit_status = REFUSED


class DatasetError(TrainerError):
    """The pictures or captions cannot be used."""

    code = "dataset"
    exit_status = REFUSED


class ModelError(TrainerError):
    """The base model cannot be used."""

    code = "model"
    exit_status = REFUSED


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


class LostProcessError(TrainerError):
    """One of several processes that train together is gone without a word."""

    code = "process_lost"
    exit_status = 1


class StopRequested(Exception):
    """SIGINT or SIGTERM arrived before the first step, so there is nothing to save."""


ADVICE_ON_MEMORY = "Lower train_batch_size or resolution, or set gradient_checkpointing = true, and start again."
_NO_MEMORY = re.compile(
    r"out of memory"  # CUDA, HIP, MPS, XPU and NCCL, each with words of its own around it
    r"|can(?:'|no)t allocate memory|not enough memory|bad_alloc"  # PyTorch's CPU allocator; fork, mmap; C++
    # oneDNN, on the CPU; "… a primitive descriptor" says that it has no such operation
    r"|could not create a (?:memory|primitive\b(?! desc))"
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
    r"|BLAS_STATUS_ALLOC_FAILED|SOLVER_STATUS_ALLOC_FAILED|SPARSE_STATUS_ALLOC_FAILED"
    # the handle is made on first use, and takes tens of megabytes
    r"|CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate"
    # by itself NOT_SUPPORTED says that there is no kernel for these tensors
    r"|CUDNN_STATUS_\w*ALLOC|CUDNN_STATUS_NOT_SUPPORTED.*alloc",
    re.IGNORECASE | re.DOTALL,
)
_OF_A_GPU = re.compile(r"cuda|cublas|cudnn|cusolver|cusparse|nccl|\bhip|hipblas|\bmps\b|\bxpu\b", re.IGNORECASE)
_LOST = re.compile(r"connection (?:was )?(?:closed|reset)|broken pipe|remote process exit", re.IGNORECASE)


def explain(error: BaseException) -> TrainerError | None:
    """Return the TrainerError that a caught exception amounts to, or None when it is a fault of our own."""
    if isinstance(error, TrainerError):
        return error
    for one in _with_causes(error):
        if _is_without_memory(one):
            where = "The GPU" if _OF_A_GPU.search(str(one)) else "This machine"
            return OutOfMemoryError(f"{where} ran out of memory. {ADVICE_ON_MEMORY}")
        if _is_without_disk(one):
            where = f" while writing {one.filename}" if isinstance(one, OSError) and one.filename else ""
            return DiskFullError(f"The disk is full{where}. Free some space, then resume from the last saved state.")
    if _is_of_a_lost_process(error):
        return LostProcessError(
            "Another process of this run is gone: it was killed, most likely because the machine's memory ran out. "
            "Resume from the last saved state."
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `explain` takes it for a lack of memory."""
    return isinstance(explain(error), OutOfMemoryError)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from: accelerate and PyTorch wrap errors in a RuntimeError of their own."""
    following: BaseException | None = error
    seen: set[int] = set()
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        if not isinstance(following, RuntimeError):
            return
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _is_without_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch.OutOfMemoryError is a RuntimeError, too; the other allocators raise bare ones
    return isinstance(error, RuntimeError) and bool(
        type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(str(error))
    )


def _is_without_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and "No space left on device" in str(error)


def _is_of_a_lost_process(error: BaseException) -> bool:
    """gloo and NCCL notice that the other end is gone; both say so in a RuntimeError."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
