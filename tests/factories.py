"""Rows for tests, made through the services where a service makes them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from django.utils import timezone
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "lora_trainer" / "assets"


def picture_file(color="red", size=(64, 64), kind="PNG"):
    """The bytes of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    file.seek(0)
    return file


def make_dataset(owner, *, name="shapes", pictures=("red", "green", "blue")):
    from datasets import services

    dataset = services.create_dataset(owner, name=name, trigger_word="sks")
    files = []
    for color in pictures:
        files += [(f"{color}.png", picture_file(color)), (f"{color}.txt", io.BytesIO(f"sks {color}".encode()))]
    services.import_files(dataset, files=files)
    return dataset


def make_base_model():
    """pilot-tiny, copied into the test's workspace and registered."""
    from lorapilot import workspace
    from models_registry.models import BaseModel
    from models_registry.services import register_base_model

    found = BaseModel.objects.filter(name="pilot-tiny").first()
    if found is not None:
        return found
    shutil.copytree(ASSETS / "pilot-tiny", workspace.models() / "pilot-tiny")
    return register_base_model(path="pilot-tiny", name="pilot-tiny")


def make_slot(host_name="testhost", *, name="cpu", trainers=()):
    """`trainers`: keys of those that the host has told of."""
    from runs.models import Device, Host, Slot

    host, _ = Host.objects.get_or_create(name=host_name, defaults={"heartbeat_at": timezone.now()})
    if trainers:
        host.trainers = {key: {"home": f"/{key}", "python_version": "3.11.7"} for key in trainers}
        host.save()
    slot = Slot.objects.create(host=host, name=name)
    Device.objects.create(host=host, slot=slot, kind="cpu", uuid=name, name="CPU")
    return slot


def make_run(owner, *, output_name="first", **options):
    from datasets.models import Dataset
    from runs.services import submit_run

    dataset = Dataset.objects.filter(owner=owner).first() or make_dataset(owner)
    values = {"steps": 4, "rank": 2, "alpha": 2} | options.pop("values", {})
    return submit_run(
        owner, dataset=dataset, base_model=make_base_model(), output_name=output_name, values=values, **options
    )
