"""A disk that is really full: a small file system of its own, mounted for the test."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer.atomic import write_file, write_folder
from lora_trainer.events import EventLog
from lora_trainer.state_files import complete_states
from tests.trainer.conftest import PACKAGE, TIMEOUT_SECONDS, differing, weights

PAGE_BYTES = 4096


class Disk:
    def __init__(self, folder):
        self.folder = folder

    def mount(self, *options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def grow(self, size):
        assert self.mount("remount", f"size={size}").returncode == 0

    def fill(self):
        """Leave not a byte free, but for what is left of the pages that files have already."""
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(PAGE_BYTES))

    def names(self):
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(tmp_path):
    """64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    try:
        mounted = made.mount("size=64k")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield made
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_run_on_a_full_disk_exits_with_5_and_keeps_what_was_saved(disk, trainer, short_run):
    # room for the checkpoint and the state of step 2 and the checkpoint of step 4
    disk.grow("5m")
    trainer.output = disk.folder
    command = trainer.command(trainer.write())
    with (disk.folder / "log").open("wb") as log:
        done = subprocess.run(command, cwd=trainer.folder, stdout=log, stderr=log, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 5
    (error,) = trainer.named("error")
    assert (error["code"], error["message"][:17]) == ("disk_full", "The disk is full.")
    assert (disk.folder / "log").read_text().splitlines()[-1] == f"Error: {error['message']}"
    assert complete_states(disk.folder / "state") == [(disk.folder / "state" / "step00000002", 2)]
    assert [name for name in disk.names() if not name.startswith("state/step00000002/")] == [
        "events.jsonl", "face-step00000002.safetensors", "face-step00000004.safetensors", "log",
    ]  # fmt: skip
    for name in ("face-step00000002.safetensors", "face-step00000004.safetensors"):
        assert differing(weights(short_run.output / name), weights(disk.folder / name)) == []


def test_log_on_a_full_disk_ends_the_run_with_5(trainer):
    # what is not written at once, Python tries to write at its end
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            trainer.command(trainer.write()),
            cwd=trainer.folder,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (5, b"")
    assert [error["code"] for error in trainer.named("error")] == ["disk_full"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("model", "status", "code"), [("folder", 5, "disk_full"), (None, 1, "internal")])
def test_log_on_a_full_disk_ends_the_captioner_with_its_reason(tmp_path, model, status, code, unbuffered):
    # a model that is no text is a fault of our own, found before the first line
    order = {"captioner": "tagger", "model": model, "pictures": [], "events_file": str(tmp_path / "events.jsonl")}
    (tmp_path / "order.json").write_text(json.dumps(order))
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-P", str(PACKAGE / "__main__.py"), "caption", str(tmp_path / "order.json")],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (status, b"")
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.get("code", event["event"]) for event in told] == ["stage", code]


def test_event_that_the_disk_tore_is_the_only_one_lost(disk):
    path = disk.folder / "events.jsonl"
    events = EventLog(path)
    events.emit("first")
    disk.fill()
    with pytest.raises(OSError, match="No space left") as full:
        events.emit("torn", text="x" * PAGE_BYTES)
    assert full.value.errno == errno.ENOSPC
    assert path.stat().st_size == PAGE_BYTES
    (disk.folder / "filler").unlink()
    events.emit("second")
    events.emit("third")
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        events.emit("torn", text="x" * PAGE_BYTES)
    (disk.folder / "filler").unlink()
    EventLog(path).emit("of the next attempt")
    assert [event["event"] for event in whole_events(path)] == ["first", "second", "third", "of the next attempt"]


def whole_events(path):
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def test_what_was_there_survives_a_disk_without_room_for_its_successor(disk):
    write_file(disk.folder / "file", b"old")
    write_folder(disk.folder / "folder", {"one": b"old", "two": b"old"})
    before = disk.names()
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        write_file(disk.folder / "file", bytes(PAGE_BYTES))
    with pytest.raises(OSError, match="No space left"):
        write_folder(disk.folder / "folder", {"one": b"", "two": bytes(PAGE_BYTES)})
    (disk.folder / "filler").unlink()
    assert disk.names() == before
    assert (disk.folder / "file").read_bytes() == (disk.folder / "folder" / "two").read_bytes() == b"old"
    write_folder(disk.folder / "folder", {"one": b"new"})
    assert disk.names() == ["file", "folder/one"]


def test_folder_that_cannot_be_replaced_stays_as_it_was(disk, tmp_path):
    # a mounted folder can be emptied, but not renamed
    (disk.folder / "one").write_bytes(b"old")
    with pytest.raises(OSError, match="busy"):
        write_folder(disk.folder, {"one": b"new"})
    assert (disk.folder / "one").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [disk.folder]
