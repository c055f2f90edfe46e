import errno
import io

import pytest
import torch

from lora_trainer.console import Console, clock, steps_line
from lora_trainer.errors import ConfigError, explain, is_out_of_memory


def test_real_allocation_failure_of_torch_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    explained = explain(caught.value)
    assert (explained.code, explained.exit_status) == ("out_of_memory", 3)
    assert str(explained).startswith("This machine ran out of memory. Lower train_batch_size")


def test_gpu_out_of_memory_names_the_gpu():
    explained = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert (explained.code, str(explained)[:7]) == ("out_of_memory", "The GPU")


GPU = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED: workspace could not be allocated",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cudaErrorMemoryAllocation: the API call failed because it was unable to allocate enough memory",
    "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    "HIP out of memory. Tried to allocate 512.00 MiB",
    "HIP error: out of memory",
    "HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)",
    "XPU out of memory. Tried to allocate 2.00 GiB",
]
MACHINE = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("unable to mmap 4096 bytes from file </torch_1>: Cannot allocate memory (12)"),
    RuntimeError("DataLoader worker (pid 7) is killed: Cannot allocate memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
NOT_MEMORY = [
    "CUDA error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle)`",
    "CUDA error: device-side assert triggered",
    "expected memory_format to be contiguous",
    "could not create a primitive descriptor for the convolution forward propagation primitive",
]


@pytest.mark.parametrize("message", GPU)
def test_every_library_of_a_gpu_that_lacks_memory_is_understood(message):
    assert sentence(RuntimeError(message)) == "The GPU ran out of memory."


@pytest.mark.parametrize("error", MACHINE, ids=repr)
def test_machine_without_memory_is_understood(error):
    assert sentence(error) == "This machine ran out of memory."


@pytest.mark.parametrize("message", NOT_MEMORY)
def test_other_errors_of_a_gpu_are_not_about_memory(message):
    assert explain(RuntimeError(message)) is None


def sentence(error):
    assert is_out_of_memory(error)
    return str(explain(error)).split(" Lower")[0]


def raised(outer, inner, *, how):
    """The outer error, raised `from` the inner one, `while` it was handled, or `instead` of it."""
    try:
        try:
            raise inner
        except type(inner) as error:
            if how == "while":
                raise outer  # noqa: B904 - the very case
            raise outer from (error if how == "from" else None)
    except type(outer) as caught:
        return caught


@pytest.mark.parametrize(
    ("outer", "how", "code"),
    [
        (RuntimeError("backend='inductor' raised"), "from", "out_of_memory"),
        (RuntimeError("while training"), "while", "out_of_memory"),
        (RuntimeError("while training"), "instead", None),
        (ValueError("a mistake"), "from", None),
        (ConfigError("refused"), "from", "config"),
    ],
)
def test_wrapper_of_a_lack_of_memory_is_looked_into(outer, how, code):
    inner = raised(RuntimeError("step"), torch.OutOfMemoryError("CUDA out of memory."), how="while")
    found = explain(raised(outer, inner, how=how))
    assert (found and found.code) == code


def test_wrapper_of_a_full_disk_is_looked_into():
    error = raised(RuntimeError("writer failed"), OSError(errno.ENOSPC, "full", "/out/curves"), how="from")
    assert explain(error).code == "disk_full"
    assert explain(RuntimeError("unable to write to file </torch_1>: No space left on device (28)")).code == "disk_full"


@pytest.mark.parametrize(
    "message",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38442",
        "[gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:38442: Connection reset by peer",
        "NCCL error in: NCCLUtils.hpp:275, remote process exited or there was a network error, NCCL version 2.21.5",
    ],
)
def test_broken_connection_is_a_lost_process(message):
    explained = explain(RuntimeError(message))
    assert (explained.code, explained.exit_status) == ("process_lost", 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_file(number):
    explained = explain(OSError(number, "full", "/out/face.safetensors"))
    assert (explained.code, explained.exit_status) == ("disk_full", 5)
    assert "/out/face.safetensors" in str(explained)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape mismatch"), OSError(errno.EACCES, "no")])
def test_other_errors_are_our_own_fault(error):
    assert explain(error) is None


def test_progress_line_reads_as_promised():
    line = steps_line(step=134, total=320, elapsed=27.4, eta=38.2, rate=4.9, loss=0.0213, lr=3.1e-3)
    assert line == "steps:  41%|████      | 134/320 [00:27<00:38, 4.9 it/s, loss=0.0213, lr=3.1e-03]"
    assert "2.0 s/it" in steps_line(step=1, total=2, elapsed=1, eta=2, rate=0.5, loss=1, lr=1)
    assert clock(3723) == "1:02:03"


def test_console_overwrites_progress_and_ends_it_before_a_line():
    stream = io.StringIO()
    console = Console(stream)
    console.progress("first, longer")
    console.progress("at once: not drawn")
    console.progress("last", force=True)
    console.line("done")
    assert stream.getvalue() == "\rfirst, longer\rlast         \ndone\n"
