import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.cache import HALF_WRITTEN_SECONDS, DiskCache, cache_key, model_digest
from lora_trainer.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = cache_key("latent", "a picture")


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latent": torch.randn(4, 8, 8, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.5),
    }


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_put_is_got_bit_for_bit_by_another_run(tmp_path):
    first, second = DiskCache(tmp_path), DiskCache(tmp_path)
    assert first.get(KEY) is None
    first.put(KEY, tensors())
    assert equal(second.get(KEY), tensors())
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)
    assert entries(tmp_path) == [tmp_path / KEY[:2] / f"{KEY}.safetensors"]


def test_turned_and_sliced_tensors_are_kept_as_they_look(tmp_path):
    cache, whole = DiskCache(tmp_path), torch.arange(24.0).reshape(4, 6)
    cache.put(KEY, {"turned": whole.T, "part": whole[1:3, 2:]})
    assert equal(cache.get(KEY), {"turned": whole.T.contiguous(), "part": whole[1:3, 2:].contiguous()})


def torn(path):
    path.write_bytes(path.read_bytes()[:-7])


def header_only(path):
    content = path.read_bytes()
    path.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])


def empty(path):
    path.write_bytes(b"")


def no_safetensors(path):
    path.write_bytes(b"\x89PNG\r\n" * 50)


def one_bit_changed(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def foreign(path):
    save_file(load_file(path), path)


def of_another_key(path):
    cache, other = DiskCache(path.parent.parent), cache_key("latent", "another picture")
    cache.put(other, tensors(1))
    (path.parent.parent / other[:2] / f"{other}.safetensors").replace(path)


def not_finite(path):
    DiskCache(path.parent.parent).put(KEY, {"latent": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize(
    "harm", [torn, header_only, empty, no_safetensors, one_bit_changed, foreign, of_another_key, not_finite]
)
def test_file_that_cannot_be_believed_is_missing_and_is_replaced(tmp_path, harm):
    cache = DiskCache(tmp_path)
    cache.put(KEY, tensors())
    harm(tmp_path / KEY[:2] / f"{KEY}.safetensors")
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    assert equal(cache.get(KEY), tensors())


def test_file_torn_anywhere_is_missing(tmp_path):
    cache, path = DiskCache(tmp_path), tmp_path / KEY[:2] / f"{KEY}.safetensors"
    cache.put(KEY, tensors())
    content = path.read_bytes()
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        assert cache.get(KEY) is None


def test_cache_that_cannot_be_written_is_only_read(tmp_path):
    cache, other = DiskCache(tmp_path), cache_key("latent", "another picture")
    cache.put(KEY, tensors())
    (tmp_path / other[:2]).touch()  # where a folder is wanted
    cache.put(other, tensors())
    assert cache.trouble == f"The cache {tmp_path} cannot be written (File exists), so nothing more is added."
    cache.put(cache_key("latent", "a third"), tensors())
    assert equal(cache.get(KEY), tensors())
    assert len(entries(tmp_path)) == 2


def test_disk_that_takes_no_more_leaves_nothing_half_written(tmp_path):
    cache = DiskCache(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # bytes a file
    try:
        cache.put(KEY, tensors())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in cache.trouble
    assert entries(tmp_path) == []


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^'cache_dir': .*file cannot be used as a folder \(File exists\)\."):
        DiskCache(tmp_path / "file")


def test_key_depends_on_every_fact_and_their_order():
    facts = [("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a",)]
    assert len({cache_key(kind, *some) for some in facts for kind in ("latent", "caption")}) == 10
    assert cache_key("latent", "a") == cache_key("latent", "a")


def test_model_digest_sees_names_types_shapes_and_values():
    def layer(**changes):
        torch.manual_seed(1)
        made = torch.nn.Linear(4, 4, **changes)
        return made if changes else made.eval()

    def changed():
        made = layer()
        made.weight.data[0, 0] += 1e-7
        return made

    def reshaped():
        made = layer()
        made.weight = torch.nn.Parameter(made.weight.reshape(2, 8))
        return made

    plain = model_digest([layer()])
    assert model_digest([layer()]) == plain
    variants = [
        [changed()], [reshaped()], [layer().half()], [layer().double()], [torch.nn.Sequential(layer())],
        [layer(), layer()], [],
    ]  # fmt: skip
    assert len({plain, *map(model_digest, variants)}) == 8


FILL = """
import random, sys
import torch
from lora_trainer.cache import DiskCache, cache_key
cache, seed = DiskCache(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
numbers = list(range(20)) * 3
random.Random(seed).shuffle(numbers)
for number in numbers:
    found = cache.get(cache_key("latent", str(number)))
    assert found is None or torch.equal(found["latent"], torch.full((4, 32, 32), float(number)))
    cache.put(cache_key("latent", str(number)), {"latent": torch.full((4, 32, 32), float(number))})
assert not cache.trouble, cache.trouble
""".replace("DiskCache(sys.argv[1])", "DiskCache(__import__('pathlib').Path(sys.argv[1]))")


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_fill_one_cache_at_once(tmp_path):
    processes = [start(FILL, tmp_path, seed) for seed in (1, 2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    cache = DiskCache(tmp_path)
    for number in range(20):
        assert cache.get(cache_key("latent", str(number)))["latent"][0, 0, 0] == number
    assert len(entries(tmp_path)) == 20


PUT_SLOWLY = """
import sys, time
from pathlib import Path
import torch
from lora_trainer import atomic
from lora_trainer.cache import DiskCache
def wait(_):
    print("written", flush=True)
    time.sleep(60)
atomic.os.fsync = wait
DiskCache(Path(sys.argv[1])).put(sys.argv[2], {"latent": torch.ones(4, 64, 64)})
"""


def test_put_that_is_killed_leaves_no_entry_and_is_swept_up_later(tmp_path):
    process = start(PUT_SLOWLY, tmp_path, KEY)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    [left] = entries(tmp_path)
    cache = DiskCache(tmp_path)  # too young to be swept up: it could be another run's
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    assert equal(cache.get(KEY), tensors())
    assert left.exists()
    old = left.stat().st_mtime - HALF_WRITTEN_SECONDS - 60
    os.utime(left, (old, old))
    assert equal(DiskCache(tmp_path).get(KEY), tensors())
    assert [path.name for path in entries(tmp_path)] == [f"{KEY}.safetensors"]
