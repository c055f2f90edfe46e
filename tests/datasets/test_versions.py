"""Versions: the same content is the same row, and nothing that happens later changes one."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
from django.db import connection

from datasets import selectors, services
from datasets.models import DatasetVersion
from lorapilot.errors import Missing, UserError


def test_pin_version_of_the_same_content_gives_the_same_row(dataset, add):
    add("red", "blue")
    first = services.pin_version(dataset)
    assert services.pin_version(dataset) == first
    assert (first.number, first.name, first.trigger_word, first.owner) == (1, "Cats", "ohwx", dataset.owner)
    red = dataset.pictures.get(original_name="red.png")
    services.set_caption(red, caption="changed")
    second = services.pin_version(dataset)
    assert second.number == 2
    services.set_caption(red, caption="a red picture")
    assert services.pin_version(dataset) == first
    services.set_trigger_word(dataset, trigger_word="sks")
    assert services.pin_version(dataset).number == 3


def test_version_never_changes(dataset, add):
    red, blue = add("red", "blue")
    version = services.pin_version(dataset)
    before = DatasetVersion.objects.values().get()
    services.set_caption(red, caption="changed")
    services.delete_picture(blue)
    services.rename_dataset(dataset, name="Dogs")
    services.set_trigger_word(dataset, trigger_word="other")
    add("green")
    assert DatasetVersion.objects.values().get() == before
    services.delete_dataset(dataset)
    assert DatasetVersion.objects.values().get() == before | {"dataset_id": None}
    version.refresh_from_db()
    for listed in selectors.version_files(version):
        assert hashlib.sha256(Path(listed["image"]).read_bytes()).hexdigest() == Path(listed["image"]).stem


def test_version_files_are_what_a_trainer_reads(dataset, add):
    add("red", "blue")
    files = selectors.version_files(services.pin_version(dataset))
    assert sorted(file["caption"] for file in files) == ["a blue picture", "a red picture"]
    assert {file["repeats"] for file in files} == {1}
    for file in files:
        assert Path(file["image"]).is_absolute()
        assert Path(file["image"]).is_file()


def test_digest_is_the_documented_canonical_json(dataset, add):
    services.set_caption(add("red")[0], caption="ein Hündchen")
    version = services.pin_version(dataset)
    sha256 = dataset.pictures.get().sha256
    picture = f'{{"caption":"ein Hündchen","repeats":1,"sha256":"{sha256}"}}'
    text = f'{{"pictures":[{picture}],"trigger_word":"ohwx"}}'
    assert version.digest == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text)["trigger_word"] == "ohwx"


def test_pin_version_of_an_empty_dataset_says_what_to_do(dataset):
    with pytest.raises(UserError) as refused:
        services.pin_version(dataset)
    assert refused.value.message == "The dataset has no pictures yet. Upload some, then try again."
    assert DatasetVersion.objects.count() == 0


def test_pin_version_of_a_deleted_dataset_is_refused(dataset, add, monkeypatch):
    add("red")
    digest = services.version_digest

    def deletes_meanwhile(*args):
        services.delete_dataset(type(dataset).objects.get(pk=dataset.pk))
        return digest(*args)

    monkeypatch.setattr(services, "version_digest", deletes_meanwhile)
    with pytest.raises(Missing):
        services.pin_version(dataset)


@pytest.mark.django_db(transaction=True)
def test_pin_version_from_many_threads_gives_one_row(dataset, add):
    add("red", "blue")
    start = threading.Barrier(6)
    found = []

    def pin():
        start.wait()
        found.append(services.pin_version(dataset).pk)
        connection.close()

    threads = [threading.Thread(target=pin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DatasetVersion.objects.get().pk] * 6
