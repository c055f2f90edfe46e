"""Real pictures, drawn for each test; Alice's dataset, which she shares with Bob's team."""

from __future__ import annotations

import io

import pytest
from PIL import Image


@pytest.fixture
def draw():
    """draw("red"): the bytes of a PNG; draw("red", "JPEG", (64, 48), exif=…)."""

    def drawn(colour="red", kind="PNG", size=(64, 48), mode="RGB", **options):
        file = io.BytesIO()
        Image.new(mode, size, colour).save(file, kind, **options)
        return file.getvalue()

    return drawn


@pytest.fixture
def dataset(alice, team, workspace):
    from datasets import services

    created = services.create_dataset(alice, name="Cats", trigger_word="ohwx")
    return services.share_dataset(created, groups=[team])


@pytest.fixture
def add(dataset, draw):
    """add("red", "blue"): pictures red.png and blue.png with their colour as caption, in Alice's dataset."""
    from datasets import services

    def added(*colours, to=dataset):
        files = []
        for colour in colours:
            files.append((f"{colour}.png", io.BytesIO(draw(colour))))
            files.append((f"{colour}.txt", io.BytesIO(f"a {colour} picture".encode())))
        services.import_files(to, files=files)
        return list(to.pictures.filter(original_name__in=[f"{colour}.png" for colour in colours]))

    return added


@pytest.fixture
def everything(dataset, workspace):
    """everything(): all rows and files of datasets, to be compared before and after."""
    from datasets.models import Dataset, DatasetVersion, Picture, Upload
    from lorapilot.models import Job

    def found():
        tables = (Dataset, Dataset.groups.through, Picture, DatasetVersion, Upload, Job)
        rows = {table.__name__: list(table.objects.order_by("pk").values()) for table in tables}
        staging = [path for path in workspace.glob("datasets/incoming/*") if path.is_dir()]
        return rows, {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}, staging

    return found
