"""People, a dataset, a base model and runs in several states, for the pages to show. A script, because the server under
test has an environment of its own: it runs there, and prints the ids as JSON.

    python rows.py
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from datetime import timedelta

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorapilot.settings")
django.setup()

from django.utils import timezone  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from datasets.models import Dataset, DatasetVersion  # noqa: E402
from datasets.services import create_dataset, import_files  # noqa: E402
from lorapilot.models import User  # noqa: E402
from models_registry.models import BaseModel  # noqa: E402
from runs.enums import Ending, Priority, Profile, Status, StopIntent  # noqa: E402
from runs.models import (  # noqa: E402
    Attempt,
    Checkpoint,
    Device,
    Host,
    MetricPoint,
    Run,
    RunEvent,
    Sample,
    Slot,
    ValidationPoint,
)
from runs.spec import RunSpec  # noqa: E402

PROMPTS = ("a photo of sks face on a blue background", "a red circle", "sks face, green background", "a yellow square")
STEPS = 320


def main() -> None:
    now = timezone.now()
    alice = User.objects.create_superuser("alice", "alice@example.org", "alice-password")
    bob = User.objects.create_user("bob", "bob@example.org", "bob-password")
    dataset = Dataset.objects.create(owner=alice, name="sks face", trigger_word="sks face")
    version = DatasetVersion.objects.create(
        dataset=dataset,
        owner=alice,
        name=dataset.name,
        trigger_word=dataset.trigger_word,
        number=1,
        digest="d1" * 32,
        pictures=[
            {"sha256": f"{n:064x}", "caption": "sks face", "repeats": 1, "name": f"{n}.png", "extension": "png"}
            for n in range(12)
        ],
    )
    base = BaseModel.objects.create(
        name="pilot-tiny", path="pilot-tiny", layout="folder", architecture="sdxl", resolution=128, bytes=9_400_000,
        sha256="b4" * 32,
    )  # fmt: skip
    host = Host.objects.create(name="here", heartbeat_at=now)
    slot = Slot.objects.create(host=host, name="cpu")

    def run(name: str, status: Status, **values: object) -> Run:
        spec = RunSpec(resolution=128, steps=STEPS, sample_prompts=PROMPTS)
        common = {"owner": alice, "profile": Profile.REGULAR, "queued_at": now, "total_steps": STEPS}
        common |= {"spec": spec.as_values()}
        made = Run.objects.create(
            output_name=name, status=status, stack="builtin", dataset_version=version, base_model=base,
            **(common | values),
        )  # fmt: skip
        (made.folder / "_logs").mkdir(parents=True)
        made.log_path.write_bytes(b"")
        RunEvent.objects.create(run=made, attempt=1, new_status=Status.QUEUED, actor=made.owner, message="Submitted.")
        return made

    live = run(
        "sks-face", Status.RUNNING, slot=slot, started_at=now - timedelta(seconds=40), step=180, loss=0.0873,
        steps_per_second=5.2, eta_seconds=27,
        notes=["Resolution 128 px: that of pilot-tiny.", "fp32: a CPU trains in it."],
    )  # fmt: skip
    RunEvent.objects.create(run=live, attempt=1, old_status=Status.QUEUED, new_status=Status.STARTING)
    RunEvent.objects.create(run=live, attempt=1, old_status=Status.STARTING, new_status=Status.RUNNING)
    add_metrics(live, until=180)
    add_samples(live, steps=(0, 80, 160))
    add_checkpoint(live, step=160)

    waits = run("watercolour-style", Status.QUEUED, owner=bob, profile=Profile.HIGH_QUALITY, total_steps=2400, place=3)
    run("product-shots", Status.QUEUED, profile=Profile.QUICK_TEST, total_steps=600, held_at=now, place=4)
    low = {"profile": Profile.QUICK_TEST, "total_steps": 600, "priority": Priority.LOW}
    ordered = [run(f"order-{place}", Status.QUEUED, place=place, **low).pk for place in (1, 2, 3)]
    done = run(
        "sks-face-first-try", Status.SUCCEEDED, profile=Profile.QUICK_TEST, step=STEPS, loss=0.0612, exit_code=0,
        started_at=now - timedelta(hours=3), finished_at=now - timedelta(hours=2, minutes=58),
    )  # fmt: skip
    add_metrics(done, until=STEPS)
    add_samples(done, steps=(0, STEPS))
    add_checkpoint(done, step=STEPS, is_final=True)
    again = run(
        "sks-face-rank-8", Status.SUCCEEDED, step=STEPS, loss=0.0581, exit_code=0, retry_of=done,
        spec=RunSpec(
            resolution=128, steps=STEPS, rank=8, alpha=8, learning_rate=2e-4, validation_share=0.1,
            sample_prompts=PROMPTS,
        ).as_values(),
        started_at=now - timedelta(hours=2), finished_at=now - timedelta(hours=1, minutes=57),
    )  # fmt: skip
    add_metrics(again, until=STEPS, seconds=0.55, loss=0.05)
    again.validations.bulk_create(
        ValidationPoint(run=again, step=step, attempt=1, loss=0.09 + (step - 160) ** 2 / 1e6)
        for step in (80, 160, 240, 320)
    )
    add_samples(again, steps=(0, 160, STEPS))
    add_checkpoint(again, step=STEPS, is_final=True)
    failed = run(
        "logo-lora", Status.FAILED, profile="", step=12, loss=0.21, exit_code=3,
        reason="The loss became infinite at step 12. Lower the learning rate (now 0.5), for example to 0.0001.",
        finished_at=now - timedelta(days=1),
    )  # fmt: skip
    failed.log_path.write_text("epoch 1\nstep 12/320 loss inf\nERROR: the loss became infinite\n")
    stopped = run("portraits", Status.STOPPED, step=96, finished_at=now - timedelta(days=2))
    watched = [
        run(f"watched-{n}", Status.RUNNING, slot=Slot.objects.create(host=host, name=f"{n}"), started_at=now)
        for n in range(6)
    ]
    logs = [[run.pk, str(run.log_path)] for run in watched]
    ids = {
        "live": live.pk,
        "done": done.pk,
        "again": again.pk,
        "failed": failed.pk,
        "stopped": stopped.pk,
        "dataset": dataset.pk,
    }
    ids |= {"waits": waits.pk, "base": base.pk, "ordered": ordered} | add_more_hosts(run)
    import_shapes(alice)
    print(json.dumps(ids | {"log": str(live.log_path), "watched": logs}))


def add_more_hosts(run) -> dict[str, int]:
    """A host in maintenance and a silent one, with runs in the states that they bring about."""
    now = timezone.now()
    draining = Host.objects.create(name="gpu-1", heartbeat_at=now, draining_at=now, boot_id="b1" * 16)
    silent = Host.objects.create(name="gpu-2", heartbeat_at=now - timedelta(minutes=9), lost_at=now)
    slots = [gpu_slot(host, *numbers) for host, numbers in ((draining, (0,)), (draining, (1, 2)), (silent, (0,)))]
    Host.objects.get(name="here").slots.get(name="cpu").devices.create(
        host=Host.objects.get(name="here"), kind="cpu", uuid="cpu", name="x86_64", memory_bytes=32 << 30
    )
    stopping = run(
        "stopping-slowly", Status.STOPPING, slot=slots[0], started_at=now, step=240, stop_requested_at=now,
        stop_intent=StopIntent.STOP, steps_per_second=0.8, loss=0.11,
    )  # fmt: skip
    Attempt.objects.create(run=stopping, number=1, slot=slots[0])
    plan = [{"signal": "SIGINT", "grace_seconds": 600}, {"signal": "SIGKILL", "grace_seconds": 5}]
    stopping.attempt_folder().mkdir(parents=True)
    (stopping.attempt_folder() / "launch.json").write_text(json.dumps({"stop": plan}))
    add_state(stopping, step=200)
    unheard = run("far-away", Status.RUNNING, slot=slots[2], started_at=now, step=40, loss=0.2)
    Attempt.objects.create(run=unheard, number=1, slot=slots[2])
    trains = run("to-be-paused", Status.RUNNING, slot=slots[1], started_at=now, step=60, loss=0.2, eta_seconds=400)
    Attempt.objects.create(run=trains, number=1, slot=slots[1])
    paused = run("paused-portrait", Status.QUEUED, attempt=2, step=120, held_at=now, place=1)
    Run.objects.filter(pk=paused.pk).update(reason="Paused. It goes on from step 120.")
    Attempt.objects.create(run=paused, number=1, slot=slots[1], ended_at=now, ending=Ending.STOPPED, exit_code=130)
    out = run(
        "out-of-memory", Status.FAILED, attempt=2, step=64, exit_code=3, finished_at=now,
        adaptations={"gradient_checkpointing": True}, reason="The GPU ran out of memory.",
        spec=RunSpec(resolution=128, steps=STEPS, batch_size=4, sample_prompts=PROMPTS).as_values(),
    )  # fmt: skip
    first = {"number": 1, "start_step": 0, "ending": Ending.INTERRUPTED, "exit_code": -9}
    second = {"number": 2, "start_step": 40, "ending": Ending.OUT_OF_MEMORY, "exit_code": 3}
    for facts in (first, second | {"adaptations": out.adaptations}):
        Attempt.objects.create(run=out, slot=slots[0], ended_at=now, **facts)
    found = {"stopping": stopping, "unheard": unheard, "trains": trains, "paused": paused, "out": out}
    return {name: row.pk for name, row in found.items()} | {"silent": silent.pk, "draining": draining.pk}


def gpu_slot(host: Host, *numbers: int) -> Slot:
    slot = Slot.objects.create(host=host, name="gpu" + "+".join(map(str, numbers)))
    for number in numbers:
        uuid = f"GPU-{host.name}-{number}"
        Device.objects.create(
            host=host, slot=slot, kind="cuda", uuid=uuid, index=number, name="NVIDIA H100", memory_bytes=80 << 30
        )
    return slot


def add_state(run: Run, *, step: int) -> None:
    folder = run.folder / "state" / f"step{step:08d}"
    folder.mkdir(parents=True)
    for name in ("lora.safetensors", "training.pt", "state.json", "COMPLETE"):
        (folder / name).touch()
    run.states.create(step=step, path=f"state/{folder.name}")


def import_shapes(owner: User) -> None:
    """A dataset that can be trained on."""
    dataset = create_dataset(owner, name="shapes", trigger_word="sks")
    files = []
    for index, name in enumerate(("ball", "disc", "dot")):
        picture = io.BytesIO()
        _draw(index, 0.5).save(picture, "PNG")
        picture.seek(0)
        files += [(f"{name}.png", picture), (f"{name}.txt", io.BytesIO(f"sks {name}".encode()))]
    import_files(dataset, files=files)


def add_metrics(run: Run, *, until: int, seconds: float = 0.4, loss: float = 0.06) -> None:
    """Of steps that take so many `seconds`, with a loss that falls to about `loss`."""
    noise = random.Random(1)
    at = timezone.now()
    MetricPoint.objects.bulk_create(
        MetricPoint(
            run=run,
            step=step,
            attempt=1,
            loss=loss + 0.16 * math.exp(-step / 70) + noise.random() * 0.05,
            learning_rate=0.004 * (1 + math.cos(math.pi * step / STEPS)) / 2,
            at=at + timedelta(seconds=seconds * step),
        )
        for step in range(1, until + 1)
    )


def add_samples(run: Run, *, steps: tuple[int, ...]) -> None:
    (run.folder / "samples").mkdir()
    for step in steps:
        for index, prompt in enumerate(PROMPTS):
            path = f"samples/{step:06d}-{index}.png"
            _draw(index, step / STEPS).save(run.folder / path)
            Sample.objects.create(run=run, step=step, index=index, path=path, prompt=prompt, seed=index + 1)


def _draw(index: int, done: float) -> Image.Image:
    picture = Image.new("RGB", (128, 128), ("#3b6fd8", "#d9d9d9", "#3f9d58", "#7a4fc0")[index])
    size = int(24 + 24 * done)
    box = (64 - size, 64 - size, 64 + size, 64 + size)
    ImageDraw.Draw(picture).ellipse(box, fill=("#f5d547", "#d23f31", "#f5d547", "#f2c230")[index])
    return picture


def add_checkpoint(run: Run, *, step: int, is_final: bool = False) -> None:
    path = f"{run.output_name}.safetensors" if is_final else f"{run.output_name}-step{step:08d}.safetensors"
    (run.folder / path).write_bytes(b"\0" * 4096)
    Checkpoint.objects.create(
        run=run, step=step, path=path, bytes=4096, is_final=is_final,
        sha256="ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7",
    )  # fmt: skip


main()
