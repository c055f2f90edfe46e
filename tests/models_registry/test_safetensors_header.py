from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_trainer.safetensors_header import HeaderError, Tensor, read_header
from tests.models_registry.conftest import write_file, write_raw


def test_read_header_of_a_real_file(tmp_path):
    path = tmp_path / "real.safetensors"
    tensors = {"b": np.zeros((2, 3), np.float16), "a": np.zeros((5,), np.float32), "none": np.zeros((0, 7), np.int8)}
    save_file(tensors, path, metadata={"made": "today"})

    header = read_header(path)

    assert dict(header.metadata) == {"made": "today"}
    assert dict(header.tensors) == {
        "a": Tensor("F32", (5,), 20),
        "b": Tensor("F16", (2, 3), 12),
        "none": Tensor("I8", (0, 7), 0),
    }
    assert header.file_bytes == path.stat().st_size
    assert header.parameters == 11
    assert header.dtype == "F16"


def test_read_header_of_24_gigabytes_reads_only_the_header(tmp_path):
    shape = (12, 1024, 1024, 1024)
    path = write_file(tmp_path / "huge.safetensors", {"w": shape}, dtype="BF16")
    before = _bytes_read()
    header = read_header(path)
    assert _bytes_read() - before < 100_000
    assert header.file_bytes > 24 * 1024**3
    assert dict(header.tensors) == {"w": Tensor("BF16", shape, 24 * 1024**3)}


def _bytes_read():
    """What this process has read so far, by the kernel's count."""
    counts = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in counts if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize(
    ("entries", "data_bytes", "words"),
    [
        ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, 3, "was cut off"),
        ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, 5, "belong to no tensor"),
        ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [2, 6]}}, 6, "leaves a gap"),
        ({"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}}, 4, "does not fit its 4 bytes"),
        ({"a": {"dtype": "F16", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, 4, "does not fit"),
        ({"a": {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}}, 4, "no valid shape"),
        ({"a": {"dtype": "F16", "shape": [True, 2], "data_offsets": [0, 4]}}, 4, "no valid shape"),
        ({"a": {"dtype": "F16", "shape": [1] * 65, "data_offsets": [0, 2]}}, 2, "no valid shape"),
        ({"a": {"dtype": "F16", "shape": "2", "data_offsets": [0, 4]}}, 4, "no valid shape"),
        ({"a": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 4]}}, 4, "not known here"),
        ({"a": {"dtype": ["F16"], "shape": [2], "data_offsets": [0, 4]}}, 4, "not known here"),
        ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 0]}}, 4, "no valid place"),
        ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0.0, 4.0]}}, 4, "no valid place"),
        ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0]}}, 4, "no valid place"),
        ({"a": {"dtype": "F16", "shape": [2]}}, 4, "no valid place"),
        ({"a": [1, 2]}, 4, "no valid place"),
        (
            {
                "a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
                "b": {"dtype": "F16", "shape": [2], "data_offsets": [2, 6]},
            },
            6,
            "overlaps",
        ),
        ({"__metadata__": {"a": 1}}, 0, "map texts to texts"),
        ({"__metadata__": ["a"]}, 0, "map texts to texts"),
        ({"__metadata__": {"a": "\ud800"}}, 0, "half a character"),
    ],
)
def test_read_header_of_a_lying_header(tmp_path, entries, data_bytes, words):
    path = write_raw(tmp_path / "lie.safetensors", json.dumps(entries).encode(), data_bytes=data_bytes)
    with pytest.raises(HeaderError, match=words) as refusal:
        read_header(path)
    assert str(refusal.value).startswith("lie.safetensors ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        (b"", 0, "not JSON"),
        (b"{}", 3, "cut off inside its header"),
        (b"{}", 100_000_001, "no .safetensors file"),
        (b"{}", 2**64 - 1, "no .safetensors file"),
        (b"[1]", None, "not JSON"),
        (b'{"a":', None, "damaged header"),
        (b'{"a": \xff}', None, "damaged header"),
        (json.dumps({"a": 1}).encode("utf-16-le"), None, "damaged header"),
        (b'{"a":{},"a":{}}', None, "a name appears twice"),
        (b'{"a":' + b"[" * 200_000, None, "damaged header"),
        (b'{"a":' + b"9" * 5_000 + b"}", None, "damaged header"),
    ],
)
def test_read_header_of_bytes_that_are_no_header(tmp_path, header, length, words):
    path = write_raw(tmp_path / "odd.safetensors", header, length=length)
    with pytest.raises(HeaderError, match=words):
        read_header(path)


def test_read_header_of_an_empty_file(tmp_path):
    path = tmp_path / "empty.safetensors"
    path.write_bytes(b"")
    with pytest.raises(HeaderError, match="only 0 bytes"):
        read_header(path)


def test_read_header_of_every_truncation(tmp_path):
    whole = write_file(tmp_path / "whole.safetensors", {"a": (2, 2), "b": (3,)}).read_bytes()
    path = tmp_path / "part.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(HeaderError):
            read_header(path)


def test_read_header_of_a_named_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HeaderError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_header_and_recognition_import_neither_torch_nor_django():
    program = (
        "import sys, lora_trainer.safetensors_header, models_registry.recognition, models_registry.diffusers_folder\n"
        "print(sorted({'torch', 'numpy', 'django', 'safetensors', 'diffusers'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
