import errno
import io

import pytest
import torch

from lora_trainer.console import Console, clock, steps_line
from lora_trainer.errors import explain


def test_real_allocation_failure_of_torch_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    explained = explain(caught.value)
    assert (explained.code, explained.exit_status) == ("out_of_memory", 3)
    assert str(explained).startswith("This machine ran out of memory. Lower train_batch_size")


def test_gpu_out_of_memory_names_the_gpu():
    explained = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert (explained.code, str(explained)[:7]) == ("out_of_memory", "The GPU")


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
