"""People, a dataset, a base model and runs in several states, for the pages to show. A script, because the server under
test has an environment of its own: it runs there, and prints the ids as JSON.

    python rows.py
"""

from __future__ import annotations

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
from lorapilot.models import User  # noqa: E402
from models_registry.models import BaseModel  # noqa: E402
from runs.enums import Profile, Status  # noqa: E402
from runs.models import Checkpoint, Host, MetricPoint, Run, RunEvent, Sample, Slot  # noqa: E402
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
        pictures=[{"sha256": f"{n:064x}", "caption": "sks face", "repeats": 1, "name": f"{n}.png"} for n in range(12)],
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
        made = Run.objects.create(
            output_name=name, status=status, stack="builtin", spec=spec.as_values(), dataset_version=version,
            base_model=base, **(common | values),
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

    run("watercolour-style", Status.QUEUED, owner=bob, profile=Profile.HIGH_QUALITY, total_steps=2400)
    run("product-shots", Status.QUEUED, profile=Profile.QUICK_TEST, total_steps=600, held_at=now)
    done = run(
        "sks-face-first-try", Status.SUCCEEDED, profile=Profile.QUICK_TEST, step=STEPS, loss=0.0612, exit_code=0,
        started_at=now - timedelta(hours=3), finished_at=now - timedelta(hours=2, minutes=58),
    )  # fmt: skip
    add_metrics(done, until=STEPS)
    add_samples(done, steps=(0, STEPS))
    add_checkpoint(done, step=STEPS, is_final=True)
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
    ids = {"live": live.pk, "done": done.pk, "failed": failed.pk, "stopped": stopped.pk, "dataset": dataset.pk}
    print(json.dumps(ids | {"base": base.pk, "log": str(live.log_path), "watched": logs}))


def add_metrics(run: Run, *, until: int) -> None:
    noise = random.Random(1)
    at = timezone.now()
    MetricPoint.objects.bulk_create(
        MetricPoint(
            run=run,
            step=step,
            attempt=1,
            loss=0.06 + 0.16 * math.exp(-step / 70) + noise.random() * 0.05,
            learning_rate=0.004 * (1 + math.cos(math.pi * step / STEPS)) / 2,
            at=at,
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
